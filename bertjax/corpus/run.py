"""Runs a job: plans it, or goes on with it, and makes the shards that are missing."""

import contextlib
import dataclasses
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
import pyarrow as pa
from tqdm import tqdm

from bertjax.background import ahead
from bertjax.checks import as_integer
from bertjax.corpus import manifest, stages
from bertjax.corpus.folder import Claim, JobFolder, writing
from bertjax.corpus.job import Job, Plan
from bertjax.corpus.output import NpyShard, ParquetShard, ShardFile, check_storable
from bertjax.corpus.planning import make_plan
from bertjax.corpus.stages import Batch, Clock, Progress
from bertjax.corpus.steps import Runner, Step
from bertjax.corpus.windows import Counts, nothing, spread
from bertjax.corpus.work import Computation, Work
from bertjax.engine import Window
from bertjax.errors import ConfigError, InputError

# How far a stage may be ahead of the next: enough that neither waits for the other, little enough for memory.
_BLOCKS_AHEAD = 4
_WINDOWS_AHEAD = 1
_STARTED_AHEAD = 1


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a job has made, and what this run of it did.

    Attributes:
        counts: of all shards that are there, whoever made them.
        shards: how many of them there are.
        num_shards: how many there are to be.
        rows_now: rows that this run computed.
        compiles: shapes that this run compiled.
        seconds: how long this run took, in all and by what: "total" and "load" of the model, then what each stage
            worked, which overlap: "read", "tokenize", "pack", "start" (of steps on the device), "wait" (for them),
            "write".
    """

    counts: Counts
    shards: int
    num_shards: int
    rows_now: int
    compiles: int
    seconds: dict[str, float]

    @property
    def is_done(self) -> bool:
        """Whether every shard is there."""
        return self.shards == self.num_shards

    def to_json(self) -> dict[str, Any]:
        """The summary as JSON."""
        counts = {**dataclasses.asdict(self.counts), "fill": round(self.counts.fill, 4)}
        seconds = {name: round(value, 3) for name, value in self.seconds.items()}
        return {
            **counts,
            "shards": self.num_shards,
            "last_run": {"rows": self.rows_now, "compiles": self.compiles, "seconds": seconds},
        }


def plan(job: Job, devices: Sequence[jax.Device] | None = None) -> Plan:
    """Plans a job, or finds its plan, and checks that the job is still the same.

    Args:
        job: the job.
        devices: what it will run on; default: all devices of this process. Steps are made for as many.

    Raises:
        JobError: the folder holds another job, or the inputs have changed; says in what.
        SourceError, InputError: see `bertjax.corpus.planning.make_plan`.
    """
    return _planned(job, Loader(job.work, devices))


def run(
    job: Job,
    shards: Iterable[int] | None = None,
    *,
    devices: Sequence[jax.Device] | None = None,
    stop: threading.Event | None = None,
    show_progress_bar: bool | None = False,
) -> Summary:
    """Makes shards of a job; those that are there, or that another worker is making, are left alone.

    Args:
        job: the job. If it has no plan yet, it gets one.
        shards: the numbers of the shards to make, from 0; default: all.
        devices: what to run on, whose rows are divided between them; default: all devices of this process.
        stop: may be set by another thread or a signal: then the shard in hand is finished, and nothing else.
        show_progress_bar: None for on a terminal.

    Returns:
        What there is now; `is_done` says whether the job is done, in which case the folder has its `_summary.json`.

    Raises:
        JobError, SourceError, InputError: see `plan`; or a row is bad, where that stops the job; or something can't be
            read or written. What was finished before stays, and the next run goes on from there.
    """
    clock = Clock()
    with clock("total"):
        loader = Loader(job.work, devices, clock)
        planned = _planned(job, loader)
        folder = folder_of(job)
        wanted = range(planned.num_shards) if shards is None else list(shards)
        for index in wanted:
            if as_integer(index) is None or not 0 <= index < planned.num_shards:
                raise InputError(f"shards has {index!r}, and the job has {planned.num_shards}, numbered from 0")
        missing = [index for index in wanted if not folder.is_done(index)]
        maker = _Maker(job, planned, folder, clock, stop or threading.Event())
        if missing:
            with progress_bar(planned, folder, show_progress_bar) as bar:
                maker.make(missing, loader.load().calibrated(planned.calibration), bar)
    summary = summarise(planned, folder, maker, clock)
    if summary.is_done and (missing or not folder.has_summary()):
        folder.summarise(summary.to_json())
    return summary


class Loader:
    """Loads work when it is first needed, once."""

    def __init__(self, work: Work, devices: Sequence[jax.Device] | None, clock: Clock | None = None):
        self._work, self._clock, self._loaded = work, clock or Clock(), None
        self.devices = list(devices or jax.local_devices())

    def load(self) -> Computation:
        """The loaded work."""
        if self._loaded is None:
            with self._clock("load"):
                self._loaded = self._work.load(self.devices)
        return self._loaded


def folder_of(job: Job) -> JobFolder:
    """The folder of a job's results."""
    return JobFolder(job.folder, f".{job.format}")


def _planned(job: Job, loader: Loader) -> Plan:
    folder = folder_of(job)
    folder.make()
    with folder.alone():
        found = manifest.load(folder, job)
        if found is None:
            found = make_plan(job, loader.load(), len(loader.devices))
            check_storable(schema(job, found, loader.load()), job.format)
            manifest.save(folder, job, found)
    return found


def schema(job: Job, plan: Plan, computation: Computation) -> pa.Schema:
    """The columns of a job's output. Raises `ConfigError` where two would have one name, or .npy can't hold them."""
    fields = list(computation.fields)
    if job.format == "npy":
        if len(fields) != 1 or not pa.types.is_fixed_size_list(fields[0].type):
            raise ConfigError(f"a .npy file holds vectors, and this makes {', '.join(field.name for field in fields)}")
        return pa.schema(fields)
    number = [] if job.id is not None else [pa.field("row", pa.int64())]
    names = [field.name for field in (*number, *plan.kept, *fields)]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"the output would have two columns {name!r}; rename the one in the inputs")
    return pa.schema([*number, *plan.kept, *fields])


class _Maker:
    """Makes shards, and counts what it does."""

    def __init__(self, job: Job, plan: Plan, folder: JobFolder, clock: Clock, stop: threading.Event):
        self.job, self.plan, self.folder, self.clock, self.stop = job, plan, folder, clock, stop
        self.rows = self.compiles = 0
        self._seen = Counts()

    def make(self, shards: Sequence[int], computation: Computation, bar: tqdm) -> None:
        """Makes shards that nobody else makes."""
        progress = Progress(self.stop)
        runner = Runner(computation.run)
        pieces = stages.read(self.plan, self.folder, shards, progress, self.clock)
        windows = stages.tokenize(ahead(pieces, _BLOCKS_AHEAD), computation, self.job, self.plan, progress, self.clock)
        started = stages.start(ahead(windows, _WINDOWS_AHEAD), runner, progress, self.clock)
        writer = _Writer(self, computation, progress)
        try:
            with contextlib.closing(ahead(started, _STARTED_AHEAD)) as batches:
                for batch, steps in batches:
                    if not progress.is_dropped(batch.claim):
                        window = self._finish(runner, batch, steps)
                        writer.add(batch, window)
                        self._show(bar, batch, window)
        finally:
            writer.abandon()
            progress.release()
            self.compiles = len(runner.shapes)

    def _finish(self, runner: Runner, batch: Batch, steps: list[Step]) -> Window | None:
        with self.clock("wait"):
            finished = runner.finish(steps)
        return None if batch.encoded.encoded is None else Window(batch.encoded.encoded, finished)

    def _show(self, bar: tqdm, batch: Batch, window: Window | None) -> None:
        rows = len(batch.encoded.block)
        self.rows += rows
        if window is not None:
            self._seen += Counts(tokens=window.num_tokens, positions=window.num_positions)
        rate = self._seen.tokens / max(bar.format_dict["elapsed"] or 0, 1e-9)
        bar.set_postfix_str(f"{rate:,.0f} tokens/s, {self._seen.fill:.1%} fill", refresh=False)
        bar.update(rows)


class _Writer:
    """Writes windows to the shards that they belong to."""

    def __init__(self, maker: _Maker, computation: Computation, progress: Progress):
        self._maker, self._computation, self._progress = maker, computation, progress
        self._schema = schema(maker.job, maker.plan, computation)
        self._file: ShardFile | None = None
        self._counts, self._bad = Counts(), []

    def add(self, batch: Batch, window: Window | None) -> None:
        """Adds a window; the last one of a shard completes it."""
        target = self._maker.folder.shard(batch.claim.index)
        with self._maker.clock("write"), writing(target):
            if self._file is None:
                self._file = self._open(batch.claim)
            self._file.add(self._columns(batch, window))
            positions = 0 if window is None else window.num_positions
            self._counts += dataclasses.replace(batch.encoded.counts, positions=positions)
            self._bad += batch.bad
            if batch.is_last:
                file, self._file = self._file, None
                file.close()
                self._maker.folder.publish(batch.claim, self._counts, self._bad)
                self._progress.end(batch.claim)
                self._counts, self._bad = Counts(), []

    def abandon(self) -> None:
        """Lets go of a file that will not be finished."""
        if self._file is not None:
            with contextlib.suppress(OSError, pa.ArrowException):
                self._file.close()

    def _open(self, claim: Claim) -> ShardFile:
        if self._maker.job.format == "npy":
            return NpyShard(claim.temporary, self._schema, len(self._maker.plan.shard(claim.index)))
        return ParquetShard(claim.temporary, self._schema)

    def _columns(self, batch: Batch, window: Window | None) -> list[pa.Array]:
        rows = len(batch.encoded.block)
        if window is None:
            made = [nothing(field.type, rows) for field in self._computation.fields]
        else:
            made = spread(self._computation.columns(window), batch.encoded.good, rows)
        if self._maker.job.format == "npy":
            return made
        numbers = [] if self._maker.job.id is not None else [pa.array(np.arange(batch.first, batch.first + rows))]
        return [*numbers, *batch.encoded.block.kept, *made]


def progress_bar(plan: Plan, folder: JobFolder, show: bool | None) -> tqdm:
    """A bar of a job's rows, at what is done already; None shows it on a terminal."""
    done = sum(len(plan.shard(index)) for index in range(plan.num_shards) if folder.is_done(index))
    disable = None if show is None else not show
    return tqdm(total=plan.num_rows, initial=done, unit="row", unit_scale=True, disable=disable)


def summarise(plan: Plan, folder: JobFolder, maker: Any, clock: Clock) -> Summary:
    """What there is of a job, and what `maker` did, who has `rows` and `compiles`."""
    done = [index for index in range(plan.num_shards) if folder.is_done(index)]
    return Summary(
        counts=sum((folder.counts(index) for index in done), Counts()),
        shards=len(done),
        num_shards=plan.num_shards,
        rows_now=maker.rows,
        compiles=maker.compiles,
        seconds=dict(clock.seconds),
    )
