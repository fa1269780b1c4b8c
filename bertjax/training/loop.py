"""The loop: steps, evaluations, checkpoints, and in the end a model that others can load."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from bertjax.atomic import atomic_file
from bertjax.errors import ConfigError, JobError, TrainingError
from bertjax.json_files import read_json
from bertjax.sharding import FULLY_SHARDED, RULES, bytes_per_device, data_mesh, shardings_of
from bertjax.training.batches import Batches, MadeBatch
from bertjax.training.checkpoints import Checkpoints
from bertjax.training.curves import plot_curves
from bertjax.training.logs import RunLog
from bertjax.training.objective import Batch, Objective
from bertjax.training.optimizer import AdamW, Params, join
from bertjax.training.settings import RunSettings, Settings
from bertjax.training.state import TrainState, new_state
from bertjax.training.step import Metrics, train_step
from bertjax.training.tasks.base import Examples, LearningTask

logger = logging.getLogger(__name__)

# What may differ when a run goes on: none of it changes what is learnt.
_FREE = ("output", "log_every", "evaluate_every", "checkpoint_every", "keep", "best", "save")
# Metrics with one of these in their name are the better the less they are.
_LESS = ("loss", "perplexity", "error")


@dataclasses.dataclass(frozen=True)
class Report:
    """What a run did.

    Attributes:
        steps: how many steps have been made, in all sittings.
        total_steps: how many there are.
        metrics: of the evaluation of the state that was saved; empty without examples to evaluate on.
        step_saved: after how many steps the saved model was as it is; None if the run is not done.
        model: the model's folder, or None likewise.
    """

    steps: int
    total_steps: int
    metrics: Mapping[str, float]
    step_saved: int | None
    model: Path | None

    @property
    def is_done(self) -> bool:
        """Whether all steps have been made."""
        return self.model is not None


class Trainer:
    """A training run in a folder: begun, or gone on with where its last checkpoint is.

        OUTPUT/run.json        the settings, and a digest of the examples
        OUTPUT/checkpoints/    see `Checkpoints`
        OUTPUT/metrics.jsonl   and tensorboard/: see `logs`
        OUTPUT/curves.png      see `curves`
        OUTPUT/model/          the result

    Args:
        model: what is trained; in the end it has the parameters that are saved.
        task: what it is trained for.
        examples: what it learns from.
        options: how.
        optimizer: the optimiser.
        evaluation: what it is evaluated on; None for nothing.
        settings: what the run was made of, to be kept beside it; default: `options` and `optimizer`.

    Raises:
        ConfigError: an option is not usable.
    """

    def __init__(
        self,
        model: nnx.Module,
        task: LearningTask,
        examples: Examples,
        options: RunSettings,
        *,
        optimizer: AdamW | None = None,
        evaluation: Examples | None = None,
        settings: Settings | None = None,
    ):
        self.model, self.task, self._options = model, task, options
        self._folder, self._evaluation = Path(options.output), evaluation
        devices = jax.devices()
        mesh = data_mesh(devices) if len(devices) > 1 else None
        size = {"batch_size": options.batch_size, "row_length": options.row_length, "mesh": mesh}
        self.batches = Batches(task, examples, seed=options.seed, accumulate=options.accumulate, **size)
        self._held_out = None if evaluation is None else Batches(task, evaluation, seed=options.seed, **size)
        epoch = self.batches.steps_per_epoch
        self.total_steps = math.ceil(options.epochs * epoch) if options.steps is None else options.steps
        self._every = {
            "evaluate": options.evaluate_every or epoch,
            "checkpoint": options.checkpoint_every or epoch,
            "log": options.log_every,
        }
        optimizer = optimizer or AdamW()
        self._optimizer = optimizer.build(model, self.total_steps)
        self._objective = task.objective(model, self.batches.layout)
        self._mesh, self._shardings = mesh, None
        said = {"run": dataclasses.asdict(options), "optimizer": dataclasses.asdict(optimizer)}
        self._said = said if settings is None else settings.to_json()
        self._base = None if settings is None else settings.model.name
        self._digests = {"examples": _digest(examples)}
        if evaluation is not None:
            self._digests["evaluation"] = _digest(evaluation)

    def run(self, stop: threading.Event | None = None, *, show_progress_bar: bool | None = None) -> Report:
        """Makes the steps that are left, and saves the model.

        Args:
            stop: when it is set, the step in hand is finished and a checkpoint written.
            show_progress_bar: default: on a terminal.

        Raises:
            JobError: the folder holds another run.
            TrainingError: the loss is no number any more.
            SourceError: something can't be written.
        """
        self._check_folder()
        name, greater = self._best()
        keep = self._options.keep
        with Checkpoints(self._folder / "checkpoints", keep=keep, best=name, greater_is_better=greater) as checkpoints:
            state = self._new_state()
            state = checkpoints.restore(state) or state
            first = int(state.step)
            self._introduce(state)
            log = RunLog(self._folder, self.total_steps, start_step=first, progress=show_progress_bar)
            try:
                state = self._steps(state, checkpoints, log, stop or threading.Event())
            except BaseException:
                log.close(error=True)
                raise
            log.close()
            checkpoints.wait()
            plot_curves(self._folder)
            if int(state.step) < self.total_steps:
                return Report(int(state.step), self.total_steps, {}, None, None)
            return self._finish(state, checkpoints)

    def _introduce(self, state: TrainState) -> None:
        """Logs what a run is about to do."""
        logger.info(
            "%d of %d steps are left, %d make an epoch; parameters and optimiser state take %.4g MB%s",
            self.total_steps - int(state.step),
            self.total_steps,
            self.batches.steps_per_epoch,
            bytes_per_device(state) / 1e6,
            "" if self._mesh is None else f" on each of {self._mesh.size} devices",
        )

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """The losses and the task's own metrics of a state, on what the run is evaluated on."""
        sums = np.zeros((2, len(self.task.terms)))
        for batch in self._held_out.all():
            found = np.array(jax.device_get(self._losses(state.learnt, state.fixed, batch.arrays)), np.float64)
            sums += np.where(found[1] > 0, np.stack([found[0] * found[1], found[1]]), 0.0)
        means = sums[0] / np.maximum(sums[1], 1)
        state.update(self.model)
        named = dict(zip(self.task.terms, means.tolist(), strict=True))
        return {"loss": float(means.sum()), **named, **self.task.metrics(self.model, self._evaluation, named)}

    def _new_state(self) -> TrainState:
        state = new_state(self.model, self._optimizer, seed=self._options.seed)
        if self._mesh is None:
            return state
        self._shardings = shardings_of(state, self._mesh, FULLY_SHARDED if self._options.sharding == "full" else RULES)
        return jax.device_put(state, self._shardings)

    @functools.cached_property
    def _losses(self) -> Any:
        """Compiled: the losses of a batch without dropout, and over how many labels each is the mean."""
        # Its batches may be of other shapes than those that are learnt from.
        objective: Objective = self.task.objective(self.model, self._held_out.layout)

        def losses(learnt: Params, fixed: Params, batch: Batch) -> Any:
            return objective.losses(join(learnt, fixed), batch, None), objective.counts(batch)

        return jax.jit(losses)

    def _best(self) -> tuple[str | None, bool]:
        """The metric that the best checkpoint is chosen by, and whether more of it is better."""
        if self._evaluation is None:
            return None, True
        name = self._options.best or self.task.best[0]
        return name, not any(part in name for part in _LESS)

    def _check_folder(self) -> None:
        """Writes what the run is made of, or raises `JobError` if the folder holds another one."""
        path, said = self._folder / "run.json", {**self._said, "data_digests": self._digests}
        self._folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            with atomic_file(path) as temporary:
                temporary.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
            return
        before, now = _flat(read_json(path, JobError)), _flat(json.loads(json.dumps(said)))
        for name in [*before, *now]:
            old, new = before.get(name), now.get(name)
            if old != new and name.rpartition(".")[2] not in _FREE:
                what = "other data" if name.startswith("data_digests") else f"{name} = {old!r}, now {new!r}"
                raise JobError(f"{self._folder}: holds a run with {what}; name another output, or remove the folder")

    def _steps(self, state: TrainState, checkpoints: Checkpoints, log: RunLog, stop: threading.Event) -> TrainState:
        step = train_step(
            self.model,
            self._optimizer,
            objective=self._objective,
            accumulate=self._options.accumulate,
            shardings=self._shardings,
        )
        pending: list[tuple[MadeBatch, Metrics]] = []
        first = int(state.step)
        with contextlib.closing(self.batches.from_step(first, self.total_steps)) as batches:
            for number, batch in enumerate(batches, first + 1):
                state, metrics = step(state, batch.arrays)
                pending.append((dataclasses.replace(batch, arrays={}), metrics))
                stopped, last = stop.is_set(), number == self.total_steps
                due = {name: last or number % every == 0 for name, every in self._every.items()}
                if stopped or any(due.values()):
                    _write(log, number, pending)
                # One that is due is made even then: who goes on begins with the next step, and would leave it out.
                found = self._evaluated(state, log, number) if due["evaluate"] else None
                if found or stopped or due["checkpoint"]:
                    checkpoints.save(state, found)
                if stopped:
                    break
        return state

    def _evaluated(self, state: TrainState, log: RunLog, number: int) -> dict[str, float] | None:
        if self._held_out is None:
            return None
        found = self.evaluate(state)
        name = self._best()[0]
        if name not in found:
            raise ConfigError(f"run.best is {name!r}, and the metrics are {', '.join(found)}")
        log.evaluation(number, found)
        return found

    def _finish(self, state: TrainState, checkpoints: Checkpoints) -> Report:
        """Saves the state that is to be the model."""
        saved, metrics = int(state.step), {}
        if self._evaluation is not None and self._options.save == "best":
            state = checkpoints.restore_best(state) or state
            saved, metrics = int(state.step), dict(checkpoints.best_metrics or {})
        elif self._evaluation is not None:
            metrics = self.evaluate(state)
        state.update(self.model)
        model = self._folder / "model"
        self.task.save(self.model, model, self._base)
        report = Report(self.total_steps, self.total_steps, metrics, saved, model)
        with atomic_file(self._folder / "report.json") as temporary:
            numbers = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            content = dataclasses.asdict(report) | {"metrics": numbers, "model": "model"}
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return report


def _write(log: RunLog, number: int, pending: list[tuple[MadeBatch, Metrics]]) -> None:
    """Writes the metrics of the steps since the last time, and forgets them; this waits for the device.

    Raises:
        TrainingError: a loss, or the norm of a gradient, is no finite number.
    """
    found = jax.device_get([metrics for _, metrics in pending])
    tokens = sum(batch.tokens for batch, _ in pending)
    metrics = {
        "loss": float(np.mean([each.loss for each in found])),
        "gradient_norm": float(np.mean([each.gradient_norm for each in found])),
        "learning_rate": float(found[-1].learning_rate),
        "fill": tokens / sum(batch.positions for batch, _ in pending),
    }
    log.step(number, metrics, tokens=tokens, examples=sum(batch.examples for batch, _ in pending))
    pending.clear()
    for place, each in enumerate(found, number - len(found) + 1):
        _check_finite(place, each)


def _check_finite(step: int, metrics: Metrics) -> None:
    for name in ("loss", "gradient_norm"):
        if not math.isfinite(value := float(getattr(metrics, name))):
            raise TrainingError(
                f"the {name.replace('_', ' ')} of step {step} is {value}: the run has diverged, and the checkpoints "
                "before it are whole; use a lower learning rate or a longer warm-up, in a new folder"
            )


def _digest(examples: Examples) -> str:
    """A digest of all that is learnt from."""
    digest = hashlib.sha256(examples.texts.tobytes())
    labels = examples.labels if isinstance(examples.labels, list) else [examples.labels]
    for arrays in (examples.input_ids, examples.token_type_ids, labels):
        for array in arrays:
            digest.update(b"" if array is None else array.tobytes())
    digest.update(examples.lengths.tobytes())
    return digest.hexdigest()


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dots in the names."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    parts = (_flat(each, f"{prefix}.{name}".lstrip(".")) for name, each in tree.items())
    return {name: value for part in parts for name, value in part.items()}
