"""The tasks of `bertjax.tasks` as work of a job: what they answer, in columns."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import jax
import pyarrow as pa

from bertjax.corpus.work import FromPretrained, Placement
from bertjax.engine import Encoded, Window
from bertjax.packing import PackedBatch
from bertjax.tasks.base import Task
from bertjax.tasks.classification import TextClassification
from bertjax.tasks.rank import CrossEncoder
from bertjax.tasks.sparse import SparseEncoder
from bertjax.tasks.token_classification import AggregationStrategy, TokenClassification


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskWork(FromPretrained):
    """What a task answers to each text.

    Another task is added as a class of this kind: it names the task's class, the options of its call, and makes columns
    of its answers.

    Args:
        model: a folder, or a repository on the Hub; see `bertjax.pretrained_text.load_task` for the others.
    """

    max_length: int | None = None

    #: The task's class.
    task: ClassVar[type[Task]]
    #: Which of the fields are options of its call.
    call: ClassVar[tuple[str, ...]] = ()
    text_columns: ClassVar[int] = 1

    def fields(self, task: Task) -> list[pa.Field]:
        """The columns of the answers that the loaded task gives."""
        raise NotImplementedError

    def values(self, answers: list[Any]) -> list[list[Any]]:
        """For each column, the value of each answer."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """See `Work`."""
        transformer = self.task.read_folder(self.folder()).transformer
        return self.identify(self.task.__name__, transformer, *self.call, "max_length")

    def load(self, devices: Sequence[jax.Device] | None = None) -> "LoadedTask":
        """See `Work`."""
        placement = Placement.on(devices)
        task = self.task.from_pretrained(self.model, max_length=self.max_length, **self.load_options(placement))
        options = {name: getattr(self, name) for name in self.call}
        return LoadedTask(task, options, self.fields(task), self.values, placement)


class LoadedTask:
    """A `Computation` of a task's answers."""

    def __init__(
        self,
        task: Task,
        options: dict[str, Any],
        fields: list[pa.Field],
        values: Callable[[list[Any]], list[list[Any]]],
        placement: Placement,
    ):
        self._plan = task.plan(**options)
        self._values, self._placement = values, placement
        self.fields = fields
        self.shapes = task.shapes
        self.hidden_size = task.model.config.hidden_size
        self.pad_token_id = task.tokenizer.pad_token_id

    def encode(self, items: list[Any], position: int) -> Encoded:
        """See `Computation`."""
        return self._plan.encode(items, position)

    def run(self, batch: PackedBatch) -> Any:
        """See `Computation`."""
        return self._plan.run(self._placement.place(batch))

    def columns(self, window: Window) -> list[pa.Array]:
        """See `Computation`."""
        values = self._values(self._plan.read(window))
        return [pa.array(column, field.type) for column, field in zip(values, self.fields, strict=True)]

    def calibrate(self, windows: Iterable[Window]) -> None:
        """See `Computation`; nothing has to be known."""

    def calibrated(self, calibration: None) -> "LoadedTask":
        """See `Computation`."""
        return self


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labels(TaskWork):
    """The labels of texts; see `TextClassification`.

    Args:
        top_k: 1 for the columns `label` and `score`; another number, or None for all labels, for a column `labels`,
            a list of these two, highest first.
        function_to_apply: see `TextClassification`.
        pair: whether a row has two texts, which the model reads together.
    """

    top_k: int | None = 1
    function_to_apply: str | None = None
    pair: bool = False

    task = TextClassification
    call = ("top_k", "function_to_apply")

    @property
    def text_columns(self) -> int:
        """How many columns of text are read."""
        return 2 if self.pair else 1

    def fields(self, task: Task) -> list[pa.Field]:
        """See `TaskWork`."""
        parts = [pa.field("label", pa.string()), pa.field("score", pa.float32())]
        return parts if self.top_k == 1 else [pa.field("labels", pa.list_(pa.struct(parts)))]

    def values(self, answers: list[Any]) -> list[list[Any]]:
        """See `TaskWork`."""
        if self.top_k == 1:
            return [[answer.label for answer in answers], [answer.score for answer in answers]]
        return [[[dataclasses.asdict(label) for label in labels] for labels in answers]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entities(TaskWork):
    """The entities in texts of any length, in the column `entities`: a list of structs, in the order of the text.

    A struct has `entity_group` (or, of single tokens, `entity` and `index`), `score`, `word`, and `start` and `end`,
    which count characters.

    Args:
        aggregation_strategy, ignore_labels, stride: see `TokenClassification`.
    """

    aggregation_strategy: AggregationStrategy = "simple"
    ignore_labels: tuple[str, ...] = ("O",)
    stride: int | None = None

    task = TokenClassification
    call = ("aggregation_strategy", "ignore_labels", "stride")

    def fields(self, task: Task) -> list[pa.Field]:
        """See `TaskWork`."""
        of_tokens = self.aggregation_strategy == "none"
        types = {"entity" if of_tokens else "entity_group": pa.string(), "score": pa.float32()}
        types |= {"index": pa.int32()} if of_tokens else {}
        types |= {"word": pa.string(), "start": pa.int32(), "end": pa.int32()}
        return [pa.field("entities", pa.list_(pa.struct(list(types.items()))))]

    def values(self, answers: list[Any]) -> list[list[Any]]:
        """See `TaskWork`."""
        return [[[dataclasses.asdict(entity) for entity in entities] for entities in answers]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairScores(TaskWork):
    """How well the second text of each row answers the first; see `CrossEncoder`.

    The column `score`; of a model of several labels, `scores`, a list in the order of its labels.

    Args:
        apply_softmax: see `CrossEncoder`.
    """

    apply_softmax: bool = False

    task = CrossEncoder
    call = ("apply_softmax",)
    text_columns = 2

    def fields(self, task: Task) -> list[pa.Field]:
        """See `TaskWork`."""
        labels = task.model.config.num_labels
        return [pa.field("score", pa.float32()) if labels == 1 else pa.field("scores", pa.list_(pa.float32(), labels))]

    def values(self, answers: list[Any]) -> list[list[Any]]:
        """See `TaskWork`."""
        return [answers]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseVectors(TaskWork):
    """Sparse vectors over the vocabulary, in the columns `indices` and `values`; see `SparseEncoder`.

    Args:
        max_active_dims, prompt, prompt_name: see `SparseEncoder`.
    """

    max_active_dims: int | None = None
    prompt: str | None = None
    prompt_name: str | None = None

    task = SparseEncoder
    call = ("max_active_dims", "prompt", "prompt_name")

    def fields(self, task: Task) -> list[pa.Field]:
        """See `TaskWork`."""
        return [pa.field("indices", pa.list_(pa.int32())), pa.field("values", pa.list_(pa.float32()))]

    def values(self, answers: list[Any]) -> list[list[Any]]:
        """See `TaskWork`."""
        return [[vector.indices for vector in answers], [vector.values for vector in answers]]
