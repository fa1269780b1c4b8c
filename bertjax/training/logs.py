"""What a run leaves to look at, and what it shows meanwhile.

    FOLDER/metrics.jsonl  what was measured, a JSON object a line
    FOLDER/tensorboard/   the same for TensorBoard, where that is installed
    FOLDER/curves.png     the same as a picture: `plot_curves`

Events are written by TensorBoard's own package, without TensorFlow. (tensorboardX imports torch wherever it is.)
"""

import contextlib
import json
import logging
import math
import reprlib
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from bertjax.atomic import atomic_file
from bertjax.checks import as_integer, check_count
from bertjax.errors import InputError, SourceError

logger = logging.getLogger(__name__)

_METRICS, _PICTURE = "metrics.jsonl", "curves.png"
# What a line has beside metrics.
_RESERVED = ("step", "kind", "seconds")
# Seconds between two lines of progress, where there is no bar.
_PAUSE = 30.0


class RunLog:
    """The log of a run.

    A line of metrics.jsonl has the step; its kind, "train" or the name of an evaluation; the metrics, null for one that
    is not finite; in training, tokens_per_second and examples_per_second; and the seconds that the run has taken, those
    before it was resumed included. A disk that is full does not stop the run: that is logged once.

    Args:
        folder: the run's folder; made if it is not there.
        total_steps: how many steps there are.
        start_step: after how many a run goes on. Lines of later steps are removed, and TensorBoard will not show them;
            at 0, all are.
        progress: whether to show a bar on stderr, or, without, a line in the log of this module every half a minute;
            default: a bar on a terminal.

    Raises:
        InputError: a number of steps is wrong.
        SourceError: the folder can't be read or written.
    """

    def __init__(self, folder: str | Path, total_steps: int, *, start_step: int = 0, progress: bool | None = None):
        self._total = check_count("total_steps", total_steps)
        self._start = self._step = check_count("start_step", start_step, least=0)
        folder = Path(folder)
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._before = _resume(folder / _METRICS, self._start)
            self._file = open(folder / _METRICS, "a", encoding="utf-8")  # noqa: SIM115
            self._events = _events(folder / "tensorboard", self._start + 1 if self._start else 0)
        disable = None if progress is None else not progress
        self._bar = tqdm(total=self._total, initial=self._start, unit="step", dynamic_ncols=True, disable=disable)
        self._began = self._counted = perf_counter()
        self._spoke, self._failed = -math.inf, False

    def step(self, step: int, metrics: Mapping[str, float], *, tokens: int, examples: int) -> None:
        """Logs training.

        Args:
            step: how many steps have been made.
            metrics: of the last one, or of all since the last call.
            tokens: how many it took since the last call, or since the last evaluation if that was later: the time that
                passed since then is what rates are counted by. So call this before an evaluation.
            examples: likewise.

        Raises:
            InputError: a metric is no number, or has the name of something else in a line.
        """
        now = perf_counter()
        seconds, self._counted = max(now - self._counted, 1e-9), now
        counts = {"tokens_per_second": tokens, "examples_per_second": examples}
        rates = {name: float(f"{count / seconds:.6g}") for name, count in counts.items()}
        numbers = self._write(step, "train", {**metrics, **rates})
        made, self._step = step - self._step, step
        loss = f"loss {numbers['loss']:.4g}, " if "loss" in numbers else ""
        said = f"{loss}{rates['tokens_per_second']:,.0f} tokens/s"
        if not self._bar.disable:
            self._bar.set_postfix_str(said, refresh=False)
            self._bar.update(made)
        elif now - self._spoke >= _PAUSE or step >= self._total:
            self._spoke = now
            logger.info("step %d of %d: %s, %s", step, self._total, said, self._speed(now))

    def evaluation(self, step: int, metrics: Mapping[str, float], name: str = "eval") -> None:
        """Logs an evaluation after so many steps. Raises `InputError` as `step` does, and for the name "train"."""
        if name == "train":
            raise InputError("an evaluation can't be called 'train', as lines of training are")
        numbers = self._write(step, name, metrics)
        said = f"step {step}, {name}: " + ", ".join(f"{metric} {number:.4g}" for metric, number in numbers.items())
        if self._bar.disable:
            logger.info("%s", said)
        else:
            self._bar.write(said, file=sys.stderr)
        self._counted = perf_counter()

    def close(self, error: bool = False) -> None:
        """Ends the log, once.

        Args:
            error: whether the run ends by one.
        """
        if self._file.closed:
            return
        for each in (self._file, self._events):
            with self._failing_softly():
                if each is not None:
                    each.close()
        self._bar.close()
        how = "ended by an error" if error else "ended"
        logger.info("%s after step %d of %d, %s", how, self._step, self._total, tqdm.format_interval(self._seconds()))

    def _seconds(self) -> float:
        return self._before + perf_counter() - self._began

    def _speed(self, now: float) -> str:
        rate = (self._step - self._start) / max(now - self._began, 1e-9)
        left = tqdm.format_interval((self._total - self._step) / rate) if rate > 0 else "?"
        return f"{rate:.3g} steps/s, {left} left"

    def _write(self, step: int, kind: str, metrics: Mapping[str, float]) -> dict[str, float]:
        """Writes a line, and gives its metrics as floats."""
        numbers = {name: _number(name, value) for name, value in metrics.items()}
        finite = {name: number if math.isfinite(number) else None for name, number in numbers.items()}
        step = check_count("step", step, least=0)
        entry = {"step": step, "kind": kind, **finite, "seconds": round(self._seconds(), 3)}
        with self._failing_softly():
            self._file.write(json.dumps(entry, allow_nan=False) + "\n")
            self._file.flush()
            if self._events is not None:
                self._events.scalars(step, {f"{kind}/{name}": number for name, number in numbers.items()})
        return numbers

    @contextlib.contextmanager
    def _failing_softly(self) -> Iterator[None]:
        try:
            yield
        except OSError as problem:
            if not self._failed:
                logger.warning("the run goes on, but its log can't be written (%s)", problem)
            self._failed = True


class _Events:
    """A file of TensorBoard's events."""

    def __init__(self, folder: Path, first_step: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(exist_ok=True)
        # TensorBoard reads files in the order of their names.
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        self._records = RecordWriter(open(folder / name, "xb"))  # noqa: SIM115
        self._write(file_version="brain.Event:2")
        # It then drops what earlier files have of this step and later ones.
        self._write(step=first_step, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=tag, simple_value=number) for tag, number in numbers.items()]
        self._write(step=step, summary=self._summary(value=values))

    def close(self) -> None:
        self._records.close()

    def _write(self, **content: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())
        self._records.flush()


def _events(folder: Path, first_step: int) -> _Events | None:
    try:
        return _Events(folder, first_step)
    except ImportError:
        return None


def _number(name: str, value: Any) -> float:
    if name in _RESERVED:
        raise InputError(f"a metric can't be called {name!r}, which a line of the log has beside its metrics")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InputError(f"metrics: {name} is {reprlib.repr(value)}, expected a number") from None


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except SourceError:
        raise
    except OSError as problem:
        raise SourceError(f"{folder}: the log can't be written ({problem.strerror or problem})") from None


def _resume(path: Path, start_step: int) -> float:
    """Removes from a log what does not belong to the first steps; gives the seconds that these took."""
    before = path.read_bytes() if path.exists() else b""
    kept = [entry for entry in _entries(before) if 0 < start_step >= entry["step"]]
    after = "".join(json.dumps(entry) + "\n" for entry in kept).encode()
    if after != before:
        with atomic_file(path) as temporary:
            temporary.write_bytes(after)
    return max((entry["seconds"] for entry in kept), default=0.0)


def _entries(data: bytes) -> list[dict[str, Any]]:
    """The lines of a log; what is none is left out, such as half of one, written when the process was killed."""
    entries = []
    for line in data.splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict) and as_integer(entry.get("step")) is not None and "kind" in entry:
                entries.append({"seconds": 0.0} | entry)
    return entries


def plot_curves(folder: str | Path) -> Path | None:
    """Draws the curves of a log: losses, the metrics of evaluations, the learning rate.

    Args:
        folder: the run's folder.

    Returns:
        The picture's path; None where there is nothing to draw, or no way to, which is logged and no error.
    """
    folder = Path(folder)
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        logger.info("without matplotlib there is no %s: pip install 'bertjax[train]'", folder / _PICTURE)
        return None
    try:
        panels = _panels(_entries((folder / _METRICS).read_bytes()))
        if not panels:
            return None
        figure = Figure(figsize=(9, 0.6 + 2.4 * len(panels)), dpi=120, layout="constrained")
        figure.get_layout_engine().set(h_pad=0.1)
        axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
        for axis, (title, curves) in zip(axes, panels.items(), strict=True):
            _draw(axis, title, curves)
        axes[-1].set_xlabel("step")
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=(1, 2, 5, 10)))
        axes[-1].xaxis.set_major_formatter("{x:,.0f}")
        with atomic_file(folder / _PICTURE) as temporary:
            figure.savefig(temporary, format="png")
    except OSError as problem:
        logger.warning("%s: can't be drawn (%s)", folder / _PICTURE, problem)
        return None
    return folder / _PICTURE


class _Curve(NamedTuple):
    """A metric of lines of a kind.

    Attributes:
        kind: "train", or the name of an evaluation.
        name: the metric's.
        points: [2, lines], steps and values; NaN where these are not finite.
    """

    kind: str
    name: str
    points: np.ndarray


def _panels(entries: list[dict[str, Any]]) -> dict[str, list[_Curve]]:
    """The curves that go together, by what they show."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for entry in entries:
        for name in entry.keys() - {*_RESERVED}:
            value = entry[name] if isinstance(entry[name], int | float) else math.nan
            found.setdefault((entry["kind"], name), []).append((entry["step"], value))
    panels: dict[str, list[_Curve]] = {"loss": [], "evaluation": []}
    for (kind, name), points in sorted(found.items(), key=lambda item: (item[0][0] != "train", item[0])):
        curve = _Curve(kind, name, np.array(points, np.float64).T)
        panel = _panel_of(curve)
        if panel is not None:
            panels.setdefault(panel, []).append(curve)
    # The learning rate comes first among the lines, and is looked at last.
    order = sorted(panels, key="learning rate".__eq__)
    return {name: panels[name] for name in order if panels[name]}


def _panel_of(curve: _Curve) -> str | None:
    if "loss" in curve.name:
        return "loss"
    if curve.kind == "train":
        return "learning rate" if curve.name == "learning_rate" else None
    # Most metrics are rates and correlations; what is larger needs an axis of its own.
    return "evaluation" if not (np.abs(curve.points[1]) > 1).any() else curve.name.replace("_", " ")


def _draw(axis: Any, title: str, curves: list[_Curve]) -> None:
    for curve in curves:
        steps, values = curve.points
        label = f"{curve.kind} {curve.name}".replace("_", " ").replace("$", r"\$")
        if curve.kind != "train":
            axis.plot(steps, values, marker="o", markersize=4, linewidth=1.5, label=label)
        elif title == "learning rate" or len(steps) < 10:
            axis.plot(steps, values, marker="o" if len(steps) == 1 else None, linewidth=1.5, label=label)
        else:
            raw = axis.plot(steps, values, linewidth=0.7, alpha=0.35)[0]
            axis.plot(steps, _smoothed(values), linewidth=1.8, color=raw.get_color(), label=f"{label}, smoothed")
    points = np.concatenate([curve.points for curve in curves], axis=1)
    wrong = points[0, np.isnan(points[1])]
    if wrong.size:  # along the lower edge, as they have no height
        below = {"transform": axis.get_xaxis_transform(), "clip_on": False}
        axis.plot(wrong, np.zeros_like(wrong), "rx", label="not finite", **below)
    _scale(axis, points[1, ~np.isnan(points[1])])
    axis.set_title(title, loc="left", fontsize="medium", fontweight="bold")
    axis.grid(alpha=0.3, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    if title != "learning rate":
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize="small")


def _scale(axis: Any, values: np.ndarray) -> None:
    """A logarithmic axis for what falls to a small part of what it was; plain numbers along any."""
    if values.size > 1 and values.min() > 0 and np.divide(*np.percentile(values, (95, 5))) > 10:
        from matplotlib.ticker import LogLocator, NullFormatter

        axis.set_yscale("log")
        few = values.max() / values.min() < 1000  # powers of ten
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_formatter("{x:.4g}")


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Means of neighbours, weighted by a Gaussian as wide as a hundredth of all; NaN has no weight."""
    width = max(2.0, len(values) / 100)
    reach = math.ceil(3 * width)
    kernel = np.exp(-0.5 * np.square(np.arange(-reach, reach + 1) / width))
    there = np.isfinite(values)
    sums, weights = (
        np.convolve(each, kernel)[reach : reach + len(values)] for each in (np.where(there, values, 0.0), there)
    )
    return np.where(weights > 0, sums / np.maximum(weights, 1e-300), np.nan)
