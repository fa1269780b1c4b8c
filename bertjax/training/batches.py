"""Examples to batches: which are in which step, how many rows of what length they take, on which devices."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from bertjax.background import ahead
from bertjax.checks import check_count
from bertjax.errors import ConfigError
from bertjax.packing import pack_batch, rows_needed
from bertjax.sharding import batch_sharding
from bertjax.training.tasks.base import Draft, Examples, Layout, LearningTask

# Steps whose texts are packed, to see how many rows they take.
_SAMPLE = 200
# Parts of these steps that a count of rows is to be enough for. Each count is compiled, so one is left out where the
# next has hardly more.
_QUANTILES = (0.5, 0.95, 1.0)
_HARDLY = 1.1
_LEAST_LENGTH, _LENGTHS = 64, 16
# Batches that are made before they are needed.
_AHEAD = 3
# What random numbers are drawn for; each has its own.
_ORDER, _WORDS, _EVALUATION = range(3)


@dataclasses.dataclass(frozen=True)
class MadeBatch:
    """A batch on its devices, and what it holds: examples, and tokens without padding."""

    arrays: dict[str, jax.Array]
    examples: int
    tokens: int
    positions: int


class Batches:
    """A run's batches: batch k is a function of k, the seed and the examples, so a run can go on at any step.

    Args:
        task: what is learnt.
        examples: what it is learnt from.
        batch_size: how many examples a step learns from.
        seed: of the order, and of what is masked.
        accumulate: into how many parts a batch is divided.
        row_length: length of the rows in tokens; default: the longest text's, and at least 64.
        mesh: devices that divide the rows; default: one device.

    Raises:
        ConfigError: a size is not usable.
    """

    def __init__(
        self,
        task: LearningTask,
        examples: Examples,
        *,
        batch_size: int,
        seed: int = 0,
        accumulate: int = 1,
        row_length: int | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ):
        check_count("batch_size", batch_size, error=ConfigError)
        check_count("accumulate", accumulate, error=ConfigError)
        if batch_size % accumulate:
            raise ConfigError(f"batch_size is {batch_size}, which can't be divided into {accumulate} parts")
        self.task, self.examples = task, examples
        self.batch_size, self._seed, self._mesh = batch_size, seed, mesh
        longest = int(examples.lengths.max(initial=1))
        length = max(_LEAST_LENGTH, -(-longest // _LENGTHS) * _LENGTHS) if row_length is None else row_length
        length = min(length, task.max_length) if row_length is None else length
        if length < longest:
            raise ConfigError(f"row_length is {length}, and the longest text has {longest} tokens")
        self.layout = Layout(length, (), batch_size // accumulate, accumulate)
        self.layout = dataclasses.replace(self.layout, row_counts=self._row_counts())

    @property
    def steps_per_epoch(self) -> int:
        """How many batches it takes to see every example once; the last one may be smaller."""
        return -(-len(self.examples) // self.batch_size)

    def from_step(self, first: int, stop: int) -> Iterator[MadeBatch]:
        """The batches of some steps, made and sent to their devices in the background."""
        return ahead((self.make(step) for step in range(first, stop)), _AHEAD)

    def make(self, step: int) -> MadeBatch:
        """The batch of a step, counted from 0."""
        rng = np.random.default_rng([self._seed, _WORDS, step])
        return self._send(self._parts(self._chosen(step)), rng)

    def all(self) -> Iterator[MadeBatch]:
        """Batches that hold every example once, in order; each time the same ones."""
        numbers = np.arange(len(self.examples))
        made = (
            self._send(
                self._parts(numbers[first : first + self.batch_size]), np.random.default_rng([_EVALUATION, first])
            )
            for first in range(0, len(numbers), self.batch_size)
        )
        return ahead(made, _AHEAD)

    def _chosen(self, step: int) -> np.ndarray:
        epoch, place = divmod(step, self.steps_per_epoch)
        order = _order(self._seed, epoch, len(self.examples))
        return order[place * self.batch_size : (place + 1) * self.batch_size]

    def _parts(self, chosen: np.ndarray) -> list[np.ndarray]:
        size = self.layout.size
        return [chosen[part * size : (part + 1) * size] for part in range(self.layout.parts)]

    def _texts(self, chosen: np.ndarray) -> np.ndarray:
        texts = self.examples.texts[chosen]
        return texts[texts >= 0]

    def _row_counts(self) -> tuple[int, ...]:
        """Counts of rows that are enough for most batches, and one that is enough for all."""
        size, columns = self.layout.size, self.examples.texts.shape[1]
        most = self._divisible(size * columns)
        if self.task.alone:
            return (most,)
        lengths = self.examples.lengths
        sample = itertools.islice(range(self.steps_per_epoch), _SAMPLE)
        parts = (part for step in sample for part in self._parts(self._chosen(step)))
        needed = [self._needed(lengths[self._texts(part)]) for part in parts]
        counts = [int(np.quantile(needed, part, method="higher")) for part in _QUANTILES]
        found = sorted({*map(self._divisible, counts), most})
        return (*(count for count, after in itertools.pairwise(found) if after > _HARDLY * count), most)

    def _needed(self, lengths: np.ndarray) -> int:
        return rows_needed(lengths, self.layout.length)

    def _divisible(self, rows: int) -> int:
        """As many rows, or a few more that devices can share."""
        devices = 1 if self._mesh is None else self._mesh.size
        return max(1, -(-rows // devices)) * devices

    def _send(self, parts: Sequence[np.ndarray], rng: np.random.Generator) -> MadeBatch:
        lengths = self.examples.lengths
        texts = [self._texts(part) for part in parts]
        needed = max(len(each) if self.task.alone else self._needed(lengths[each]) for each in texts)
        rows = next(count for count in self.layout.row_counts if count >= needed)
        made = [self._part(part, each, rows, rng) for part, each in zip(parts, texts, strict=True)]
        arrays = (
            made[0] if self.layout.parts == 1 else {name: np.stack([one[name] for one in made]) for name in made[0]}
        )
        tokens = int(sum(lengths[each].sum() for each in texts))
        held = sum(map(len, parts))
        return MadeBatch(self._place(arrays), held, tokens, rows * self.layout.length * self.layout.parts)

    def _part(
        self, chosen: np.ndarray, texts: np.ndarray, rows: int, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        ids, made = self.task.prepare(rng, self.examples, texts)
        types = [self.examples.token_type_ids[text] for text in texts]
        shape, pad_id = (rows, self.layout.length), self.task.tokenizer.pad_token_id
        packed = pack_batch(ids, types, shape, pad_id, alone=self.task.alone)
        draft = Draft(self.examples, chosen, self.layout, texts, made, packed)
        return packed.inputs() | self.task.labels(draft)

    def _place(self, arrays: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        if self._mesh is None:
            return jax.device_put(arrays)
        divided = batch_sharding(self._mesh, parts=self.layout.parts > 1)
        everywhere = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec())
        # The places of an example's texts, and its labels, are on every device: they are no row's.
        shardings = {name: everywhere if name in self.task.of_examples else divided for name in arrays}
        return jax.device_put(arrays, shardings)


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of the examples in an epoch."""
    return np.random.default_rng([seed, _ORDER, epoch]).permutation(count)
