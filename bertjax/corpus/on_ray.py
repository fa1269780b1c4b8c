"""A job on a Ray cluster: actors on its hosts make the shards, one after another.

    from bertjax.corpus.on_ray import run_on_ray

    summary = run_on_ray(job)

Needs Ray (the extra `ray`), and a filesystem on which every host finds the inputs, the model and the folder of the
results by the same paths.

Rows that are in Ray Data need nothing of this; `map_batches` takes the class that computes tables, once in an actor:

    from bertjax.corpus import SentenceVectors, TableComputer

    dataset.map_batches(
        TableComputer,
        fn_constructor_kwargs={"work": SentenceVectors("MODEL"), "text": "body"},
        batch_format="pyarrow",
        batch_size=4096,
        concurrency=8,
        num_gpus=1,
    )
"""

import contextlib
import dataclasses
import os
import re
import signal
import socket
import textwrap
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from tqdm import tqdm

from bertjax.checks import check_count
from bertjax.corpus.job import Job, Plan
from bertjax.corpus.run import Summary, folder_of, plan, progress_bar, run, summarise
from bertjax.corpus.stages import Clock
from bertjax.corpus.work import Computation, Work
from bertjax.errors import BertjaxError, InputError, JobError, SourceError

# Shards that an actor has in hand: the next is read and tokenized while the device is at the end of the one before.
_IN_HAND = 2
# How often a shard is tried, where actors die of it.
_TRIES = 3
# For how many seconds a shard is asked for that somebody else is making: workers live on a little when the driver that
# started them is killed, and so do those of a host that Ray has lost.
_PATIENCE = 30
# Seconds in which a cluster has to answer.
_CONNECT_SECONDS = 10
# Seconds between looks at what goes on.
_PAUSE = 1.0


def run_on_ray(
    job: Job,
    *,
    actors: int | None = None,
    resources: Mapping[str, float] | None = None,
    stop: threading.Event | None = None,
    show_progress_bar: bool | None = False,
) -> Summary:
    """Makes all shards of a job by actors on a Ray cluster; the same files, and the same resume, as `run`.

    Ray is used as it is initialised; otherwise the cluster that RAY_ADDRESS or this host belongs to is joined, and
    where there is none, one is started on this host for as long as the job takes. This process starts no device. An
    actor that dies, or fails by more than the job's own errors, is replaced and its shards are made anew.

    Args:
        job: the job. If it has no plan yet, the first actor makes it, for as many devices as it has.
        actors: how many there are to be; default: as many as there is room for, on hosts without accelerators one
            each. More are started as soon as there is room.
        resources: what Ray reserves for each, by Ray's names, such as {"TPU": 4}; default: all TPUs of a host, or one
            GPU, or one CPU. An actor computes on all JAX devices that it then sees.
        stop: may be set by another thread or a signal: then the shards in hand are finished, and nothing else.
        show_progress_bar: None for on a terminal.

    Returns:
        What there is now, as from `run`; seconds, apart from "total", are sums over all actors, and `compiles` counts
        of each actor the most shapes that one shard needed. `is_done` is false after a stop, or where another worker,
        which is none of these actors, is still at work on a shard.

    Raises:
        SourceError: Ray is not installed, or can't be reached.
        InputError: no host has these resources.
        JobError: a shard could not be made in three tries; the others have been made.
        JobError, SourceError, InputError: see `run`.
    """
    if actors is not None:
        check_count("actors", actors)
    clock, stop = Clock(), stop or threading.Event()
    with clock("total"), _cluster() as ray:
        dispatcher = _Dispatcher(ray, job, stop, clock)
        with contextlib.closing(dispatcher):
            planned = dispatcher.start(*_choose(_hosts(ray), actors, resources))
            folder = folder_of(job)
            missing = [index for index in range(planned.num_shards) if not folder.is_done(index)]
            with progress_bar(planned, folder, show_progress_bar) as bar:
                dispatcher.make(missing, bar)
    summary = summarise(planned, folder, dispatcher, clock)
    if summary.is_done and (missing or not folder.has_summary()):
        folder.summarise(summary.to_json())
    return summary


@contextlib.contextmanager
def _cluster() -> Iterator[Any]:
    """Ray, connected; gives it up again if it was not before."""
    try:
        import ray
    except ImportError:
        raise SourceError("Ray is needed to run a job on a cluster: pip install 'bertjax[ray]'") from None
    if ray.is_initialized():
        yield ray
        return
    _check_reachable(os.environ.get("RAY_ADDRESS", ""))
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(include_dashboard=False)
    except ConnectionError as problem:
        raise SourceError(f"Ray can't be reached: {' '.join(str(problem).split())}") from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray puts its own there, which would end the process at once
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raises `SourceError` where nobody answers, which Ray itself tells after many minutes."""
    found = re.fullmatch(r"(?:ray://)?\[?([^\[\]/]+)\]?:(\d+)", address)
    if found is None:  # "auto", "local" or nothing
        return
    try:
        socket.create_connection((found[1], int(found[2])), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as problem:
        raise SourceError(f"Ray can't be reached at RAY_ADDRESS={address} ({problem})") from None


def _hosts(ray: Any) -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _choose(
    hosts: Sequence[Mapping[str, float]], actors: int | None, resources: Mapping[str, float] | None
) -> tuple[int, dict[str, float]]:
    """How many actors there are to be, and what each of them takes."""
    accelerators = [kind for kind in ("TPU", "GPU") if any(host.get(kind) for host in hosts)]
    if resources is not None:
        chosen = dict(resources)
    elif accelerators == ["GPU"]:
        chosen = {"GPU": 1}
    elif accelerators:
        chosen = {"TPU": min(host["TPU"] for host in hosts if host.get("TPU"))}
    else:
        return actors or max(1, sum(host.get("CPU", 0) >= 1 for host in hosts)), {"CPU": 1}
    room = sum(int(min(host.get(name, 0) // amount for name, amount in chosen.items())) for host in hosts)
    if room == 0:
        found = [{name: host.get(name, 0) for name in chosen} for host in hosts]
        raise InputError(f"no host of the cluster has {chosen}; they have {found}")
    return actors or room, chosen


class _LoadedOnce:
    """Work that is loaded, and looked at, once in a process, however many shards are made of it."""

    def __init__(self, work: Work):
        self._work, self._lock = work, threading.Lock()
        self._identity: dict[str, Any] | None = None
        self._computation: Computation | None = None
        self.text_columns = work.text_columns

    def identity(self) -> dict[str, Any]:
        """See `Work`."""
        with self._lock:
            self._identity = self._identity or self._work.identity()
            return self._identity

    def load(self, devices: Sequence[jax.Device] | None = None) -> Computation:
        """See `Work`."""
        with self._lock:
            self._computation = self._computation or self._work.load(devices)
            return self._computation


class _Worker:
    """What an actor does."""

    def __init__(self, job: Job):
        self._job = dataclasses.replace(job, work=_LoadedOnce(job.work))

    def plan(self) -> Plan:
        """The job's plan; one of the actors makes it, and the others wait for it."""
        return plan(self._job)

    def make(self, shard: int) -> tuple[Summary, bool]:
        """Makes a shard, unless somebody else is making it; and says whether it is there."""
        return run(self._job, [shard]), folder_of(self._job).is_done(shard)


class _Dispatcher:
    """Hands out shards to actors, a new one to whoever is free, and keeps the number of actors.

    Attributes:
        rows: how many rows have been computed.
    """

    def __init__(self, ray: Any, job: Job, stop: threading.Event, clock: Clock):
        self._ray, self._job, self._stop, self._clock = ray, job, stop, clock
        self._plan: Plan | None = None
        # What actors are at, by the call: the actor, and the shard or None for the plan.
        self._calls: dict[Any, tuple[Any, int | None]] = {}
        self._free: deque[Any] = deque()
        self._todo: deque[int] = deque()
        # Shards to be asked for again, each with the time of it; and since when others have been at them.
        self._later: deque[tuple[float, int]] = deque()
        self._left: dict[int, float] = {}
        self._tries: Counter[int | None] = Counter()
        self._hopeless: dict[int, str] = {}
        self._deaths = 0  # since an actor last came back from a shard
        self._compiled: dict[Any, int] = {}
        self.rows = 0

    @property
    def compiles(self) -> int:
        """Shapes that were compiled, as far as shards tell."""
        return sum(self._compiled.values())

    def start(self, actors: int, resources: dict[str, float]) -> Plan:
        """Starts actors, and gives the plan that the first of them has made or found."""
        self._actors = actors
        self._new = self._ray.remote(_Worker).options(
            num_cpus=resources.pop("CPU", 0),
            num_gpus=resources.pop("GPU", 0),
            resources=resources,
            max_concurrency=_IN_HAND,
            scheduling_strategy="SPREAD",
        )
        for _ in range(actors):
            self._start_one()
        while self._plan is None:
            self._step()
        return self._plan

    def make(self, shards: Iterable[int], bar: tqdm) -> None:
        """Makes shards, all that can be made."""
        self._todo.extend(shards)
        while self._makes() or (not self._stop.is_set() and (self._todo or self._later)):
            self._hand_out()
            before = self.rows
            self._step()
            bar.update(self.rows - before)
        if self._hopeless:
            shard, why = next(iter(self._hopeless.items()))
            raise JobError(
                f"{self._job.out}: {len(self._hopeless)} shards could not be made in {_TRIES} tries, the first of them "
                f"number {shard} ({why}); what is finished stays, and the same job goes on with what is not"
            )

    def close(self) -> None:
        """Ends the actors."""
        for actor in {actor for actor, _ in self._calls.values()} | set(self._free):
            self._ray.kill(actor)

    def _makes(self) -> bool:
        return any(shard is not None for _, shard in self._calls.values())

    def _start_one(self) -> None:
        actor = self._new.remote(self._job)
        self._calls[actor.plan.remote()] = (actor, None)

    def _hand_out(self) -> None:
        if self._stop.is_set():
            return
        while self._later and self._later[0][0] <= time.monotonic():
            self._todo.append(self._later.popleft()[1])
        while self._todo:
            places = self._places(self._todo[0])
            actor = next((each for each in self._free if self._free.count(each) >= places), None)
            if actor is None:
                return
            for _ in range(places):
                self._free.remove(actor)
            shard = self._todo.popleft()
            self._calls[actor.make.remote(shard)] = (actor, shard)

    def _places(self, shard: int) -> int:
        """How many places a shard takes of an actor: all, where one died of it, so that no other shard is blamed."""
        return _IN_HAND if self._tries[shard] else 1

    def _step(self) -> None:
        """Waits a little for a call to end, and takes what it brings."""
        if not self._calls:
            time.sleep(_PAUSE)
            return
        ended, _ = self._ray.wait(list(self._calls), timeout=_PAUSE)
        for call in ended:
            if call in self._calls:  # its actor may have been replaced since
                self._take(call)

    def _take(self, call: Any) -> None:
        actor, shard = self._calls[call]
        try:
            brought = self._ray.get(call)
        except self._ray.exceptions.RayTaskError as problem:
            if isinstance(problem.cause, BertjaxError):
                raise problem.cause from None
            self._replace(actor, f"{type(problem.cause).__name__}: {problem.cause}")
        except self._ray.exceptions.RayError as problem:
            self._replace(actor, str(problem))
        else:
            del self._calls[call]
            if shard is None:
                self._plan = brought
                self._free.extend([actor] * _IN_HAND)
            else:
                self._free.extend([actor] * self._places(shard))
                self._count(actor, shard, *brought)

    def _count(self, actor: Any, shard: int, summary: Summary, is_there: bool) -> None:
        self._deaths = 0
        self.rows += summary.rows_now
        self._compiled[actor] = max(self._compiled.get(actor, 0), summary.compiles)
        for stage, seconds in summary.seconds.items():
            if stage != "total":
                self._clock.seconds[stage] += seconds
        now = time.monotonic()
        if not is_there and now - self._left.setdefault(shard, now) < _PATIENCE:
            self._later.append((now + _PAUSE, shard))

    def _replace(self, actor: Any, why: str) -> None:
        """Puts a new actor in the place of one that died or is no good, and sees to what it had in hand."""
        self._ray.kill(actor)
        lost = [shard for other, shard in self._calls.values() if other is actor]
        self._calls = {call: (other, shard) for call, (other, shard) in self._calls.items() if other is not actor}
        self._free = deque(other for other in self._free if other is not actor)
        self._tries.update(lost)
        self._deaths += 1
        why = textwrap.shorten(why, 300)
        if self._deaths > _TRIES * self._actors:
            raise JobError(f"{self._job.out}: actors die before they have made anything ({why}); see the logs of Ray")
        for shard in lost:
            if shard is not None and self._tries[shard] >= _TRIES:
                self._hopeless[shard] = why
            elif shard is not None:
                self._later.append((time.monotonic() + _PAUSE, shard))
        self._start_one()
