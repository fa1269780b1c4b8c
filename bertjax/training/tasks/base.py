"""What all tasks share that a model is trained for: rows to tokens, tokens to labelled batches, batches to losses."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from flax import nnx

from bertjax.losses import IGNORED
from bertjax.packing import PackedBatch, max_segments
from bertjax.tokenizer import Tokenizer
from bertjax.tokens import Tokens
from bertjax.training.lora import merge_lora, settings_of
from bertjax.training.lora_files import save_adapter
from bertjax.training.objective import Objective, model_objective
from bertjax.training.rows import Rows

# Texts that are tokenized together, on all cores.
_BLOCK = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """What is learnt from, as tokens.

    Attributes:
        input_ids: an int32 array [tokens] for each text, special tokens included.
        token_type_ids: likewise.
        texts: int64 [examples, columns], which texts make an example; -1 for none.
        labels: what the task keeps: an array [examples, ...], or a list of an array [tokens] for each text.
        truncated: how many texts lost tokens.
        records: the rows, for evaluation.
    """

    input_ids: list[np.ndarray]
    token_type_ids: list[np.ndarray]
    texts: np.ndarray
    labels: Any = None
    truncated: int = 0
    records: Sequence[Mapping[str, Any]] = ()

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.texts)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """How many tokens each text has; int64 [texts]."""
        return np.array([len(ids) for ids in self.input_ids], np.int64)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The fixed shapes of a run's batches.

    Attributes:
        length: of the rows.
        row_counts: how many rows a part of a batch may have, ascending; the last one is always enough.
        size: how many examples a part of a batch has.
        parts: how many parts a batch is divided into.
    """

    length: int
    row_counts: tuple[int, ...]
    size: int
    parts: int

    @property
    def segments(self) -> int:
        """How many texts a row has at most."""
        return max_segments(self.length)


@dataclasses.dataclass(frozen=True, eq=False)
class Draft:
    """A batch without labels.

    Attributes:
        examples: all examples.
        chosen: int64 [n], which are in the batch.
        layout: how many a batch has, and its shapes; at the end of an epoch there may be fewer.
        texts: int64 [texts], the texts of these examples, in order.
        made: the labels that `LearningTask.prepare` made.
        packed: the texts in their rows; `packed.items` are indices into `texts`.
    """

    examples: Examples
    chosen: np.ndarray
    layout: Layout
    texts: np.ndarray
    made: list[np.ndarray] | None
    packed: PackedBatch


class LearningTask:
    """What a model is trained for.

    Attributes:
        model_class: the class of model that learns it.
        alone: whether every text needs a row of its own.
        terms: the names of the objective's losses.
        of_examples: the names of the arrays of a batch that have no axis of rows, but one of examples.
        best: the metric that says which of several states is the best, and whether more of it is better.
    """

    model_class: ClassVar[type[nnx.Module]]
    alone: ClassVar[bool] = False
    terms: tuple[str, ...] = ("loss",)
    of_examples: ClassVar[tuple[str, ...]] = ()
    best: tuple[str, bool] = ("loss", False)

    def __init__(self, tokenizer: Tokenizer, max_length: int):
        self.tokenizer, self.max_length = tokenizer, max_length

    def examples(self, rows: Rows) -> tuple[Examples, Rows]:
        """The rows as examples, and the rows again, of which those that the task can't use are bad by now."""
        raise NotImplementedError

    def prepare(
        self, rng: np.random.Generator, examples: Examples, texts: np.ndarray
    ) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
        """The ids of some texts as the model sees them, and labels [tokens] for each, if it is then that they arise.

        Args:
            rng: what is drawn is drawn from this.
            examples: the examples.
            texts: int64 [n], which texts.
        """
        return [examples.input_ids[text] for text in texts], None

    def labels(self, draft: Draft) -> dict[str, np.ndarray]:
        """What a batch has beside the model's inputs."""
        raise NotImplementedError

    def objective(self, model: nnx.Module, layout: Layout) -> Objective:
        """The losses of batches of these shapes."""
        return model_objective(model)

    def metrics(self, model: nnx.Module, examples: Examples, losses: dict[str, float]) -> dict[str, float]:
        """How good a model is on examples, beyond its losses on them, which are given by `terms`."""
        return {}

    def save(self, model: nnx.Module, folder: Path, base: str | None) -> None:
        """Writes a model as PyTorch's libraries load it, in the place of one that is there.

        Args:
            model: the model; of one with adapters, these are merged, and written to "adapter" beside the folder too.
            folder: the model's folder.
            base: what the adapters were added to.
        """
        if settings_of(model):
            save_adapter(model, folder.with_name("adapter"), base=base, force=True)
            model = merge_lora(model)
        self._save(model, folder)

    def _save(self, model: nnx.Module, folder: Path) -> None:
        model.save_pretrained(folder, tokenizer=self.tokenizer, force=True)

    def _tokenize(self, texts: Sequence[str], pairs: Sequence[str] | None = None, **options: Any) -> Tokens:
        parts = []
        for first in range(0, len(texts), _BLOCK):
            block = slice(first, first + _BLOCK)
            second = None if pairs is None else pairs[block]
            parts.append(self.tokenizer(texts[block], second, max_length=self.max_length, **options))
        return Tokens.join(parts) if parts else self.tokenizer([], **options)


def single_texts(tokens: Tokens, labels: Any, rows: Rows) -> Examples:
    """Examples of a text each."""
    return Examples(
        tokens.input_ids,
        tokens.token_type_ids,
        np.arange(len(tokens), dtype=np.int64)[:, None],
        labels,
        int(tokens.truncated.sum()),
        rows.records,
    )


def of_segments(draft: Draft, values: np.ndarray) -> np.ndarray:
    """A value for each text, [texts, ...], as [rows, segments, ...]; where there is no text, what is not scored."""
    packed = draft.packed
    table = _not_scored((len(packed.input_ids), draft.layout.segments, *values.shape[1:]), values.dtype)
    table[packed.rows, packed.segments] = values[packed.items]
    return table


def of_examples(draft: Draft, values: np.ndarray) -> np.ndarray:
    """A value for each example, [n, ...], as [size, ...]; where there is none, what is not scored."""
    table = _not_scored((draft.layout.size, *values.shape[1:]), values.dtype)
    table[: len(values)] = values
    return table


def _not_scored(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return np.full(shape, np.nan if dtype.kind == "f" else IGNORED, dtype)


def places_of(draft: Draft) -> np.ndarray:
    """Where the texts of examples are among the segments of all rows, int32 [columns, size]; -1 for none."""
    packed = draft.packed
    of_text = np.empty(len(packed.items), np.int32)
    of_text[packed.items] = packed.rows * draft.layout.segments + packed.segments
    texts = draft.examples.texts[draft.chosen]
    places = np.full((draft.layout.size, texts.shape[1]), -1, np.int32)
    places[: len(texts)][texts >= 0] = of_text
    return np.ascontiguousarray(places.T)


def of_tokens(packed: PackedBatch, values: Sequence[np.ndarray]) -> np.ndarray:
    """Values [tokens] for each text as int32 [rows, length], with `IGNORED` at padding."""
    table = np.full(packed.input_ids.shape, IGNORED, np.int32)
    for item, row, start in zip(packed.items, packed.rows, packed.starts, strict=True):
        table[row, start : start + len(values[item])] = values[item]
    return table


def check_texts(rows: Rows, *names: str, optional: bool = False) -> Rows:
    """The rows without those that have something other than a text in one of these columns, or None if `optional`."""
    return rows.refuse(
        {
            index: f"its {name} is {record[name]!r:.60}, expected a text"
            for index, record in enumerate(rows.records)
            for name in names
            if not (isinstance(record[name], str) or (optional and record[name] is None))
        }
    )
