"""Jobs on a real Ray cluster of this host, with two actors."""

import dataclasses
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from corpora import a_job, ids, shards, some_texts, write

from bertjax.corpus import SentenceVectors, TableComputer, plan, run
from bertjax.corpus.on_ray import _choose, run_on_ray
from bertjax.errors import InputError, JobError, SourceError

ONE = jax.devices()[:1]
ROWS, SHARDS = 300, 19
TEXTS = some_texts(ROWS)
# Prints how many shards there are, and how many rows it has made.
DRIVER = """
import pickle, signal, sys, threading
from bertjax.corpus.on_ray import run_on_ray
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
summary = run_on_ray(pickle.load(open(sys.argv[1], "rb")), actors=2, stop=stop)
print(summary.shards, summary.rows_now)
"""


@dataclasses.dataclass(frozen=True)
class Odd(SentenceVectors):
    """Vectors like any others; but the process that is at row `deadly` dies, while there are files that say so."""

    graves: str = ""
    deadly: int = -1
    pause: float = 0.0

    def load(self, devices=None):
        loaded = super().load(devices)
        encode = loaded.encode

        def odd(items, position):
            time.sleep(self.pause)
            if position <= self.deadly < position + len(items) and (graves := list(Path(self.graves).iterdir())):
                graves[0].unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(items, position)

        loaded.encode = odd
        return loaded


@pytest.fixture(scope="module")
def ray():
    """Ray, connected to a cluster that was started as a process of its own, with room for two actors."""
    # Its paths must be short; and a token of this cluster's own keeps others out, and the one in the home untouched.
    with tempfile.TemporaryDirectory(prefix="ray") as folder, pytest.MonkeyPatch.context() as patch:
        for name, value in {"MODE": "token", "TOKEN": secrets.token_hex(32)}.items():
            patch.setenv(f"RAY_AUTH_{name}", value)
        cluster, address = start_cluster(Path(folder))
        try:
            import ray

            ray.init(address, log_to_driver=False)
            ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors can't import a test
            patch.setenv("RAY_ADDRESS", address)
            yield ray
            ray.shutdown()
        finally:
            cluster.terminate()
            cluster.wait()


def start_cluster(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    options = f"--port {address.split(':')[1]} --num-cpus 2 --object-store-memory {80 << 20} --include-dashboard false"
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    # The actors have one device each, as processes have by default; tests have eight.
    environment = {**os.environ, "XLA_FLAGS": "", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
    log = folder / "log"
    with open(log, "w") as file:
        command += [*options.split(), "--temp-dir", str(folder)]
        cluster = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    while "Ray runtime started" not in log.read_text():
        assert cluster.poll() is None, log.read_text()
        time.sleep(0.1)
    return cluster, address


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write(folder / "a.parquet", TEXTS[:150])
    write(folder / "b.jsonl.gz", TEXTS[150:], 150)
    return folder


@pytest.fixture
def job(tmp_path, sentence_folder, corpus):
    return a_job(tmp_path, sentence_folder, corpus, id="id", shard_rows=16)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, sentence_folder, corpus):
    """What one process makes, and its summary."""
    folder = tmp_path_factory.mktemp("whole")
    summary = run(a_job(folder, sentence_folder, corpus, id="id", shard_rows=16), devices=ONE)
    assert summary.num_shards == SHARDS
    return folder / "out", summary


def odd(job, **options):
    return dataclasses.replace(job, work=Odd(job.work.model, **options))


def test_says_what_to_install(job, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SourceError, match=r"pip install 'bertjax\[ray\]'"):
        run_on_ray(job)
    with pytest.raises(InputError, match="actors is 0, expected a positive integer"):
        run_on_ray(job, actors=0)


def test_a_cluster_that_does_not_answer_is_named(job, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(SourceError, match=f"Ray can't be reached at RAY_ADDRESS={address} .*refused"):
        run_on_ray(job)
    assert not job.folder.exists()


def test_actors_are_one_for_each_host_or_gpu():
    tpu, gpu, cpu = {"CPU": 8, "TPU": 4.0}, {"CPU": 8, "GPU": 8.0}, {"CPU": 8.0}
    assert _choose([cpu, tpu, tpu], None, None) == (2, {"TPU": 4})
    assert _choose([gpu, cpu, gpu], None, None) == (16, {"GPU": 1})
    assert _choose([cpu, cpu, {"memory": 1}], None, None) == (2, {"CPU": 1})
    assert _choose([cpu], 3, None) == (3, {"CPU": 1})
    assert _choose([tpu, tpu], 1, None) == (1, {"TPU": 4})
    assert _choose([tpu, cpu], None, {"CPU": 3, "TPU": 1}) == (2, {"CPU": 3, "TPU": 1})
    with pytest.raises(InputError, match=r"no host .* has \{'TPU': 8\}; they have \[\{'TPU': 4.0\}, \{'TPU': 0\}\]"):
        _choose([tpu, cpu], None, {"TPU": 8})


@pytest.mark.slow
def test_two_actors_make_what_one_process_makes(ray, job, whole):
    folder, expected = whole
    summary = run_on_ray(job, actors=2)
    assert shards(job.folder) == shards(folder)
    assert summary.is_done
    assert (summary.counts, summary.shards, summary.rows_now) == (expected.counts, SHARDS, ROWS)
    assert 0 < summary.compiles <= 2 * expected.compiles
    assert summary.seconds.keys() == expected.seconds.keys()
    saved = [(each / "_summary.json").read_text().split('"last_run"')[0] for each in (job.folder, folder)]
    assert saved[0] == saved[1]
    again = run_on_ray(job)
    assert (again.is_done, again.rows_now, again.counts) == (True, 0, expected.counts)


@pytest.mark.slow
def test_an_actor_that_is_killed_costs_a_retry_and_no_row(ray, job, whole, tmp_path):
    plan(job, ONE)
    run(job, [0, 5], devices=ONE)  # these are there, and not made again
    (tmp_path / "graves").mkdir()
    (tmp_path / "graves" / "one").touch()
    summary = run_on_ray(odd(job, graves=str(tmp_path / "graves"), deadly=200), actors=2)
    assert not list((tmp_path / "graves").iterdir())
    assert summary.is_done
    assert summary.counts == whole[1].counts
    # The other shard that the dead actor had in hand may have been finished, without anybody having been told.
    assert ROWS - 16 <= summary.rows_now + 2 * 16 <= ROWS
    assert shards(job.folder) == shards(whole[0])
    assert not list(job.folder.rglob("*.tmp"))


@pytest.mark.slow
def test_a_shard_that_kills_every_actor_is_named_and_the_others_are_made(ray, job, whole, tmp_path):
    plan(job, ONE)
    (tmp_path / "graves").mkdir()
    for name in "abc":
        (tmp_path / "graves" / name).touch()
    deadly = odd(job, graves=str(tmp_path / "graves"), deadly=200)
    with pytest.raises(JobError, match="1 shards could not be made in 3 tries, the first of them number 12"):
        run_on_ray(deadly, actors=2)
    assert num_shards(job) == SHARDS - 1
    assert run_on_ray(deadly, actors=1).is_done
    assert shards(job.folder) == shards(whole[0])


@pytest.mark.slow
def test_a_job_goes_on_after_its_driver_was_stopped_or_killed(ray, job, whole, tmp_path):
    (tmp_path / "job").write_bytes(ray.cloudpickle.dumps(odd(job, pause=0.5)))
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "job")]

    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    wait_for_shards(job, 2, driver)
    driver.terminate()
    printed, _ = driver.communicate()
    there = num_shards(job)
    assert (driver.returncode, printed.split()) == (0, [str(there), str(16 * there)])
    assert 2 <= there < SHARDS - 4
    assert not [path for path in job.folder.rglob("part-*") if path.suffix in (".tmp", ".lock")]

    driver = subprocess.Popen(command)
    wait_for_shards(job, there + 1, driver)
    driver.kill()
    driver.wait()
    assert num_shards(job) < SHARDS
    summary = run_on_ray(job, actors=2)
    assert summary.is_done
    assert shards(job.folder) == shards(whole[0])


def num_shards(job):
    return len(list(job.folder.glob("*.parquet")))


def wait_for_shards(job, number, process):
    while num_shards(job) < number:
        assert process.poll() is None
        time.sleep(0.01)


@pytest.mark.slow
def test_an_error_of_the_job_is_the_same_as_without_ray(ray, job, corpus, tmp_path):
    write(tmp_path / "bad.parquet", ["a cat", None])
    bad = dataclasses.replace(job, inputs=(str(tmp_path / "bad.parquet"),))
    with pytest.raises(InputError, match=r"bad.parquet: row 1 \(row 1 of the job\)") as found:
        run_on_ray(bad, actors=1)
    assert type(found.value) is InputError


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data")  # Ray's own, of itself
def test_ray_data_takes_a_table_computer(ray, sentence_folder, corpus, whole):
    options = {"work": SentenceVectors(str(sentence_folder)), "text": "text"}
    made = ray.data.read_parquet(str(corpus / "a.parquet")).map_batches(
        TableComputer, fn_constructor_kwargs=options, batch_format="pyarrow", batch_size=40, concurrency=1
    )
    rows = sorted(made.take_all(), key=lambda row: int(row["id"].split("-")[1]))
    assert [row["id"] for row in rows] == ids(150)
    assert [row["text"] for row in rows] == TEXTS[:150]
    expected = pq.read_table(whole[0])["embedding"].combine_chunks().flatten().to_numpy().reshape(ROWS, -1)
    np.testing.assert_allclose(np.stack([row["embedding"] for row in rows]), expected[:150], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_command_starts_a_cluster_where_there_is_none(sentence_folder, corpus, whole, tmp_path):
    model, inputs = (os.path.relpath(path, tmp_path) for path in (sentence_folder, corpus))
    command = [sys.executable, "-m", "bertjax", "embed", inputs, "-m", model, "--engine", "ray", "--field", "text"]
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "RAY_ADDRESS")}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command += ["--id", "id", "--shard-rows", "16", "--out", "out"]
    made = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert f"{ROWS:,} row(s), " in made.stderr
    assert shards(tmp_path / "out") == shards(whole[0])
