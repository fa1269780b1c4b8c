"""A run's checkpoints: the latest few and the best.

    with Checkpoints("run/checkpoints", keep=2, best="accuracy") as checkpoints:
        state = checkpoints.restore(state) or state
        for batch in batches:
            state, metrics = step(state, batch)
            ...
            checkpoints.save(state, {"accuracy": accuracy})

A checkpoint appears by the renaming of its folder, so it is complete or absent. What is damaged later is found by
digests of its arrays.
"""

import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import jax

from bertjax.checks import check_count
from bertjax.errors import CheckpointError, InputError, SourceError
from bertjax.training import digests
from bertjax.training.digests import DamagedError
from bertjax.training.state import TrainState

logger = logging.getLogger(__name__)


class Checkpoints:
    """A run's checkpoints: the latest few and the best, written in the background by Orbax.

    One process has a folder at a time. A context manager: leaving it waits for the save in hand.

    Args:
        folder: the folder, which is made if need be.
        keep: how many of the latest stay.
        best: the metric whose best checkpoint stays too; the first of equals. NaN is the worst.
        greater_is_better: whether the best is the greatest.

    Attributes:
        failed_saves: how many saves have failed.

    Raises:
        SourceError: another process has the folder, or it can't be written.
        InputError: `keep` is not a positive integer.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2, best: str | None = None, greater_is_better: bool = True):
        from bertjax.training.store import Store  # imports Orbax

        self._keep, self._best, self._sign = check_count("keep", keep), best, 1 if greater_is_better else -1
        self.failed_saves = 0
        self._saving: int | None = None
        self._failure: str | None = None
        self._store = Store(Path(os.path.abspath(folder)), self._stay)
        self._closed = False
        self._metrics = {step: self._metrics_of(step) or {} for step in self._store.steps()}

    def save(self, state: TrainState, metrics: Mapping[str, float] | None = None) -> None:
        """Starts to save a state, and returns when it is copied off the devices: the next step may take its memory.

        A save that fails does not stop the run: it is logged with the reason, and what there was before it stays.
        A state that is there already is not written again. Waits for the save before this one.

        Args:
            state: the state; its step names the checkpoint.
            metrics: what was measured of it.

        Raises:
            InputError: the metric that tells the best is not among the metrics; or the folder holds a later step, or
                another state of this one.
        """
        self._settle()
        numbers = {name: float(value) for name, value in (metrics or {}).items()}
        if numbers and self._best not in (None, *numbers):
            raise InputError(f"metrics has no {self._best!r}, which tells the best, only {', '.join(sorted(numbers))}")
        step, leaves = int(state.step), digests.named(state)
        arrays = {name: digests.plain(leaf) for name, leaf in leaves.items()}
        found = {name: digests.digest(array) for name, array in arrays.items()}
        contents = {"arrays": digests.forms(leaves), "digests": found, "metrics": numbers}
        try:
            if self._has(step, found):
                return
            self._metrics[step], self._saving = numbers, step
            self._store.start(step, arrays, contents)
        except OSError as problem:  # SourceError is one
            self._failed(step, problem)

    def restore(self, like: TrainState) -> TrainState | None:
        """The latest state that can be read whole, or None if there is none at all.

        A checkpoint that is damaged is logged with the reason, and the one before it taken; it is then set aside,
        under a name that ends in `.damaged`.

        Args:
            like: a state, or a tree of `jax.ShapeDtypeStruct`: what is expected, and by the shardings where it is to
                lie; on however many devices it was before.

        Raises:
            CheckpointError: the checkpoint is of another model or optimiser, in structure, shapes or dtypes; or there
                are checkpoints and none can be read.
            SourceError: a damaged one can't be set aside.
        """
        self._settle()
        return self._restore_first(self._store.steps()[::-1], like)

    def restore_best(self, like: TrainState) -> TrainState | None:
        """The state with the best metric, or None if none has that metric; otherwise as `restore`."""
        self._settle()
        found = {step: self._metrics_of(step) for step in self._store.steps()}
        # What can't be read may be the best, and is tried first, so that it is told of.
        ranks = {step: math.inf if metrics is None else self._score(metrics) for step, metrics in found.items()}
        steps = [step for step, rank in ranks.items() if rank is not None]
        return self._restore_first(sorted(steps, key=lambda step: (-ranks[step], step)), like)

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint, or None; one that is being saved counts."""
        return self._best_of(self._steps())

    @property
    def best_metrics(self) -> dict[str, float] | None:
        """The metrics of the best checkpoint, or None; one that is being saved counts."""
        step = self.best_step
        return None if step is None else dict(self._metrics[step])

    @property
    def latest_step(self) -> int | None:
        """The step of the latest checkpoint, or None; one that is being saved counts."""
        return max(self._steps(), default=None)

    def wait(self) -> None:
        """Waits until the save in hand is finished. Raises `SourceError`, once, if the last one failed."""
        self._settle()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise SourceError(failure)

    def close(self) -> None:
        """Waits as `wait` does, and lets go of the folder. Raises `SourceError` if the last save failed."""
        if self._closed:
            return
        try:
            self.wait()
        finally:
            self._closed = True
            self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, problem: BaseException | None, traceback: TracebackType | None) -> None:
        if kind is not None and not self._closed:
            self._settle()
            self._failure = None  # it was logged, and is not what ends the run
        self.close()

    def _settle(self) -> None:
        """Waits for the save in hand, and takes note of how it ended."""
        if self._closed:
            raise InputError(f"{self._store.folder}: these checkpoints are closed; open them again")
        step, self._saving = self._saving, None
        if step is None:
            return
        try:
            self._store.wait()
            self._failure = None
        except SourceError as problem:
            self._failed(step, problem)

    def _failed(self, step: int, why: OSError) -> None:
        """Takes note of a save that failed, and removes what there is of it."""
        self._saving = self._failure = None
        path = self._store.path(step)
        if os.path.exists(path):  # unlike the path's own, it does not fail on a disk that does
            logger.warning("%s: is saved, but an older checkpoint can't be removed (%s)", path, why)
            return
        self._failure = f"{path}: can't be written ({why}); what was saved before it stays"
        self.failed_saves += 1
        self._metrics.pop(step, None)
        logger.warning("%s", self._failure)
        self._store.sweep()

    def _has(self, step: int, found: Mapping[str, int]) -> bool:
        """Whether a state is there. Raises `InputError` if the folder is that of another run."""
        latest = max(self._store.steps(), default=-1)
        if latest < step:
            return False
        if latest == step and self._store.contents(step)["digests"] == found:
            return True
        raise InputError(
            f"{self._store.folder}: holds step {latest}, and this is another state, of step {step}; restore that one "
            "to go on with it, or give another folder"
        )

    def _steps(self) -> list[int]:
        return [*self._store.steps(), *([] if self._saving is None else [self._saving])]

    def _metrics_of(self, step: int) -> dict[str, float] | None:
        try:
            return self._store.contents(step)["metrics"]
        except DamagedError:
            return None

    def _score(self, metrics: Mapping[str, float]) -> float | None:
        """How good a checkpoint is; None if its metrics do not say."""
        if self._best not in metrics:
            return None
        value = self._sign * metrics[self._best]
        return -math.inf if math.isnan(value) else value

    def _best_of(self, steps: Iterable[int]) -> int | None:
        scores = {step: self._score(self._metrics.get(step, {})) for step in steps}
        known = {step: score for step, score in scores.items() if score is not None}
        return min(known, key=lambda step: (-known[step], step), default=None)

    def _stay(self, steps: Sequence[int]) -> list[bool]:
        """Which checkpoints are not to be removed; one that is being saved is among them."""
        kept = {*sorted(steps)[-self._keep :], self._best_of(steps)}
        return [step in kept for step in steps]

    def _restore_first(self, steps: Sequence[int], like: TrainState) -> TrainState | None:
        """The first that can be read; those before it are set aside."""
        damaged: dict[int, DamagedError] = {}
        for step in steps:
            try:
                state = self._restore(step, like)
            except DamagedError as problem:
                logger.warning("step %d is left out: %s", step, problem)
                damaged[step] = problem
            else:
                for each in damaged:
                    self._store.set_aside(each)
                return state
        if not damaged:
            return None
        raise CheckpointError(
            f"{self._store.folder}: no checkpoint can be read ({'; '.join(map(str, damaged.values()))}); give another "
            "folder to start anew"
        )

    def _restore(self, step: int, like: TrainState) -> TrainState:
        contents, leaves = self._store.contents(step), digests.named(like)
        differs = digests.difference(contents["arrays"], digests.forms(leaves))
        if differs:
            raise CheckpointError(
                f"{self._store.path(step)}: is of another model or optimiser: {differs}; give the options that it was "
                "made with, or another folder"
            )
        arrays = self._store.read(step, {name: digests.abstract(leaf) for name, leaf in leaves.items()})
        for name, array in arrays.items():
            if digests.digest(array) != contents["digests"][name]:
                raise DamagedError(f"{self._store.path(step)}: {name!r} is not as it was written")
        restored = [digests.as_leaf(leaf, arrays[name]) for name, leaf in leaves.items()]
        return jax.tree.unflatten(jax.tree.structure(like), restored)
