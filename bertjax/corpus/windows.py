"""From blocks of rows to windows: what is tokenized and packed together. numpy only, no device."""

import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa

from bertjax.corpus.rows import Block
from bertjax.corpus.work import Computation
from bertjax.engine import Encoded
from bertjax.errors import InputError, TokenizerError
from bertjax.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class Counts:
    """What went through, in numbers.

    Attributes:
        rows: how many rows, bad ones included.
        tokens: tokens that were computed, special ones included.
        positions: positions that were computed, padding included; `tokens / positions` is the fill.
        truncated: rows that were longer than the model takes, and lost their end.
        empty: rows whose text is empty; they have results like any other.
        bad: rows without results.
    """

    rows: int = 0
    tokens: int = 0
    positions: int = 0
    truncated: int = 0
    empty: int = 0
    bad: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*map(sum, zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    @property
    def fill(self) -> float:
        """The share of the computed positions that were no padding; 1 where there was none."""
        return self.tokens / self.positions if self.positions else 1.0


@dataclasses.dataclass(frozen=True)
class EncodedBlock:
    """A block with its rows of tokens.

    Attributes:
        block: the rows.
        good: int [good], the indices of the rows that are not bad; the items of `encoded`.
        encoded: their rows of tokens; None if there are none.
        bad: why a row is bad, by its index in the block.
    """

    block: Block
    good: np.ndarray
    encoded: Encoded | None
    bad: dict[int, str]

    @property
    def num_tokens(self) -> int:
        """How many tokens there are."""
        return 0 if self.encoded is None else sum(map(len, self.encoded.tokens.input_ids))

    @property
    def counts(self) -> Counts:
        """What the block counts for; positions are known only when it is packed."""
        items = self.encoded.items if self.encoded else []
        return Counts(
            rows=len(self.block),
            tokens=self.num_tokens,
            truncated=0 if self.encoded is None else len(np.unique(self.encoded.owners[self.encoded.tokens.truncated])),
            empty=sum(not any(item) if isinstance(item, tuple) else not item for item in items),
            bad=len(self.bad),
        )

    @classmethod
    def join(cls, parts: "list[EncodedBlock]") -> "EncodedBlock":
        """The rows of several, one after another."""
        firsts = np.cumsum([0, *(len(part.block) for part in parts)])
        encoded = [part.encoded for part in parts if part.encoded is not None]
        return cls(
            block=Block.join([part.block for part in parts]),
            good=np.concatenate([part.good + first for part, first in zip(parts, firsts, strict=False)]),
            encoded=Encoded.join(encoded) if encoded else None,
            bad={
                int(first) + row: why
                for part, first in zip(parts, firsts, strict=False)
                for row, why in part.bad.items()
            },
        )


def encode_good(computation: Computation, block: Block, first: int) -> EncodedBlock:
    """Tokenizes a block; a row that the work can't take, or finds no token in, is bad.

    Args:
        computation: the work.
        block: the rows.
        first: the number of the first, for messages.
    """
    bad = dict(block.bad)
    good = [index for index in range(len(block)) if index not in bad]
    encoded = None
    if good:
        try:
            encoded = computation.encode([block.items[index] for index in good], first)
        except (InputError, TokenizerError):
            good = [index for index in good if _takes(computation, block.items[index], first + index, index, bad)]
            encoded = computation.encode([block.items[index] for index in good], first) if good else None
    if encoded is not None and not all(map(len, encoded.tokens.input_ids)):
        encoded, kept = _without_empty_rows(encoded)
        bad |= {
            good[index]: "the tokenizer finds no token in the text, and adds none" for index in np.flatnonzero(~kept)
        }
        good = [good[index] for index in np.flatnonzero(kept)]
    return EncodedBlock(block, np.array(good, np.int64), encoded, bad)


def _takes(computation: Computation, item: Any, position: int, index: int, bad: dict[int, str]) -> bool:
    try:
        computation.encode([item], position)
    except (InputError, TokenizerError) as problem:
        bad[index] = str(problem)
        return False
    return True


def _without_empty_rows(encoded: Encoded) -> tuple[Encoded | None, np.ndarray]:
    """What is left without items that have a row of no tokens, and which items were kept, bool [items]."""
    tokens = encoded.tokens
    kept = np.ones(len(encoded.items), bool)
    kept[[owner for owner, ids in zip(encoded.owners, tokens.input_ids, strict=True) if not len(ids)]] = False
    if not kept.any():
        return None, kept
    rows = np.flatnonzero(kept[encoded.owners])
    left = Tokens(
        input_ids=[tokens.input_ids[row] for row in rows],
        token_type_ids=[tokens.token_type_ids[row] for row in rows],
        truncated=tokens.truncated[rows],
        pad_token_id=tokens.pad_token_id,
        alignments=None if tokens.alignments is None else [tokens.alignments[row] for row in rows],
    )
    items = [item for item, keep in zip(encoded.items, kept, strict=True) if keep]
    return Encoded(items, left, (np.cumsum(kept) - 1)[encoded.owners[rows]]), kept


def spread(columns: list[pa.Array], good: np.ndarray, rows: int) -> list[pa.Array]:
    """Columns with a value for each good row as columns with a value for each row, nothing for the others."""
    if len(good) == rows:
        return columns
    places = np.zeros(rows, np.int64)
    places[good] = np.arange(len(good))
    missing = np.ones(rows, bool)
    missing[good] = False
    return [_taken(column, places, missing) for column in columns]


def _taken(column: pa.Array, places: np.ndarray, missing: np.ndarray) -> pa.Array:
    if not pa.types.is_fixed_size_list(column.type):
        return column.take(pa.array(places, mask=missing))
    size = column.type.list_size
    elements = (places[:, None] * size + np.arange(size)).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(
        column.flatten().take(pa.array(elements, mask=missing.repeat(size))), type=column.type
    )


def nothing(kind: pa.DataType, rows: int) -> pa.Array:
    """A column of rows without a value: null, or a vector whose numbers are, as Parquet has no vectors that are null.

    pyarrow writes them, but in versions up to 25 can't read what it wrote, or refuses to write it.
    """
    if not pa.types.is_fixed_size_list(kind):
        return pa.nulls(rows, kind)
    return pa.FixedSizeListArray.from_arrays(pa.nulls(rows * kind.list_size, kind.value_type), type=kind)
