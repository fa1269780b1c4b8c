"""The tasks of `bertjax.tasks` as work of a job: what they answer, in columns."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import jax
import pyarrow as pa

from bertjax import hub
from bertjax.corpus.work import Placement, digest_of_model
from bertjax.engine import Encoded, Window
from bertjax.packing import PackedBatch
from bertjax.tasks.base import Task
from bertjax.tasks.classification import TextClassification
from bertjax.tasks.sparse import SparseEncoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskWork:
    """What a task answers to each text.

    Another task is added as a class of this kind: it names the task's class, the options of its call, and makes columns
    of its answers.

    Args:
        model: a folder, or a repository on the Hub; see `bertjax.pretrained_text.load_task` for the others.
    """

    model: str
    max_length: int | None = None
    dtype: str = "float32"
    tokenizer_normalizer: str | None = None
    ignore: tuple[str, ...] = ()
    revision: str | None = None
    local_files_only: bool = False

    #: The task's class.
    task: ClassVar[type[Task]]
    #: Which of the fields are options of its call.
    call: ClassVar[tuple[str, ...]] = ()
    text_columns: ClassVar[int] = 1

    @property
    def fields(self) -> list[pa.Field]:
        """The columns of the answers."""
        raise NotImplementedError

    def columns(self, answers: list[Any]) -> list[pa.Array]:
        """Answers as columns."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """See `Work`."""
        folder = hub.resolve(self.model, revision=self.revision, local_files_only=self.local_files_only)
        names = ("max_length", "dtype", "tokenizer_normalizer", *self.call)
        return {
            "work": self.task.__name__,
            "model": digest_of_model(folder, self.task.read_folder(folder).transformer),
            **{name: getattr(self, name) for name in names},
        }

    def load(self, devices: Sequence[jax.Device] | None = None) -> "LoadedTask":
        """See `Work`."""
        placement = Placement.on(devices)
        task = self.task.from_pretrained(
            self.model,
            max_length=self.max_length,
            dtype=self.dtype,
            tokenizer_normalizer=self.tokenizer_normalizer,
            ignore=self.ignore,
            revision=self.revision,
            local_files_only=self.local_files_only,
            sharding=placement.parameters,
        )
        return LoadedTask(task, {name: getattr(self, name) for name in self.call}, self.fields, self.columns, placement)


class LoadedTask:
    """A `Computation` of a task's answers."""

    def __init__(
        self,
        task: Task,
        options: dict[str, Any],
        fields: list[pa.Field],
        columns: Callable[[list[Any]], list[pa.Array]],
        placement: Placement,
    ):
        self._plan = task._plan(**options)
        self._columns, self._placement = columns, placement
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
        return self._columns(self._plan.read(window))

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

    @property
    def fields(self) -> list[pa.Field]:
        """See `TaskWork`."""
        parts = [pa.field("label", pa.string()), pa.field("score", pa.float32())]
        return parts if self.top_k == 1 else [pa.field("labels", pa.list_(pa.struct(parts)))]

    def columns(self, answers: list[Any]) -> list[pa.Array]:
        """See `TaskWork`."""
        if self.top_k == 1:
            values = [[answer.label for answer in answers], [answer.score for answer in answers]]
        else:
            values = [[[dataclasses.asdict(label) for label in labels] for labels in answers]]
        return [pa.array(column, field.type) for column, field in zip(values, self.fields, strict=True)]


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

    @property
    def fields(self) -> list[pa.Field]:
        """See `TaskWork`."""
        return [pa.field("indices", pa.list_(pa.int32())), pa.field("values", pa.list_(pa.float32()))]

    def columns(self, answers: list[Any]) -> list[pa.Array]:
        """See `TaskWork`."""
        values = [[vector.indices for vector in answers], [vector.values for vector in answers]]
        return [pa.array(column, field.type) for column, field in zip(values, self.fields, strict=True)]
