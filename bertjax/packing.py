"""Ragged token lists to a few fixed shapes.

Several texts share a row and are told apart by segment ids, so that hardly any position is padding and a corpus of any
mixture of lengths compiles a handful of shapes. numpy only.
"""

import collections
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

#: Row lengths below the model's own limit. Short texts go into short rows because attention costs tokens times row
#: length; two lengths catch nearly all of that, and each one more would be more shapes to compile.
SHORT_ROW = 128
# Lengths that a lone row is cut down to: there latency counts, and what is computed of padding is lost.
_LONE_ROWS = (16, 32, 64, SHORT_ROW)
# What starting a step costs, as a part of what a full one does. Measured on a CPU with a small model: 30 to 120 tokens
# of 2048.
_START_COST = 1 / 16
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

    @property
    def lone_lengths(self) -> tuple[int, ...]:
        """Lengths that a row may have where it is a step of its own, ascending; at most five."""
        shorter = [length for length in _LONE_ROWS if length < self.max_length]
        if self.max_length > 2 * SHORT_ROW:
            # The gap above is the wider one then; the shortest, which saves least, makes room for a length within it.
            between = 16 * round((SHORT_ROW * self.max_length) ** 0.5 / 16)
            shorter = [*shorter[1:], between]
        return (*shorter, self.max_length)

    def row_counts(self, length: int) -> tuple[int, ...]:
        """How many rows of this length a step may have, ascending."""
        full = max(1, self.step_tokens // length)
        # Of long rows a step has few to begin with.
        part = max(1, full // 4) if length == self.row_lengths[0] else 1
        return tuple(sorted({1, part, full}))

    def all(self) -> list[tuple[int, int]]:
        """Every shape [rows, length] that may come out, at most eight; the bound on the number of compilations."""
        several = [(rows, length) for length in self.row_lengths for rows in self.row_counts(length) if rows > 1]
        return [(1, length) for length in self.lone_lengths] + several


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
        for count in _step_counts(len(of_length), length, shapes):
            step = of_length[start : start + count]
            start += count
            shape = (count, _lone_length(step[0], lengths, shapes) if count == 1 else length)
            yield _fill(step, shape, input_ids, token_type_ids, pad_id)


def rows_needed(lengths: np.ndarray, row_length: int) -> int:
    """How many rows of this length texts of these lengths are packed into."""
    return len(_best_fit(lengths, (row_length,)))


def pack_batch(
    input_ids: Sequence[np.ndarray],
    token_type_ids: Sequence[np.ndarray],
    shape: tuple[int, int],
    pad_id: int = 0,
    *,
    alone: bool = False,
) -> PackedBatch:
    """Packs texts into one batch of a given shape, rows that are not needed included.

    Args:
        input_ids: one int array per text, at least one token long.
        token_type_ids: the same shapes.
        shape: [rows, length].
        pad_id: id to pad with.
        alone: each text has a row of its own: text i has row i.

    Raises:
        ValueError: they do not fit.
    """
    lengths = np.array([len(ids) for ids in input_ids], np.int64)
    own = [_Row(shape[1], [item]) for item in range(len(lengths))]
    rows = own if alone else _best_fit(lengths, (shape[1],))
    if len(rows) > shape[0] or (lengths.size and lengths.max() > shape[1]):
        raise ValueError(f"{len(rows)} rows of up to {lengths.max()} tokens do not fit into {shape}")
    return _fill(rows, shape, input_ids, token_type_ids, pad_id)


def _lone_length(row: _Row, lengths: np.ndarray, shapes: Shapes) -> int:
    """The least length that a row may have where it is a step of its own."""
    used = int(lengths[row.items].sum())
    return next(n for n in shapes.lone_lengths if n >= used and (max_segments(n) >= len(row.items) or n >= row.length))


def _best_fit(lengths: np.ndarray, row_lengths: Sequence[int]) -> list[_Row]:
    """Best-fit decreasing: each text, longest first, goes to the row that it fills most tightly.

    Rows are kept in stacks by free space, with the non-empty stacks as bits of an integer, so that the tightest row is
    the lowest bit at or above the text's length: constant time per text.
    """
    rows: list[_Row] = []
    stacks: dict[int, list[_Row]] = collections.defaultdict(list)
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


def _step_counts(rows: int, length: int, shapes: Shapes) -> Iterator[int]:
    """Divides a number of rows into steps, each of the count that costs least for a row that it holds."""
    start = _START_COST * shapes.step_tokens
    while rows > 0:
        count = min(shapes.row_counts(length), key=lambda count: (start + count * length) / min(count, rows))
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
    counts = np.array([len(row.items) for row in rows], np.int64)
    row_of = np.repeat(np.arange(len(rows)), counts)
    segments = np.arange(len(items)) - np.repeat(np.cumsum(counts) - counts, counts)
    lengths = np.array([len(input_ids[item]) for item in items], np.int64)
    # Where each text begins in its row: the running total of the lengths, less the total at the row's own start.
    ends = np.cumsum(lengths)
    begins = ends - lengths
    starts = begins - begins[segments == 0][row_of]
    within = np.arange(lengths.sum()) - np.repeat(begins, lengths)
    where = np.repeat(row_of * shape[1] + starts, lengths) + within

    def joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([arrays[item] for item in items]) if len(items) else np.zeros(0, np.int32)

    tokens = np.zeros((4, shape[0] * shape[1]), np.int32)
    tokens[0] = pad_id
    tokens[:, where] = joined(input_ids), joined(token_type_ids), within, np.repeat(segments + 1, lengths)
    ids, types, positions, numbers = tokens.reshape(4, *shape)
    return PackedBatch(
        input_ids=ids,
        token_type_ids=types,
        position_ids=positions,
        segment_ids=numbers,
        items=items,
        rows=row_of,
        segments=segments,
        starts=starts,
    )
