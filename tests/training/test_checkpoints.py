"""Checkpoints of a run: killed, damaged, on a full disk, on other devices."""

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from test_heads import random_heads

from bertjax.errors import CheckpointError, InputError, SourceError
from bertjax.sharding import FULLY_SHARDED, data_mesh, shardings_of
from bertjax.training import AdamW, TrainState, digests, new_state
from bertjax.training.checkpoints import Checkpoints

pytestmark = pytest.mark.usefixtures("little_optimisation")


def made(step, rows=100):
    """A little state, another one at each step: every kind of leaf, and some None."""
    rng = np.random.default_rng(step)
    learnt = {"kernel": jnp.asarray(rng.normal(size=(rows, 8)), jnp.float32), "frozen": None}
    fixed = {"kernel": None, "frozen": jnp.asarray(rng.normal(size=(8,)), jnp.bfloat16)}
    moments = (jnp.asarray(step, jnp.int32), {"kernel": -learnt["kernel"], "frozen": None}, jnp.zeros(4, bool))
    return TrainState(jnp.asarray(step, jnp.int32), learnt, fixed, moments, jax.random.key(step))


def bits(state):
    return {
        name: (str(leaf.dtype), leaf.shape, np.asarray(digests.plain(leaf)).tobytes())
        for name, leaf in digests.named(state).items()
    }


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert bits(found) == bits(expected)


def assert_tidy(folder):
    """Nothing is left but checkpoints and what is set aside."""
    names = {path.name for path in folder.iterdir()}
    assert {name for name in names if not name.removesuffix(".damaged").isdecimal()} <= {".lock"}


def saved(folder, steps, **options):
    """A folder with checkpoints of these steps."""
    with Checkpoints(folder, **options) as checkpoints:
        for step in steps:
            checkpoints.save(made(step))
    return folder


def test_a_state_comes_back_bit_for_bit(tmp_path):
    model = random_heads("BertForSequenceClassification")
    state = new_state(model, AdamW(freeze=("embeddings",)).build(model, 3), seed=7)
    expected = bits(state)
    with Checkpoints(tmp_path / "a" / "b") as checkpoints:
        assert checkpoints.restore(state) is None
        checkpoints.save(state)
        # The next step takes the memory while the save goes on.
        jax.jit(
            lambda state: jax.tree.map(lambda leaf: leaf if digests.is_key(leaf) else leaf + 1, state), donate_argnums=0
        )(state)
        assert checkpoints.latest_step == 0
    abstract = jax.eval_shape(lambda: new_state(model, AdamW(freeze=("embeddings",)).build(model, 3), seed=7))
    with Checkpoints(tmp_path / "a" / "b") as checkpoints:
        found = checkpoints.restore(abstract)
    assert jax.tree.structure(found) == jax.tree.structure(abstract)
    assert bits(found) == expected
    assert jax.random.normal(found.key) == jax.random.normal(jax.random.key(7))


def test_the_latest_stay_and_the_best(tmp_path):
    accuracies = [0.5, 0.9, float("nan"), 0.7, 0.9, 0.8]
    for folder, greater, best in (("max", True, 2), ("min", False, 1)):
        options = {"keep": 2, "best": "accuracy", "greater_is_better": greater}
        with Checkpoints(tmp_path / folder, **options) as checkpoints:
            assert (checkpoints.best_step, checkpoints.best_metrics, checkpoints.latest_step) == (None, None, None)
            assert checkpoints.restore_best(made(1)) is None
            for step, accuracy in enumerate(accuracies[:3], 1):
                checkpoints.save(made(step), {"accuracy": accuracy, "loss": 1})
        with Checkpoints(tmp_path / folder, **options) as checkpoints:  # it knows what was
            for step, accuracy in enumerate(accuracies[3:], 4):
                checkpoints.save(made(step), {"accuracy": accuracy, "loss": 1})
            checkpoints.save(made(6), {"accuracy": 1, "loss": 1})  # there already
            checkpoints.save(made(7))
            assert checkpoints.latest_step == 7
            assert_same(checkpoints.restore_best(made(1)), made(best))
            assert checkpoints.best_step == best
            assert checkpoints.best_metrics == {"accuracy": accuracies[best - 1], "loss": 1}
            assert_same(checkpoints.restore(made(1)), made(7))
        assert {path.name for path in (tmp_path / folder).iterdir()} == {".lock", str(best), "6", "7"}
        assert_tidy(tmp_path / folder)


LOOP = """
import sys
sys.path[:0] = [{tests!r}, {training!r}]
from test_checkpoints import made
from bertjax.training.checkpoints import Checkpoints
with Checkpoints(sys.argv[1]) as checkpoints:
    state = checkpoints.restore(made(0, {rows}))
    for step in range(0 if state is None else int(state.step) + 1, 10**6):
        checkpoints.save(made(step, {rows}))
        print(step - 1, flush=True)  # which is complete when the next is begun
"""


def kill_often(folder, times, rows=40_000):
    """Kills processes that do nothing but save, and looks at what there is."""
    here = Path(__file__).parent
    code = LOOP.format(tests=str(here.parent), training=str(here), rows=rows)
    rng, last = random.Random(times), -1
    for _ in range(times):
        process = subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        with pytest.raises(SourceError, match="another run"):
            Checkpoints(folder)
        time.sleep(rng.uniform(0, 0.7))
        process.kill()
        printed, _ = process.communicate()
        last = max([last, *map(int, printed.split())])
        with Checkpoints(folder) as checkpoints:
            assert_tidy(folder)
            found = checkpoints.restore(made(0, rows))
            assert found.step >= last
            assert_same(found, made(int(found.step), rows))
            last = int(found.step)
        assert not list(folder.glob("*.damaged"))
    return last


def test_a_run_killed_at_a_random_moment_goes_on_from_what_was_complete(tmp_path):
    assert kill_often(tmp_path, 2) > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)  # thirty starts of a process that imports JAX
def test_a_run_killed_at_thirty_random_moments_goes_on_from_what_was_complete(tmp_path):
    assert kill_often(tmp_path, 30) > 60


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def flip(path):
    data, rng = bytearray(path.read_bytes()), random.Random(0)
    for place in {rng.randrange(len(data)) for _ in range(1 + len(data) // 500)}:
        data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def flip_last(path):
    """A bit of a number, if the file is that of the arrays."""
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("damage", [truncate, zero, flip, flip_last, Path.unlink])
def test_a_damaged_checkpoint_costs_one_step_back(damage, tmp_path, caplog):
    """Each file in turn: what comes back is a state as it was saved, and a step back is told of."""
    whole = saved(tmp_path / "whole", [1, 2])
    back = 0
    for path in sorted((whole / "2").rglob("*")):
        if not path.is_file() or not path.stat().st_size:
            continue
        folder = tmp_path / "damaged"
        shutil.copytree(whole, folder)
        damage(folder / path.relative_to(whole))
        caplog.clear()
        with Checkpoints(folder) as checkpoints:
            found = checkpoints.restore(made(0))
            assert_same(found, made(int(found.step)))
            if found.step == 1:
                [record] = caplog.records
                assert record.name == "bertjax.training.checkpoints"
                assert record.getMessage().startswith(f"step 2 is left out: {folder}/2")
                assert {each.name for each in folder.iterdir()} == {"1", "2.damaged", ".lock"}
                checkpoints.save(made(2))
                checkpoints.wait()
                back += 1
            else:
                assert not caplog.records
            assert_same(checkpoints.restore(made(0)), made(2))
        shutil.rmtree(folder)
    assert back == 2  # the description, the arrays


def test_without_a_checkpoint_that_can_be_read_nothing_starts_anew(tmp_path):
    folder = saved(tmp_path, [1, 2])
    shutil.rmtree(folder / "1" / "state")
    shutil.rmtree(folder / "2")
    (folder / "2").mkdir()
    for restore in (Checkpoints.restore, Checkpoints.restore_best):
        with Checkpoints(folder, best="loss") as checkpoints, pytest.raises(CheckpointError) as caught:
            restore(checkpoints, made(0))
        assert "no checkpoint can be read" in str(caught.value)
    assert {each.name for each in folder.iterdir()} == {"1", "2", ".lock"}


def test_a_damaged_best_is_told_of(tmp_path, caplog):
    with Checkpoints(tmp_path, keep=3, best="loss", greater_is_better=False) as checkpoints:
        for step, loss in enumerate([0.3, 0.1, 0.2], 1):
            checkpoints.save(made(step), {"loss": loss})
        checkpoints.wait()
        flip(tmp_path / "2" / "contents" / "metadata")
        assert_same(checkpoints.restore_best(made(0)), made(3))
        assert checkpoints.best_step == 3
        assert "step 2 is left out" in caplog.text


@pytest.fixture
def small_files():
    """No file may be larger than 64 KiB, so that what tensorstore writes really fails if it is."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def fail_once(monkeypatch, name, number):
    """The next call of a function of `os` fails."""
    function = getattr(os, name)

    def failing(*arguments, **options):
        monkeypatch.setattr(os, name, function)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, name, failing)


LARGE = 4000
FAILURES = [("mkdir", errno.EACCES), ("rename", errno.ENOSPC), ("rename", errno.EIO), ("array", errno.EFBIG)]


@pytest.mark.parametrize(("where", "number"), FAILURES)
def test_a_save_that_fails_does_not_stop_the_run(where, number, tmp_path, small_files, monkeypatch, caplog):
    folder = saved(tmp_path, [1, 2])

    def fail(checkpoints, step):
        if where != "array":
            fail_once(monkeypatch, where, number)
        checkpoints.save(made(step, LARGE if where == "array" else 100))

    with Checkpoints(folder) as checkpoints:
        fail(checkpoints, 3)
        checkpoints.save(made(4))
        assert checkpoints.failed_saves == 1
        [record] = caplog.records
        assert record.getMessage().startswith(f"{folder}/3: can't be written (")
        assert os.strerror(number) in record.getMessage()
        checkpoints.wait()
        assert_tidy(folder)
        assert {path.name for path in folder.iterdir()} == {".lock", "2", "4"}
        fail(checkpoints, 5)
        with pytest.raises(SourceError, match=rf"5: can't be written \(.*{os.strerror(number)}.*saved before it stays"):
            checkpoints.wait()
        checkpoints.wait()  # it has been said
        assert_same(checkpoints.restore(made(0)), made(4))
    checkpoints = Checkpoints(folder)
    fail(checkpoints, 6)
    with pytest.raises(SourceError, match="6: can't be written"):
        checkpoints.close()
    with pytest.raises(ZeroDivisionError), Checkpoints(folder) as checkpoints:
        fail(checkpoints, 6)
        raise ZeroDivisionError
    with Checkpoints(folder) as checkpoints:
        assert_tidy(folder)
        assert_same(checkpoints.restore(made(0)), made(4))


def test_a_folder_that_is_away_for_a_while_does_not_stop_the_run(tmp_path, caplog):
    folder = saved(tmp_path / "run", [1])
    with Checkpoints(folder) as checkpoints:
        folder.rename(tmp_path / "away")
        checkpoints.save(made(2))
        (tmp_path / "away").rename(folder)
        checkpoints.save(made(3))
        assert checkpoints.failed_saves == 1
        assert f"{folder}/2: can't be written (" in caplog.text
        assert_same(checkpoints.restore(made(0)), made(3))


def test_an_old_checkpoint_that_can_not_be_removed_is_no_failure(tmp_path, monkeypatch, caplog):
    with Checkpoints(saved(tmp_path, [1, 2])) as checkpoints:
        fail_once(monkeypatch, "rmdir", errno.EIO)
        checkpoints.save(made(3))
        checkpoints.wait()
        assert checkpoints.failed_saves == 0
        assert f"{tmp_path}/3: is saved, but an older checkpoint can't be removed" in caplog.text
        checkpoints.save(made(4))
        checkpoints.wait()
        assert {path.name for path in tmp_path.iterdir()} == {".lock", "3", "4"}


def changed(state, **learnt):
    return TrainState(state.step, state.learnt | learnt, state.fixed, state.optimizer, state.key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": jnp.zeros((100, 9))}, r"'learnt.kernel' is float32\[100, 8\] in it, float32\[100, 9\] in this run"),
        ({"kernel": jnp.zeros((100, 8), jnp.bfloat16)}, r"'learnt.kernel' is float32.* bfloat16\[100, 8\] in this run"),
        ({"kernel": None}, "it has 'learnt.kernel', which this run has not"),
        ({"frozen": jnp.zeros(3)}, "'learnt.frozen' is not in it"),
        (jax.random.key(1, impl="rbg"), r"'key' is key<fry>\[\] in it, key<rbg>\[\] in this run"),
    ],
)
def test_another_model_or_optimiser_is_refused(change, message, tmp_path, caplog):
    like = made(1)
    if isinstance(change, dict):
        like = changed(like, **change)
    else:
        like = TrainState(like.step, like.learnt, like.fixed, like.optimizer, change)
    with Checkpoints(saved(tmp_path, [1, 2])) as checkpoints, pytest.raises(CheckpointError, match=message):
        checkpoints.restore(like)
    assert not caplog.records
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "1", "2"}


def test_eight_devices_and_one(tmp_path):
    assert len(jax.devices()) == 8
    mesh, one = data_mesh(), made(1, 64)
    for name, rules in (("divided", FULLY_SHARDED), ("on each", {})):
        shardings = shardings_of(one, mesh, rules)
        eight = jax.device_put(one, shardings)
        abstract = jax.tree.map(
            lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), one, shardings
        )
        for source, like in ((one, eight), (one, abstract), (eight, one), (eight, eight)):
            folder = tmp_path / name
            with Checkpoints(folder) as checkpoints:
                checkpoints.save(source)
                found = checkpoints.restore(like)
            assert_same(found, one)
            assert jax.tree.all(jax.tree.map(lambda leaf, wanted: leaf.sharding == wanted.sharding, found, like))
            # What lies on several devices is not one memory, which a step would change eight times.
            step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + leaf.dtype.type(1), state), donate_argnums=0)
            np.testing.assert_array_equal(step(found.learnt)["kernel"], np.asarray(one.learnt["kernel"]) + 1)
            shutil.rmtree(folder)
    spec = shardings_of(one, mesh, FULLY_SHARDED).learnt["kernel"]
    assert spec == NamedSharding(mesh, PartitionSpec("data", None))


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(["float32", "bfloat16", "int32", "uint8", "bool"]),
    shape=st.sampled_from([(), (16,), (8, 6), (8, 3, 2)]),
    data=st.data(),
)
def test_a_digest_is_another_one_if_any_bit_changes(dtype, shape, data):
    is_bool, dtype = dtype == "bool", jnp.dtype(dtype)
    count = int(np.prod(shape)) * dtype.itemsize
    raw = np.random.default_rng(0).integers(0, 2 if is_bool else 256, count, dtype=np.uint8)
    place = data.draw(st.integers(0, raw.size - 1))
    other = raw.copy()
    other[place] ^= 1 << (0 if is_bool else data.draw(st.integers(0, 7)))
    first, second = (jnp.asarray(each.view(dtype).reshape(shape)) for each in (raw, other))
    assert digests.digest(first) != digests.digest(second)
    if shape:
        on_eight = jax.device_put(first, NamedSharding(data_mesh(), PartitionSpec("data")))
        assert digests.digest(on_eight) == digests.digest(first)
        moved = np.roll(np.asarray(first), 1)
        assert moved.tobytes() == np.asarray(first).tobytes() or digests.digest(moved) != digests.digest(first)


def test_one_folder_is_of_one_run(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(SourceError, match="another run saves its checkpoints here; give another folder"):
            Checkpoints(tmp_path)
        for step in (1, 5):
            checkpoints.save(made(step))
        checkpoints.save(made(5))
        for step, state in ((4, made(4)), (5, changed(made(5), kernel=jnp.zeros((100, 8))))):
            with pytest.raises(InputError, match=f"holds step 5, and this is another state, of step {step}"):
                checkpoints.save(state)
    with pytest.raises(InputError, match="closed; open them again"):
        checkpoints.save(made(6))
    checkpoints.close()
    with Checkpoints(tmp_path, best="loss") as checkpoints:
        with pytest.raises(InputError, match="metrics has no 'loss', which tells the best, only accuracy"):
            checkpoints.save(made(6), {"accuracy": 1.0})
        assert checkpoints.latest_step == 5
    with pytest.raises(InputError, match="keep is 0"):
        Checkpoints(tmp_path, keep=0)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SourceError, match="file: can't be written"):
        Checkpoints(tmp_path / "file")


QUIET = """
import resource, shutil, signal, sys
sys.path[:0] = [{tests!r}, {training!r}]
import bertjax.training.checkpoints
assert "orbax" not in sys.modules
from test_checkpoints import Checkpoints, flip_last, made
from pathlib import Path
folder = Path(sys.argv[1])
with Checkpoints(folder) as checkpoints:
    for step in range(4):
        checkpoints.save(made(step))
flip_last(folder / "3" / "state" / "arrays.safetensors")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
with Checkpoints(folder) as checkpoints:
    assert checkpoints.restore(made(0)).step == 2
    checkpoints.save(made(4, 4000))
    checkpoints.save(made(5))
"""


def test_nothing_is_said_but_what_is_meant(tmp_path):
    here = Path(__file__).parent
    code = QUIET.format(tests=str(here.parent), training=str(here))
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, tmp_path], check=True, capture_output=True, text=True
    )
    assert not result.stdout
    damaged, failed = result.stderr.splitlines()
    assert f"step 3 is left out: {tmp_path}/3: 'optimizer.2' is not as it was written" in damaged
    assert f"{tmp_path}/4: can't be written (" in failed
