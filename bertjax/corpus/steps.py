"""Steps of the device: started one after another, halved where memory runs out."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from bertjax.corpus.work import Computation
from bertjax.engine import Encoded, Window
from bertjax.errors import BertjaxError
from bertjax.packing import PackedBatch, Shapes, pack

# What the runtime's errors say where there was no room for a result or for what it takes to compute it.
_NO_ROOM = "RESOURCE_EXHAUSTED"

Step = tuple[PackedBatch, Any]


class DeviceMemoryError(BertjaxError, MemoryError):
    """A single row of tokens does not fit into the device's memory."""


def pack_all(computation: Computation, encoded: Encoded, shapes: Shapes) -> list[PackedBatch]:
    """The packed batches of some rows of tokens."""
    tokens = encoded.tokens
    return list(pack(tokens.input_ids, tokens.token_type_ids, shapes, computation.pad_token_id))


def computed(computation: Computation, encoded: Encoded, shapes: Shapes) -> Window:
    """Rows of tokens with what is computed of them."""
    runner = Runner(computation.run)
    return Window(encoded, runner.finish([runner.start(batch) for batch in pack_all(computation, encoded, shapes)]))


class Runner:
    """Runs packed batches; where the device has no room for one, it is divided, down to single rows.

    Results do not depend on it but for rounding.

    Args:
        run: starts the computation on a packed batch.
    """

    def __init__(self, run: Callable[[PackedBatch], Any]):
        self._run = run
        #: The shapes [rows, length] that were run; each was compiled once.
        self.shapes: set[tuple[int, ...]] = set()
        # By row length, more rows than there is room for.
        self._too_many: dict[int, int] = {}

    def start(self, batch: PackedBatch) -> Step:
        """Starts the computation on a batch; that there is no room may turn out now, or when it is waited for."""
        rows, length = batch.input_ids.shape
        if rows > 1 and rows >= self._too_many.get(length, rows + 1):
            return batch, None  # `finish` divides it
        try:
            result = self._run(batch)
        except Exception as problem:
            self._refuse_other(problem, batch)
            return batch, None
        self.shapes.add((rows, length))
        return batch, result

    def finish(self, steps: Iterable[Step]) -> list[Step]:
        """Waits for steps, in order; a step that had no room becomes two or more."""
        return [finished for step in steps for finished in self._finished(*step)]

    def _finished(self, batch: PackedBatch, result: Any) -> Iterator[Step]:
        if result is not None:
            try:
                yield batch, jax.block_until_ready(result)
                return
            except Exception as problem:
                self._refuse_other(problem, batch)
        for half in halves(batch):
            yield from self._finished(*self.start(half))

    def _refuse_other(self, problem: Exception, batch: PackedBatch) -> None:
        """Raises the problem unless it is that there is no room, and there can be less to find room for."""
        if _NO_ROOM not in str(problem):
            raise problem
        rows, length = batch.input_ids.shape
        if rows == 1:
            raise DeviceMemoryError(
                f"the device has no room for a single row of {length} tokens; use a smaller dtype, or a smaller "
                f"max_seq_length ({str(problem).splitlines()[0]})"
            ) from None
        self._too_many[length] = min(rows, self._too_many.get(length, rows))


def halves(batch: PackedBatch) -> list[PackedBatch]:
    """A packed batch as two, the first rows and the others."""
    middle = len(batch.input_ids) // 2
    return [_part(batch, 0, middle), _part(batch, middle, len(batch.input_ids))]


def _part(batch: PackedBatch, start: int, stop: int) -> PackedBatch:
    inside = (batch.rows >= start) & (batch.rows < stop)
    arrays = {name: np.asarray(array)[start:stop] for name, array in batch.inputs().items()}
    places = {name: getattr(batch, name)[inside] for name in ("items", "segments", "starts")}
    return dataclasses.replace(batch, **arrays, **places, rows=batch.rows[inside] - start)
