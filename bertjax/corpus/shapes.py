"""Which shapes a corpus is packed into, chosen by the lengths of its texts."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from bertjax.packing import Shapes, pack

#: The most shapes that a job compiles, unless memory runs out.
MAX_SHAPES = 8
# Row lengths are multiples of this, but for the longest that the model takes.
_GRAIN = 32
# What other lengths than the usual ones must save by the estimate. Measured on a CPU with all-MiniLM: on paragraphs,
# with rows of up to 512, an estimate of 4 % gave 5 %; on single sentences one of 1 % gave a loss.
_LEAST_GAIN = 0.02


@dataclasses.dataclass(frozen=True)
class JobShapes(Shapes):
    """Shapes of a job; see `Shapes`.

    Args:
        max_length: length in tokens of the longest text.
        step_tokens: how many tokens a full step holds.
        lengths: lengths of the rows, ascending, at most four; the last is `max_length`.
        devices: how many devices share the rows of a step.
    """

    lengths: tuple[int, ...] = ()
    devices: int = 1

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Lengths of the rows that texts are packed into, ascending."""
        return self.lengths

    @property
    def lone_lengths(self) -> tuple[int, ...]:
        """Lengths that a row may have where it is a step of its own: those of all rows, as nobody waits for one."""
        return self.lengths

    def row_counts(self, length: int) -> tuple[int, ...]:
        """How many rows of this length a step may have, ascending; each device gets as many."""
        full = max(1, self.step_tokens // length // self.devices)
        counts = [1, max(1, full // 4), full] if 3 * len(self.lengths) <= MAX_SHAPES else [1, full]
        return tuple(sorted({self.devices * count for count in counts}))

    def all(self) -> list[tuple[int, int]]:
        """Every shape [rows, length] that may come out, at most eight."""
        return [(count, length) for length in self.lengths for count in self.row_counts(length)]


def usual_shapes(usual: Shapes, devices: int) -> JobShapes:
    """The row lengths that are used where nothing is known of the texts."""
    return JobShapes(usual.max_length, usual.step_tokens * devices, usual.row_lengths, devices)


def choose_shapes(usual: Shapes, lengths: np.ndarray, hidden_size: int, devices: int) -> JobShapes:
    """The shapes that cost least for texts like these.

    What is computed grows with the positions, padding included, and attention with positions times row length: of a
    layer's 24 d^2 + 4 s d operations for a position, d the hidden size and s the length of the row. A step of its own
    costs as much as `pack` reckons with.

    Args:
        usual: the shapes of the model, which say the longest row and the tokens of a step.
        lengths: int [texts], the lengths in tokens of a sample of the texts.
        hidden_size: the model's.
        devices: how many devices share the rows of a step.
    """
    fixed, longest = usual_shapes(usual, devices), usual.max_length
    if not lengths.size:
        return fixed

    def shapes(*lengths: int) -> JobShapes:
        return dataclasses.replace(fixed, lengths=(*lengths, longest))

    # Only lengths below which there is a good part of the texts can pay.
    ends = np.quantile(lengths, [0.5, 0.75, 0.9, 0.97, 1.0])
    candidates = sorted({min(longest, _GRAIN * -(-int(end) // _GRAIN)) for end in ends} | {128})
    candidates = [each for each in candidates if each < longest]
    options = [fixed, *(shapes(*few) for many in (1, 2) for few in itertools.combinations(candidates, many))]
    best = min(options, key=lambda each: cost(each, lengths, hidden_size)[0])
    gain = 1 - cost(best, lengths, hidden_size)[0] / cost(fixed, lengths, hidden_size)[0]
    return best if gain > _LEAST_GAIN else fixed


def cost(shapes: Shapes, lengths: Sequence[int] | np.ndarray, hidden_size: int) -> tuple[float, float]:
    """What packing texts into these shapes costs, in positions of very short rows, and the fill."""
    rows = [np.zeros(length, np.int32) for length in lengths]
    found = [batch.input_ids.shape for batch in pack(rows, rows, shapes)]
    positions = sum(count * length for count, length in found)
    weighed = sum(count * length * (1 + length / (6 * hidden_size)) for count, length in found)
    return weighed + len(found) * shapes.step_tokens / 16, float(np.sum(lengths)) / positions
