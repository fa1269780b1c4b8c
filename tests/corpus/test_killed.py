"""Jobs in processes of their own: killed, stopped, and several on one folder."""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import pytest
from corpora import a_job, shards, some_texts, write

from bertjax.corpus import run

# What reaches the disk is waited for a little, so that a job lasts long enough to be killed anywhere in it.
SLOWLY = """
import os, sys, time
flush = os.fsync
os.fsync = lambda descriptor: (time.sleep(0.01), flush(descriptor))
from bertjax.cli import main
main()
"""
COUNTING = """
import json, pickle, sys
from bertjax.corpus import run
print(json.dumps(run(pickle.load(open(sys.argv[1], "rb"))).rows_now))
"""
ROWS, SHARDS = 600, 38


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    texts = some_texts(ROWS, longest=20)
    texts[::97] = [None] * len(texts[::97])
    half = ROWS // 2
    with open(folder / "a.jsonl", "w") as file:
        file.writelines(json.dumps({"id": row, "text": text}) + "\n" for row, text in enumerate(texts[:half]))
    write(folder / "b.parquet", texts[half:], half)
    return folder


@pytest.fixture
def environment():
    """As for tests, but with the one device that a process has by default."""
    return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}


@pytest.fixture
def start(sentence_folder, inputs, environment):
    """Starts `bertjax embed` in a process of its own."""

    def start(out, *options):
        arguments = ["embed", inputs, "-m", sentence_folder, "--field", "text", "--shard-rows", "16", "--out", out]
        command = [sys.executable, "-c", SLOWLY, *arguments, "--on-bad", "skip", *options]
        return subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, env=environment)

    return start


@pytest.fixture(scope="module")
def whole(tmp_path_factory, sentence_folder, inputs):
    """What a job that ran through has made."""
    folder = tmp_path_factory.mktemp("whole")
    summary = run(a_job(folder, sentence_folder, inputs, shard_rows=16, on_bad="skip"), devices=jax.devices()[:1])
    assert (summary.num_shards, summary.counts.bad) == (SHARDS, 7)
    return folder / "out"


def wait_for(process, path):
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def finish(process):
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return errors


def kill_often(start, whole, folder, times):
    """Kills jobs at random moments, and compares each that got through with one that was never killed."""
    rng = random.Random(times)
    out = folder / "out"
    killed = finished = 0
    while killed < times:
        process = start(out)
        wait_for(process, out / "_job" / "job.json")
        try:
            process.wait(timeout=rng.uniform(0, 2))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.communicate()
        if (out / "_summary.json").exists() and killed < times:
            assert shards(out) == shards(whole)
            finished += 1
            shutil.rmtree(out)
    finish(start(out))
    assert shards(out) == shards(whole)
    assert not [path for path in out.rglob("*") if path.suffix in (".tmp", ".lock")]
    ours, theirs = (json.loads((path / "_summary.json").read_text()) for path in (out, whole))
    assert ours | {"last_run": None} == theirs | {"last_run": None}


def test_a_job_killed_at_a_random_moment_ends_with_the_same_bytes(start, whole, tmp_path):
    kill_often(start, whole, tmp_path, 1)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # fifty starts of a process that imports JAX and compiles
def test_a_job_killed_at_fifty_random_moments_ends_with_the_same_bytes(start, whole, tmp_path):
    kill_often(start, whole, tmp_path, 50)


@pytest.mark.slow
def test_a_job_that_is_terminated_finishes_the_shard_in_hand(start, whole, tmp_path):
    out = tmp_path / "out"
    process = start(out)
    wait_for(process, out / "part-00002.parquet")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 75, errors
    assert "finishing the shard in hand" in errors
    there = len(list(out.glob("*.parquet")))
    assert 3 <= there < SHARDS
    assert errors.splitlines()[-1] == f"{out}: stopped after {there} of {SHARDS} shards; the same command goes on"
    assert not [path for path in out.rglob("*") if path.suffix in (".tmp", ".lock")]
    assert f"{ROWS:,} row(s), " in finish(start(out))
    assert shards(out) == shards(whole)


def test_a_second_signal_ends_a_job_at_once(start, whole, tmp_path):
    out = tmp_path / "out"
    process = start(out, "--vectors", "float16")
    wait_for(process, out / "_job" / "job.json")
    process.send_signal(signal.SIGINT)
    time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate()
    # A job that has nothing in hand is at its end by then, and the interpreter has the signal to itself.
    assert process.returncode in (75, 128 + signal.SIGINT, -signal.SIGINT)
    assert len(list(out.glob("*.parquet"))) < SHARDS


@pytest.mark.slow
def test_two_workers_share_the_shards(sentence_folder, inputs, whole, tmp_path, environment):
    job = a_job(tmp_path, sentence_folder, inputs, shard_rows=16, on_bad="skip")
    (tmp_path / "job").write_bytes(pickle.dumps(job))
    command = [sys.executable, "-c", COUNTING, str(tmp_path / "job")]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    made = [int(worker.communicate()[0]) for worker in workers]
    assert sum(made) == ROWS
    assert shards(tmp_path / "out") == shards(whole)
    assert json.loads((tmp_path / "out" / "_summary.json").read_text())["rows"] == ROWS
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".tmp", ".lock")]
