"""The log of a run: what is in its files, after kills and resumes too, and what is shown."""

import json
import logging
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import require

from bertjax.errors import InputError, SourceError
from bertjax.training import curves, logs
from bertjax.training.curves import plot_curves
from bertjax.training.logs import RunLog


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands, but for what a test adds to its first element."""
    seconds = [100.0]
    monkeypatch.setattr(logs, "perf_counter", lambda: seconds[0])
    return seconds


def lines(folder):
    """The log's entries; JSON has no NaN."""

    def refuse(constant):
        raise AssertionError(constant)

    text = (folder / "metrics.jsonl").read_text()
    assert not text or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def train(log, *steps, tokens=640):
    for step in steps:
        log.step(step, {"loss": 1 / step, "learning_rate": 1e-4}, tokens=tokens, examples=8)


def test_a_line_says_what_was_measured_and_how_fast(tmp_path, clock):
    log = RunLog(tmp_path / "new" / "run", 20)
    clock[0] += 4
    log.step(10, {"loss": np.float32(0.5), "gradient_norm": math.inf}, tokens=1000, examples=10)
    clock[0] += 60
    log.evaluation(10, {"loss": math.nan, "f1": 0.25})
    clock[0] += 2
    log.step(20, {"loss": math.nan}, tokens=1000, examples=10)
    log.close()
    rates = [{"tokens_per_second": tokens, "examples_per_second": tokens / 100} for tokens in (250, 500)]
    assert lines(tmp_path / "new" / "run") == [
        {"step": 10, "kind": "train", "loss": 0.5, "gradient_norm": None, **rates[0], "seconds": 4},
        {"step": 10, "kind": "eval", "loss": None, "f1": 0.25, "seconds": 64},
        {"step": 20, "kind": "train", "loss": None, **rates[1], "seconds": 66},
    ]


def test_a_line_is_there_before_the_log_is_closed(tmp_path):
    log = RunLog(tmp_path, 20)
    train(log, 1)
    assert [entry["step"] for entry in lines(tmp_path)] == [1]
    log.close()
    log.close(error=True)


@given(st.integers(0, 10), st.floats(0, 1), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_resumed_run_has_each_step_once(start, part, garbage):
    """The process was killed in the middle of a write, at any byte, and goes on from any step."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder, file = Path(name), Path(name) / "metrics.jsonl"
        patch.setitem(sys.modules, "tensorboard", None)
        log = RunLog(folder, 10)
        train(log, *range(1, 11))
        log.close()
        whole = file.read_bytes()
        left = whole[: round(part * len(whole))]
        file.write_bytes(left + b"\n\xff[1]\n{}\nnull\n" * garbage)
        log = RunLog(folder, 10, start_step=start)
        kept = lines(folder)
        train(log, *range(start + 1, 11))
        log.close()
        complete = [step for step in range(1, start + 1) if _is_in(left, whole, step)]
        assert [entry["step"] for entry in kept] == complete
        assert [entry["step"] for entry in lines(folder)] == [*complete, *range(start + 1, 11)]
        assert [entry["seconds"] for entry in lines(folder)] == sorted(entry["seconds"] for entry in lines(folder))


def _is_in(left, whole, step):
    """Whether all of a line is left, be it without its end."""
    return len(left) + 1 >= sum(len(line) + 1 for line in whole.splitlines()[:step])


def test_a_run_that_begins_anew_has_nothing_of_the_one_before(tmp_path):
    for _ in range(2):
        log = RunLog(tmp_path, 2)
        log.evaluation(0, {"f1": 0.0})
        train(log, 1, 2)
        log.close()
    assert [entry["step"] for entry in lines(tmp_path)] == [0, 1, 2]


def test_tensorboard_shows_each_step_once(tmp_path):
    accumulators = require("tensorboard.backend.event_processing.event_accumulator")
    log = RunLog(tmp_path, 6)
    train(log, 1, 2, 3, 4, 5)
    log.evaluation(3, {"f1": math.nan}, name="held out")
    log.close()
    [first] = (tmp_path / "tensorboard").iterdir()
    first.write_bytes(first.read_bytes()[:-5])  # killed while it wrote
    log = RunLog(tmp_path, 6, start_step=3)
    train(log, 4, 5, 6, tokens=1)
    log.evaluation(6, {"f1": 0.5})
    log.close()
    found = accumulators.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    rates = ("train/tokens_per_second", "train/examples_per_second")
    assert set(found.Tags()["scalars"]) == {"train/loss", "train/learning_rate", *rates, "eval/f1"}
    losses = {event.step: event.value for event in found.Scalars("train/loss")}
    assert losses == {step: np.float32(1 / step) for step in range(1, 7)}
    assert len(found.Scalars("train/loss")) == 6
    assert [(event.step, event.value) for event in found.Scalars("eval/f1")] == [(6, 0.5)]


def test_a_terminal_has_a_bar(tmp_path, capsys):
    log = RunLog(tmp_path, 40, start_step=10, progress=True)
    log._bar.mininterval = 0
    log.step(20, {"loss": 0.125}, tokens=1000, examples=10)
    log.evaluation(20, {"f1": 0.5})
    log.close()
    shown = capsys.readouterr()
    assert not shown.out
    assert "20/40" in shown.err
    assert "loss 0.125" in shown.err
    assert "step 20, eval: f1 0.5\n" in shown.err


def test_elsewhere_there_is_a_line_every_half_a_minute(tmp_path, clock, caplog, capsys):
    caplog.set_level(logging.INFO, logger="bertjax")
    log = RunLog(tmp_path, 100)
    for step in range(10, 101, 10):
        clock[0] += 10
        log.step(step, {"loss": math.nan}, tokens=1000, examples=10)
    log.evaluation(100, {"f1": 0.5})
    log.close()
    speed = "loss nan, 100 tokens/s, 1 steps/s"
    assert caplog.messages == [
        *(f"step {step} of 100: {speed}, {left} left" for step, left in ((10, "01:30"), (40, "01:00"), (70, "00:30"))),
        f"step 100 of 100: {speed}, 00:00 left",
        "step 100, eval: f1 0.5",
        "ended after step 100 of 100, 01:40",
    ]
    assert capsys.readouterr().err == ""


def test_a_full_disk_does_not_end_the_run(tmp_path, caplog):
    log = RunLog(tmp_path, 3)
    with open("/dev/full", "w") as full:
        log._file, file = full, log._file
        train(log, 1, 2)
        assert caplog.messages == ["the run goes on, but its log can't be written ([Errno 28] No space left on device)"]
        log.close()
    assert len(caplog.messages) == 1
    file.close()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda log: log.step(1, {"loss": "low"}, tokens=1, examples=1), "metrics: loss is 'low', expected a number"),
        (lambda log: log.step(1, {"kind": 1.0}, tokens=1, examples=1), "a metric can't be called 'kind'"),
        (lambda log: log.step(-1, {}, tokens=1, examples=1), "step is -1, expected an integer of at least 0"),
        (lambda log: log.evaluation(1, {"f1": 0.5}, name="train"), "an evaluation can't be called 'train'"),
        (lambda log: RunLog("unused", 0), "total_steps is 0, expected a positive integer"),
    ],
)
def test_what_is_no_metric_is_refused(tmp_path, call, message):
    log = RunLog(tmp_path, 3)
    with pytest.raises(InputError, match=message):
        call(log)
    log.close()
    assert lines(tmp_path) == []


def test_a_folder_that_can_not_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SourceError, match=r"file: the log can't be written \(File exists\)"):
        RunLog(tmp_path / "file", 3)


def picture(folder):
    """The pixels, float [height, width, 4]."""
    from matplotlib.image import imread

    assert plot_curves(folder) == folder / "curves.png"
    return imread(folder / "curves.png")


def red(pixels):
    """How many pixels are as red as the marks of what is not finite."""
    return int((np.abs(pixels[..., :3] - [1, 0, 0]).max(-1) < 0.1).sum())


def noisy(log, steps=500):
    """What a run might log."""
    rng = np.random.default_rng(0)
    for step in range(1, steps + 1):
        loss = (0.02 + 2.5 * math.exp(-step / 90)) * rng.lognormal(0, 0.3)
        rate = 3e-5 * min(step / 50, (steps - step) / (steps - 50))
        log.step(step, {"loss": loss, "learning_rate": rate}, tokens=900, examples=8)
        if step % 50 == 0:
            quality = 1 - math.exp(-step / 150)
            log.evaluation(step, {"loss": loss + 0.1, "f1": quality * 0.9, "accuracy": 0.5 + quality * 0.45})


def test_curves_are_drawn(tmp_path):
    log = RunLog(tmp_path, 500)
    noisy(log)
    log.close()
    before = picture(tmp_path)
    assert red(before) == 0
    assert len(np.unique(before.reshape(-1, 4), axis=0)) > 20
    log = RunLog(tmp_path, 520, start_step=500)
    for step in range(501, 521):
        log.step(step, {"loss": math.nan, "learning_rate": 0.0}, tokens=900, examples=8)
    log.evaluation(520, {"f1": math.nan, "perplexity": math.inf})
    log.close()
    assert red(picture(tmp_path)) > 100


@pytest.mark.parametrize("loss", [0.5, 0.0, -1e30, math.nan])
def test_a_single_line_is_drawn(tmp_path, loss):
    log = RunLog(tmp_path, 5)
    log.step(5, {"loss": loss}, tokens=1, examples=1)
    log.close(error=True)
    assert picture(tmp_path).ndim == 3


def test_where_nothing_can_be_drawn_nothing_is(tmp_path, monkeypatch, caplog):
    assert plot_curves(tmp_path) is None
    assert "can't be drawn" in caplog.text
    log = RunLog(tmp_path, 3)
    log.close()
    assert plot_curves(tmp_path) is None
    caplog.set_level(logging.INFO, logger="bertjax")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot_curves(tmp_path) is None
    assert "pip install 'bertjax[train]'" in caplog.text
    assert not (tmp_path / "curves.png").exists()


def test_smoothing_keeps_what_is_smooth_and_passes_over_gaps():
    values = np.linspace(1, 2, 400)
    found = curves._smoothed(np.where(np.arange(400) % 7 == 0, math.nan, values))
    np.testing.assert_allclose(found[30:-30], values[30:-30], atol=1e-3)
    noise = np.random.default_rng(0).normal(size=1000)
    assert np.std(curves._smoothed(noise)) < 0.2 * np.std(noise)
    assert np.isnan(curves._smoothed(np.full(5, math.nan))).all()


LIGHT = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] not in ("torch", "tensorflow"), name
sys.meta_path.insert(0, Refuse())
from bertjax.training.curves import plot_curves
from bertjax.training.logs import RunLog
import bertjax.training.metrics
heavy = {"sklearn", "scipy.stats", "seqeval", "matplotlib", "tensorboard"} & sys.modules.keys()
assert not heavy, heavy
log = RunLog(sys.argv[1], 2)
log.step(1, {"loss": 0.5}, tokens=1, examples=1)
log.close()
plot_curves(sys.argv[1])
bertjax.training.metrics.classification_metrics([[0.0, 1]], [1])
bertjax.training.metrics.tagging_metrics([["B-X"]], [["B-X"]])
"""


@pytest.mark.slow
def test_importing_is_light_and_nothing_asks_for_torch(tmp_path):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", LIGHT, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curves.png").exists()
