"""The stages of a job, each in a thread of its own: read, tokenize and pack, start on the device."""

import contextlib
import dataclasses
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from bertjax.corpus.folder import Claim, JobFolder
from bertjax.corpus.job import Job, Plan
from bertjax.corpus.reader import RowReader
from bertjax.corpus.rows import BLOCK_ROWS, Block
from bertjax.corpus.steps import Runner, Step, pack_all
from bertjax.corpus.windows import EncodedBlock, encode_good
from bertjax.corpus.work import Computation
from bertjax.errors import InputError
from bertjax.packing import PackedBatch

#: Steps of a full window, which is what is packed together; see `bertjax.engine`.
WINDOW_STEPS = 32
_WINDOW_ROWS = 16384


class Clock:
    """Seconds that the stages work, apart from waiting for one another."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Counts the time of a block."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - begin


class Progress:
    """Which shards are under way, and which of them is still finished when the job is asked to stop.

    Args:
        stop: set when the job is to stop.
    """

    def __init__(self, stop: threading.Event):
        self._stop, self._lock = stop, threading.Lock()
        self._begun: list[Claim] = []
        self._last: Claim | None = None

    def begin(self, claim: Claim) -> bool:
        """Enters a shard; False if no more is to be begun."""
        with self._lock:
            self._begun.append(claim)  # also then, so that it is released
            return not self._stop.is_set()

    def is_dropped(self, claim: Claim) -> bool:
        """Whether a shard is not to be finished: the job stops, and there was an older one."""
        with self._lock:
            if self._stop.is_set() and self._last is None and self._begun:
                self._last = self._begun[0]
            return self._last is not None and claim is not self._last

    def end(self, claim: Claim) -> None:
        """Leaves a shard that is done."""
        with self._lock:
            if self._stop.is_set() and self._last is None:
                self._last = claim
            self._begun.remove(claim)
        claim.release()

    def release(self) -> None:
        """Gives up all shards that are not done."""
        for claim in self._begun:
            claim.release()


@dataclasses.dataclass(frozen=True)
class Piece:
    """Some consecutive rows of a shard.

    Attributes:
        claim: the shard.
        block: the rows.
        first: the number of the first, through all files.
        file: the index of their file.
        first_in_file: the number of the first in it.
        is_last: whether the shard ends here.
    """

    claim: Claim
    block: Block
    first: int
    file: int
    first_in_file: int
    is_last: bool


@dataclasses.dataclass(frozen=True)
class Batch:
    """A window of a shard, ready for the device.

    Attributes:
        claim: the shard.
        encoded: its rows, tokenized.
        batches: them, packed.
        bad: an account of each bad row.
        first: the number of the first row.
        is_last: whether the shard ends here.
    """

    claim: Claim
    encoded: EncodedBlock
    batches: list[PackedBatch]
    bad: list[dict[str, Any]]
    first: int
    is_last: bool


def read(plan: Plan, folder: JobFolder, shards: Iterable[int], progress: Progress, clock: Clock) -> Iterator[Piece]:
    """Claims shards, one after another, and reads their rows.

    Where rows are divided depends on the shard and the files, not on what was read before.
    """
    reader = RowReader(plan.files, plan.columns)
    for index in shards:
        claim = folder.claim(index)
        if claim is None:
            continue
        if not progress.begin(claim):
            return
        rows = plan.shard(index)
        if not rows:
            yield Piece(claim, plan.columns.no_rows(), 0, 0, 0, is_last=True)
        for start in range(rows.start, rows.stop, BLOCK_ROWS):
            first = start
            for file, begin, end in plan.pieces(range(start, min(start + BLOCK_ROWS, rows.stop))):
                if progress.is_dropped(claim):
                    return
                with clock("read"):
                    block = reader.read(file, begin, end)
                yield Piece(claim, block, first, file, begin, is_last=first + len(block) == rows.stop)
                first += len(block)


def tokenize(
    pieces: Iterator[Piece], computation: Computation, job: Job, plan: Plan, progress: Progress, clock: Clock
) -> Iterator[Batch]:
    """Tokenizes, and packs by windows, which begin anew with every shard."""
    parts: list[tuple[Piece, EncodedBlock]] = []
    budget = WINDOW_STEPS * plan.shapes.step_tokens
    for piece in pieces:
        if progress.is_dropped(piece.claim):
            parts = []
            continue
        with clock("tokenize"):
            encoded = encode_good(computation, piece.block, piece.first)
        if encoded.bad and job.on_bad == "stop":
            raise _bad_row(plan, piece, encoded)
        parts.append((piece, encoded))
        tokens = sum(encoded.num_tokens for _, encoded in parts)
        rows = sum(len(piece.block) for piece, _ in parts)
        if tokens >= budget or rows >= _WINDOW_ROWS or piece.is_last:
            with clock("pack"):
                batch = _window(parts, computation, plan)
            yield batch
            parts = []


def _bad_row(plan: Plan, piece: Piece, encoded: EncodedBlock) -> InputError:
    row, why = next(iter(sorted(encoded.bad.items())))
    return InputError(
        f"{plan.files[piece.file].path}: row {piece.first_in_file + row} (row {piece.first + row} of the job): {why}; "
        "on_bad='skip' (--on-bad skip) goes on without such rows"
    )


def _window(parts: list[tuple[Piece, EncodedBlock]], computation: Computation, plan: Plan) -> Batch:
    bad = [
        {
            "row": piece.first + row,
            "file": plan.files[piece.file].path,
            "row_in_file": piece.first_in_file + row,
            "reason": why,
        }
        for piece, encoded in parts
        for row, why in sorted(encoded.bad.items())
    ]
    joined = EncodedBlock.join([encoded for _, encoded in parts])
    batches = [] if joined.encoded is None else pack_all(computation, joined.encoded, plan.shapes)
    first, last = parts[0][0], parts[-1][0]
    return Batch(first.claim, joined, batches, bad, first.first, last.is_last)


def start(
    batches: Iterable[Batch], runner: Runner, progress: Progress, clock: Clock
) -> Iterator[tuple[Batch, list[Step]]]:
    """Starts the steps of windows on the device."""
    for batch in batches:
        if progress.is_dropped(batch.claim):
            continue
        with clock("start"):
            steps = [runner.start(each) for each in batch.batches]
        yield batch, steps
