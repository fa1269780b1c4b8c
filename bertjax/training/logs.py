"""What a run leaves to look at, and what it shows meanwhile.

    FOLDER/metrics.jsonl  what was measured, a JSON object a line
    FOLDER/tensorboard/   the same for TensorBoard, where that is installed

`curves` draws the same as a picture.
"""

import contextlib
import json
import logging
import math
import reprlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

from tqdm import tqdm

from bertjax.atomic import atomic_file
from bertjax.checks import check_count
from bertjax.errors import InputError, SourceError
from bertjax.training.log_lines import METRICS, RESERVED, read_lines
from bertjax.training.tensorboard_events import Events

logger = logging.getLogger(__name__)

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
            self._before = _resume(folder / METRICS, self._start)
            self._file = open(folder / METRICS, "a", encoding="utf-8")  # noqa: SIM115
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
                self._events.write(step, {f"{kind}/{name}": number for name, number in numbers.items()})
        return numbers

    @contextlib.contextmanager
    def _failing_softly(self) -> Iterator[None]:
        try:
            yield
        except OSError as problem:
            if not self._failed:
                logger.warning("the run goes on, but its log can't be written (%s)", problem)
            self._failed = True


def _events(folder: Path, first_step: int) -> Events | None:
    try:
        return Events(folder, first_step)
    except ImportError:
        return None


def _number(name: str, value: Any) -> float:
    if name in RESERVED:
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
    kept = [entry for entry in read_lines(before) if 0 < start_step >= entry["step"]]
    after = "".join(json.dumps(entry) + "\n" for entry in kept).encode()
    if after != before:
        with atomic_file(path) as temporary:
            temporary.write_bytes(after)
    return max((entry["seconds"] for entry in kept), default=0.0)
