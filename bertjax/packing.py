"""Ragged token lists to a few fixed shapes.

Several texts share a row and are told apart by segment ids, so that hardly any position is padding and a corpus of any
mixture of lengths compiles a handful of shapes. numpy only.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

#: Row lengths below the model's own limit. Short texts go into short rows because attention costs tokens times row
#: length; two lengths catch nearly all of that, and each one more would be more shapes to compile.
SHORT_ROW = 128
#: Length of the single row that serves a lone short text, where latency counts.
SINGLE_ROW = 32
# Shortest text that is worth keeping a row open for: [CLS] and [SEP].
_SHORTEST = 2


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The fixed shapes [rows, length] that texts are packed into.

    Args:
        max_length: length in tokens of the longest text.
        step_tokens: how many tokens a full step holds.
    """

    max_length: int
    step_tokens: int

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Lengths of the rows that texts are packed into, ascending."""
        return (SHORT_ROW, self.max_length) if self.max_length > SHORT_ROW else (self.max_length,)

    def row_counts(self, length: int) -> tuple[int, ...]:
        """How many rows of this length a step may have, ascending."""
        full = max(1, self.step_tokens // length)
        return tuple(sorted({1, max(1, full // 4), full}))

    def all(self) -> list[tuple[int, int]]:
        """Every shape [rows, length] that may come out; the bound on the number of compilations."""
        shapes = [(rows, length) for length in self.row_lengths for rows in self.row_counts(length)]
        return ([(1, SINGLE_ROW)] if self.row_lengths[0] > SINGLE_ROW else []) + shapes


def max_segments(length: int) -> int:
    """How many texts a row of this length holds at most.

    Vectors are computed for that many segments of every row, used or not, so it is bounded. One per eight tokens
    wastes little on short texts and is not reached by longer ones.
    """
    return max(1, length // 8)


@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """One step's input. Arrays are int32 [rows, length]; padding has segment id 0.

    Attributes:
        input_ids: token ids, padded with `pad_id`.
        token_type_ids: token types.
        position_ids: positions, counted from the start of each text.
        segment_ids: 1, 2, ... for the texts of a row; 0 for padding.
        items: int [texts], which text of the window each one is.
        rows: int [texts], the row it is in.
        segments: int [texts], its segment id minus one.
        starts: int [texts], the column of its first token.
    """

    input_ids: np.ndarray
    token_type_ids: np.ndarray
    position_ids: np.ndarray
    segment_ids: np.ndarray
    items: np.ndarray
    rows: np.ndarray
    segments: np.ndarray
    starts: np.ndarray

    def inputs(self) -> dict[str, np.ndarray]:
        """A model's arguments by their names: input_ids, token_type_ids, position_ids, segment_ids."""
        names = ("input_ids", "token_type_ids", "position_ids", "segment_ids")
        return {name: getattr(self, name) for name in names}

    def owners(self, padding: int) -> np.ndarray:
        """Which text each position belongs to, int32 [rows, length]: its index in `items`, or `padding` for none."""
        table = np.full((len(self.segment_ids), self.segment_ids.max() + 1), padding, np.int32)
        table[self.rows, self.segments + 1] = np.arange(len(self.items))
        return np.take_along_axis(table, self.segment_ids, axis=1)


@dataclasses.dataclass
class _Row:
    length: int
    items: list[int] = dataclasses.field(default_factory=list)


def pack(
    input_ids: Sequence[np.ndarray],
    token_type_ids: Sequence[np.ndarray],
    shapes: Shapes,
    pad_id: int = 0,
) -> Iterator[PackedBatch]:
    """Packs texts into fixed shapes; every text is in exactly one of the batches.

    Args:
        input_ids: one int array per text, at least one and at most `shapes.max_length` tokens long.
        token_type_ids: the same shapes.
        shapes: the shapes to use.
        pad_id: id to pad with.

    Raises:
        ValueError: a text has no tokens, or more than `shapes.max_length`.
    """
    lengths = np.array([len(ids) for ids in input_ids], np.int64)
    if lengths.size and not 1 <= lengths.min() <= lengths.max() <= shapes.max_length:
        raise ValueError(f"texts must be 1 to {shapes.max_length} tokens long, found {lengths.min()}..{lengths.max()}")
    rows = _best_fit(lengths, shapes.row_lengths)
    for length in shapes.row_lengths:
        of_length = [row for row in rows if row.length == length]
        start = 0
        for count in _step_counts(len(of_length), shapes.row_counts(length)):
            step = of_length[start : start + count]
            start += count
            used = sum(int(lengths[item]) for item in step[0].items)
            single = count == 1 and used <= SINGLE_ROW < length and len(step[0].items) <= max_segments(SINGLE_ROW)
            shape = (count, SINGLE_ROW if single else length)
            yield _fill(step, shape, input_ids, token_type_ids, pad_id)


def _best_fit(lengths: np.ndarray, row_lengths: Sequence[int]) -> list[_Row]:
    """Best-fit decreasing: each text, longest first, goes to the row that it fills most tightly.

    Rows are kept in stacks by free space, with the non-empty stacks as bits of an integer, so that the tightest row is
    the lowest bit at or above the text's length: constant time per text.
    """
    rows: list[_Row] = []
    stacks: list[list[_Row]] = [[] for _ in range(max(row_lengths) + 1)]
    open_bits = 0
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        fitting = open_bits >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            row = stacks[free].pop()
            if not stacks[free]:
                open_bits &= ~(1 << free)
        else:
            free = next(candidate for candidate in row_lengths if candidate >= length)
            row = _Row(free)
            rows.append(row)
        row.items.append(item)
        free -= length
        if free >= _SHORTEST and len(row.items) < max_segments(row.length):
            stacks[free].append(row)
            open_bits |= 1 << free
    return rows


def _step_counts(rows: int, counts: Sequence[int]) -> Iterator[int]:
    """Divides a number of rows into steps: full ones, then the smallest that are not mostly empty."""
    while rows > 0:
        enough = [count for count in counts if count >= rows]
        below = [count for count in counts if count <= rows]
        # Half-empty is the limit: running a large step for few rows costs more than running two small ones.
        count = enough[0] if enough and (not below or 2 * rows > enough[0]) else below[-1]
        yield count
        rows -= count


def _fill(
    rows: Sequence[_Row],
    shape: tuple[int, int],
    input_ids: Sequence[np.ndarray],
    token_type_ids: Sequence[np.ndarray],
    pad_id: int,
) -> PackedBatch:
    items = np.array([item for row in rows for item in row.items], np.int64)
    row_of = np.repeat(np.arange(len(rows)), [len(row.items) for row in rows])
    segments = np.concatenate([np.arange(len(row.items)) for row in rows])
    lengths = np.array([len(input_ids[item]) for item in items], np.int64)
    # Where each text begins in its row: the running total of the lengths, less the total at the row's own start.
    ends = np.cumsum(lengths)
    begins = ends - lengths
    starts = begins - begins[segments == 0][row_of]
    within = np.arange(int(ends[-1])) - np.repeat(begins, lengths)
    where = np.repeat(row_of * shape[1] + starts, lengths) + within

    def scatter(values: np.ndarray, fill: int) -> np.ndarray:
        flat = np.full(shape[0] * shape[1], fill, np.int32)
        flat[where] = values
        return flat.reshape(shape)

    return PackedBatch(
        input_ids=scatter(np.concatenate([input_ids[item] for item in items]), pad_id),
        token_type_ids=scatter(np.concatenate([token_type_ids[item] for item in items]), 0),
        position_ids=scatter(within, 0),
        segment_ids=scatter(np.repeat(segments + 1, lengths), 0),
        items=items,
        rows=row_of,
        segments=segments,
        starts=starts,
    )
