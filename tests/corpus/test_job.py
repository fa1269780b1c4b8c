import dataclasses
import errno
import json
import os
import pickle
import shutil
import threading

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import a_job, ids, shards, some_texts, vectors, write
from oracle import require

from bertjax import SentenceEncoder
from bertjax.corpus import Job, SentenceVectors, TableComputer, plan, run
from bertjax.corpus.folder import JobFolder
from bertjax.corpus.sentences import LoadedVectors
from bertjax.errors import ConfigError, InputError, JobError, SourceError

ONE = jax.devices()[:1]
TEXTS = some_texts(300)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """300 texts in four files."""
    folder = tmp_path_factory.mktemp("corpus")
    names = ["a.parquet", "b.jsonl.gz", "c.csv", "d.arrow"]
    for name, start in zip(names, range(0, 300, 75), strict=True):
        write(folder / name, TEXTS[start : start + 75], start)
    return folder


@pytest.fixture(scope="module")
def expected(sentence_folder):
    return SentenceEncoder.from_pretrained(sentence_folder, max_seq_length=20).encode(TEXTS)


@pytest.fixture(scope="module")
def finished(corpus, sentence_folder, tmp_path_factory):
    """The folder of a job that ran through on one device, and its summary."""
    folder = tmp_path_factory.mktemp("finished")
    summary = run(a_job(folder, sentence_folder, corpus, id="id", max_seq_length=20), devices=ONE)
    return folder / "out", summary


def test_row_i_of_the_output_is_row_i_of_the_inputs(finished, expected):
    folder, _ = finished
    table = pq.read_table(folder)
    assert table.schema.names == ["id", "embedding"]
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 16)
    assert table["id"].to_pylist() == ids(300)
    np.testing.assert_allclose(vectors(folder), expected, rtol=0, atol=1e-6)
    assert sorted(path.name for path in folder.glob("*.parquet")) == [f"part-{index:05}.parquet" for index in range(5)]
    assert [pq.read_metadata(path).num_rows for path in sorted(folder.glob("*.parquet"))] == [64, 64, 64, 64, 44]


def test_counts_are_exact(finished, sentence_folder):
    folder, summary = finished
    tokens = SentenceEncoder.from_pretrained(sentence_folder).tokenizer(TEXTS, max_length=20)
    counts = summary.counts
    assert (counts.rows, counts.bad, counts.empty) == (300, 0, TEXTS.count(""))
    assert counts.tokens == sum(map(len, tokens.input_ids))
    assert counts.truncated == tokens.truncated.sum() > 0
    assert counts.tokens < counts.positions < 1.5 * counts.tokens
    saved = json.loads((folder / "_summary.json").read_text())
    assert {name: saved[name] for name in dataclasses.asdict(counts)} == dataclasses.asdict(counts)
    assert saved["last_run"]["rows"] == 300
    assert 0 < saved["last_run"]["compiles"] <= 8


def test_nothing_but_shards_is_left(finished):
    folder, _ = finished
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    of_shards = [f"part-{index:05}" for index in range(5)]
    assert names == [
        *(f"_job/{name}" for name in ["job.json", *(f"{each}.json" for each in of_shards)]),
        "_summary.json",
        *(f"{each}.parquet" for each in of_shards),
    ]


@pytest.mark.parametrize("lost", [[0], [1, 3], [4], [0, 1, 2, 3, 4]])
def test_missing_shards_are_made_again_with_the_same_bytes(finished, corpus, sentence_folder, tmp_path, lost):
    folder, summary = finished
    job = a_job(folder.parent, sentence_folder, corpus, id="id", max_seq_length=20)
    before = shards(folder)
    for index in lost:
        (folder / f"part-{index:05}.parquet").unlink()
    left = [".part-00001.parquet.0123.tmp", "_job/.part-00001.json.45.tmp", "_job/.part-00002.json.6.tmp"]
    for name in [*left, "_job/part-00002.lock"]:
        (folder / name).write_bytes(b"left by a worker that was killed")
    again = run(job, devices=ONE)
    assert again.rows_now == sum([64, 64, 64, 64, 44][index] for index in lost)
    assert again.counts == summary.counts
    assert shards(folder) == before
    assert not [path for path in folder.rglob("*part-*") if path.suffix in (".tmp", ".lock")]


def test_some_shards_may_be_asked_for(corpus, sentence_folder, finished, tmp_path):
    job = pickle.loads(pickle.dumps(a_job(tmp_path, sentence_folder, corpus, id="id", max_seq_length=20)))
    assert plan(job, ONE).num_shards == 5
    part = run(job, [3, 1], devices=ONE)
    assert (part.shards, part.rows_now, part.is_done) == (2, 128, False)
    assert not (tmp_path / "out" / "_summary.json").exists()
    assert run(job, devices=ONE).is_done
    assert shards(tmp_path / "out") == shards(finished[0])


def test_eight_devices_give_the_same_numbers(corpus, sentence_folder, tmp_path, expected, monkeypatch):
    used = []
    original = LoadedVectors.run

    def spy(self, batch):
        result = original(self, batch)
        used.append((batch.input_ids.shape[0], len(result.sharding.device_set), result.sharding.is_fully_replicated))
        return result

    monkeypatch.setattr(LoadedVectors, "run", spy)
    assert len(jax.devices()) == 8
    summary = run(a_job(tmp_path, sentence_folder, corpus, id="id", max_seq_length=20))
    np.testing.assert_allclose(vectors(tmp_path / "out"), expected, rtol=0, atol=1e-6)
    assert all(rows % 8 == 0 and devices == 8 and not replicated for rows, devices, replicated in used)
    assert 0 < summary.compiles <= 8


@pytest.mark.parametrize("kind", ["float16", "int8", "binary"])
@pytest.mark.parametrize("form", ["parquet", "npy"])
def test_quantised_vectors_are_those_of_sentence_transformers(corpus, sentence_folder, tmp_path, expected, kind, form):
    job = a_job(tmp_path, sentence_folder, corpus, vectors=kind, max_seq_length=20, format=form)
    summary = run(job, devices=ONE)
    paths = sorted((tmp_path / "out").glob("part-*"))
    found = np.concatenate([np.load(path) for path in paths]) if form == "npy" else vectors(tmp_path / "out")
    assert len(found) == summary.counts.rows == 300
    if kind == "float16":
        assert found.dtype == np.float16
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
        return
    quantise = require("sentence_transformers.quantization").quantize_embeddings
    if kind == "binary":
        assert found.dtype == np.uint8
        clear = (np.abs(expected) > 1e-6).reshape(300, -1, 8).all(-1)  # nothing that rounding could turn
        np.testing.assert_array_equal(found[clear], quantise(expected, "ubinary")[clear])
        assert clear.mean() > 0.99
        return
    assert found.dtype == np.int8
    ranges = np.array(plan(job, ONE).calibration, np.float32)
    np.testing.assert_allclose(ranges, [expected.min(axis=0), expected.max(axis=0)], rtol=0, atol=1e-6)
    theirs = quantise(expected, "int8", ranges=ranges).astype(int)
    steps = 255 * (expected - ranges[0]) / (ranges[1] - ranges[0])
    clear = np.abs(steps - np.round(steps)) > 1e-3  # no edge between two steps, which rounding could cross
    np.testing.assert_array_equal(found[clear], theirs[clear])
    assert np.abs(found - theirs).max() <= 1
    assert clear.mean() > 0.99


def test_kept_columns_keep_their_types_and_values(sentence_folder, tmp_path):
    table = {
        "id": pa.array([3, 3, None], pa.int16()),
        "when": pa.array([1, 2, 3], pa.timestamp("ms", "UTC")),
        "tags": pa.array([["a"], [], None], pa.list_(pa.string())),
        "text": ["a cat", "a dog", ""],
        "other": [1, 2, 3],
    }
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    run(a_job(tmp_path, sentence_folder, tmp_path / "a.parquet", id="id", keep=("when", "tags")), devices=ONE)
    found = pq.read_table(tmp_path / "out")
    assert found.schema.names == ["id", "when", "tags", "embedding"]
    for name in ("id", "when", "tags"):
        assert found[name].combine_chunks() == table[name]


def test_files_may_differ_in_types_that_go_together(sentence_folder, tmp_path):
    pq.write_table(pa.table({"n": pa.array([1], pa.int32()), "text": ["a"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"n": pa.array([2.5], pa.float64()), "text": ["b"]}), tmp_path / "b.parquet")
    run(a_job(tmp_path, sentence_folder, tmp_path / "?.parquet", keep=("n",)), devices=ONE)
    assert pq.read_table(tmp_path / "out")["n"].to_pylist() == [1.0, 2.5]
    pq.write_table(pa.table({"n": ["x"], "text": ["b"]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match="the files differ in the types of the columns to keep"):
        plan(a_job(tmp_path / "other", sentence_folder, tmp_path / "?.parquet", keep=("n",)), ONE)


POISONED = {3: None, 70: "\ud800", 71: 5, 130: None}


@pytest.fixture
def poisoned(tmp_path):
    """Texts some of which are none, in a file of JSON lines."""
    with open(tmp_path / "a.jsonl", "w") as file:
        for row, text in enumerate(TEXTS[:200]):
            file.write(json.dumps({"id": row, "text": POISONED.get(row, text)}) + "\n")
    return tmp_path / "a.jsonl"


def test_bad_rows_are_skipped_and_told_of(sentence_folder, tmp_path, poisoned, expected):
    summary = run(a_job(tmp_path, sentence_folder, poisoned, id="id", max_seq_length=20, on_bad="skip"), devices=ONE)
    assert (summary.counts.rows, summary.counts.bad) == (200, 4)
    table = pq.read_table(tmp_path / "out")
    assert table["id"].to_pylist() == list(range(200))
    for row, vector in enumerate(table["embedding"].to_pylist()):
        if row in POISONED:
            assert vector == [None] * 16
        else:
            np.testing.assert_allclose(vector, expected[row], rtol=0, atol=1e-6)
    told = {path.name: path.read_text().splitlines() for path in sorted((tmp_path / "out" / "_bad").iterdir())}
    assert list(told) == ["part-00000.jsonl", "part-00001.jsonl", "part-00002.jsonl"]
    rows = [json.loads(line) for lines in told.values() for line in lines]
    assert [row["row"] for row in rows] == [row["row_in_file"] for row in rows] == list(POISONED)
    assert {row["file"] for row in rows} == {str(poisoned)}
    reasons = ["'text' is None", "has a lone surrogate", "'text' is 5, expected a text", "'text' is None"]
    for row, reason in zip(rows, reasons, strict=True):
        assert reason in row["reason"]


@pytest.mark.parametrize(("kind", "missing"), [("float32", np.nan), ("float16", np.nan), ("int8", 0), ("binary", 0)])
def test_bad_rows_of_arrays(sentence_folder, tmp_path, kind, missing):
    (tmp_path / "a.jsonl").write_text('{"text": "a cat"}\nnonsense\n{"text": ""}\n')
    job = a_job(tmp_path, sentence_folder, tmp_path / "a.jsonl", vectors=kind, format="npy", on_bad="skip")
    run(job, devices=ONE)
    found = np.load(tmp_path / "out" / "part-00000.npy")
    assert len(found) == 3
    np.testing.assert_array_equal(found[1], np.full(found.shape[1], missing, found.dtype))
    assert (found[0] != found[1]).any()


def test_a_file_of_nothing_but_bad_rows(sentence_folder, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + "nonsense\n" * 150)
    summary = run(a_job(tmp_path, sentence_folder, tmp_path / "a.jsonl", on_bad="skip"), devices=ONE)
    assert (summary.counts.rows, summary.counts.bad) == (151, 150)
    vectors_ = pq.read_table(tmp_path / "out")["embedding"].combine_chunks()
    assert vectors_.flatten().null_count == 150 * 16


def test_a_bad_row_stops_the_job_which_can_go_on_without_it(sentence_folder, tmp_path, poisoned):
    job = a_job(tmp_path, sentence_folder, poisoned, id="id", max_seq_length=20)
    with pytest.raises(
        InputError, match=r"a\.jsonl: row 3 \(row 3 of the job\): field 'text' is None, .*--on-bad skip"
    ):
        run(job, devices=ONE)
    with pytest.raises(InputError, match=r"row 130"):
        run(job, [2], devices=ONE)
    assert run(job, [3], devices=ONE).shards == 1
    done = run(dataclasses.replace(job, on_bad="skip"), devices=ONE)
    assert (done.rows_now, done.counts.bad, done.is_done) == (192, 4, True)


def test_no_rows_make_a_file_without_rows(sentence_folder, tmp_path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text("")
    for form in ("parquet", "npy"):
        folder = tmp_path / form
        inputs = [tmp_path / "a.parquet", tmp_path / "b.jsonl"]
        summary = run(a_job(folder, sentence_folder, *inputs, format=form, vectors="int8"), devices=ONE)
        assert (summary.counts.rows, summary.num_shards, summary.counts.fill) == (0, 1, 1.0)
    assert pq.read_table(tmp_path / "parquet" / "out").num_rows == 0
    assert np.load(tmp_path / "npy" / "out" / "part-00000.npy").shape == (0, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_seq_length": 30}, "max_seq_length was 20, is 30"),
        ({"prompt_name": "query"}, 'prompt_name was null, is "query"'),
        ({"vectors": "float16"}, 'vectors was "float32", is "float16"'),
        ({"shard_rows": 65}, "shard_rows was 64, is 65"),
        ({"id": None}, 'id was "id", is null'),
        ({"keep": ("text",)}, r'keep was \[\], is \["text"\]'),
    ],
)
def test_another_job_in_the_same_folder_is_refused(finished, corpus, sentence_folder, change, message):
    folder, _ = finished
    options = {"id": "id", "max_seq_length": 20, **change}
    before = shards(folder)
    with pytest.raises(JobError, match=rf"holds another job, .*: {message}\. Give the same"):
        run(a_job(folder.parent, sentence_folder, corpus, **options), devices=ONE)
    assert shards(folder) == before


def test_another_model_is_noticed_whatever_it_is_called(corpus, sentence_folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(sentence_folder, model)
    job = a_job(tmp_path, sentence_folder, corpus / "c.csv")
    run(job, devices=ONE)
    moved = dataclasses.replace(job, work=SentenceVectors(str(model)))
    assert run(moved, devices=ONE).rows_now == 0
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(JobError, match=r'model was "[0-9a-f]{15}'):
        run(moved, devices=ONE)


def test_inputs_that_changed_are_named(sentence_folder, tmp_path):
    first, second = (write(tmp_path / name, TEXTS[:5]) for name in ("a.txt", "b.txt"))
    job = a_job(tmp_path, sentence_folder, tmp_path / "*.txt")
    run(job, devices=ONE)
    write(tmp_path / "c.txt", TEXTS[:5])
    with pytest.raises(JobError, match=r"c\.txt is new"):
        run(job, devices=ONE)
    (tmp_path / "c.txt").unlink()
    swapped = dataclasses.replace(job, inputs=(str(second), str(first)))
    with pytest.raises(JobError, match="the inputs come in another order"):
        run(swapped, devices=ONE)
    first.write_text("other\n" * 5)
    with pytest.raises(JobError, match=r"a\.txt has changed since"):
        run(job, devices=ONE)
    first.unlink()
    with pytest.raises(JobError, match=r"a\.txt is gone"):
        run(job, devices=ONE)


def test_a_damaged_output_is_noticed(corpus, sentence_folder, tmp_path):
    job = a_job(tmp_path, sentence_folder, corpus / "c.csv")
    run(job, devices=ONE)
    path = tmp_path / "out" / "part-00001.parquet"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(JobError, match=r"part-00001\.parquet: has \d+ bytes, \d+ were written; remove it"):
        run(job, devices=ONE)
    path.unlink()
    assert run(job, devices=ONE).is_done
    assert path.read_bytes() == data


def test_a_folder_with_something_else_in_it_is_refused(corpus, sentence_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("all of it")
    with pytest.raises(JobError, match=r"holds thesis\.tex and no job"):
        run(a_job(tmp_path, sentence_folder, corpus / "c.csv"), devices=ONE)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"text": None}, InputError, r"2 columns of texts \('id', 'text'\) to choose from; name one with text="),
        ({"text": "body"}, InputError, "has no column 'body'"),
        ({"text": "n"}, InputError, "column 'n' holds int64, not texts; columns of texts: 'id', 'text'"),
        ({"id": "key"}, InputError, "has no column 'key'"),
        ({"keep": ("row",)}, ConfigError, "would have two columns 'row'"),
        ({"text": ("id", "text")}, InputError, "text names 2 columns, and the work reads 1"),
        ({"format": "npy", "id": "id"}, InputError, "a .npy file has no room for id"),
        ({"id": "id", "keep": ("id",)}, InputError, "kept twice"),
        ({"shard_rows": 0}, InputError, "shard_rows is 0"),
        ({"format": "csv"}, InputError, "format is 'csv'"),
        ({"vectors": "int4"}, InputError, "vectors is 'int4'"),
    ],
)
def test_what_can_not_be_is_refused_before_anything_is_written(sentence_folder, tmp_path, options, error, message):
    table = pa.table({"id": ["a"], "text": ["b"], "n": [1], "row": [2]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(error, match=message):
        run(a_job(tmp_path, sentence_folder, tmp_path / "a.parquet", **options), devices=ONE)
    assert not list((tmp_path / "out").rglob("*.json"))


def test_the_only_column_of_texts_is_found(sentence_folder, tmp_path):
    write(tmp_path / "a.parquet", TEXTS[:3])
    found = plan(a_job(tmp_path, sentence_folder, tmp_path / "a.parquet", text=None, id="id"), ONE)
    assert found.text == ("text",)


def test_a_truncated_input_is_an_error_and_once_whole_is_read(sentence_folder, tmp_path):
    path = write(tmp_path / "a.jsonl.gz", TEXTS[:100])
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    job = a_job(tmp_path, sentence_folder, path)
    with pytest.raises(SourceError, match=r"a\.jsonl\.gz: can't be read \(.*is it whole"):
        run(job, devices=ONE)
    path.write_bytes(data)
    assert run(job, devices=ONE).counts.rows == 100


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("form", ["parquet", "npy"])
def test_a_disk_that_fails_leaves_nothing_half_written(corpus, sentence_folder, tmp_path, monkeypatch, number, form):
    job = a_job(tmp_path, sentence_folder, corpus, max_seq_length=20, format=form)
    plan(job, ONE)
    calls = []
    fsync = os.fsync

    def failing(descriptor):
        calls.append(descriptor)
        if len(calls) == 6:
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(SourceError, match=rf"part-0000\d\.{form}: can't be written \({os.strerror(number)}\)"):
        run(job, devices=ONE)
    monkeypatch.setattr(os, "fsync", fsync)
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == ["_job", f"part-00000.{form}"]
    run(job, devices=ONE)
    whole = run(dataclasses.replace(job, out=str(tmp_path / "whole")), devices=ONE)
    assert whole.is_done
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


def test_out_of_device_memory_halves_the_steps(corpus, sentence_folder, tmp_path, expected, monkeypatch):
    original, seen = LoadedVectors.run, []

    def small(self, batch):
        seen.append(len(batch.input_ids))
        if len(batch.input_ids) > 2:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes")
        return original(self, batch)

    monkeypatch.setattr(LoadedVectors, "run", small)
    run(a_job(tmp_path, sentence_folder, corpus, max_seq_length=20), devices=ONE)
    np.testing.assert_allclose(vectors(tmp_path / "out"), expected, rtol=0, atol=1e-6)
    assert max(seen) > 2 >= seen[-1]
    assert sum(rows > 2 for rows in seen) < 10  # what had no room once is not tried again


def test_a_row_that_does_not_fit_into_memory_is_an_error(corpus, sentence_folder, tmp_path, monkeypatch):
    def none(self, batch):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(LoadedVectors, "run", none)
    with pytest.raises(MemoryError, match="no room for a single row of"):
        run(a_job(tmp_path, sentence_folder, corpus), devices=ONE)


def test_a_job_that_is_asked_to_stop_finishes_the_shard_in_hand(corpus, sentence_folder, tmp_path, monkeypatch):
    job = a_job(tmp_path, sentence_folder, corpus, id="id", max_seq_length=20)
    stop = threading.Event()
    original = JobFolder.publish

    def publish(self, claim, *args):
        original(self, claim, *args)
        stop.set()

    monkeypatch.setattr(JobFolder, "publish", publish)
    for shards_then in (1, 2):
        stop.clear()
        assert run(job, devices=ONE, stop=stop).shards == shards_then
        names = sorted(path.name for path in (tmp_path / "out").iterdir())
        assert names == ["_job", *(f"part-{index:05}.parquet" for index in range(shards_then))]
    stop.set()
    assert run(job, devices=ONE, stop=stop).shards == 2
    monkeypatch.undo()
    assert run(job, devices=ONE).is_done


def test_progress_is_shown(corpus, sentence_folder, tmp_path, capsys):
    job = a_job(tmp_path, sentence_folder, corpus, max_seq_length=20)
    run(job, [0, 1], devices=ONE, show_progress_bar=True)
    shown = capsys.readouterr().err
    assert "/300 [" in shown
    assert "tokens/s, " in shown
    assert "% fill" in shown
    run(job, devices=ONE)
    assert capsys.readouterr().err == ""


def test_tables_are_computed_without_files(sentence_folder, corpus, tmp_path, expected):
    work = SentenceVectors(str(sentence_folder), max_seq_length=20)
    computer = TableComputer(work, "text", on_bad="skip", devices=ONE)
    table = pa.table({"text": pa.chunked_array([TEXTS[:7], [None], TEXTS[7:]]), "n": range(301)})
    found = computer(table)
    assert found.schema.names == ["text", "n", "embedding"]
    assert found.select(["text", "n"]) == table
    column = found["embedding"].combine_chunks()
    assert [index for index in range(301) if column[index].as_py() == [None] * 16] == [7]
    numbers = column.flatten().drop_null().to_numpy().reshape(300, 16)
    np.testing.assert_allclose(numbers, expected, rtol=0, atol=1e-6)
    assert computer(table.slice(0, 0)).num_rows == 0
    with pytest.raises(InputError, match="row 7 of the table: 'text' is null"):
        TableComputer(work, "text", devices=ONE)(table)
    with pytest.raises(
        InputError, match=r"'n' is no column of texts; its columns are 'text' \(string\), 'n' \(int64\)"
    ):
        TableComputer(work, "n", devices=ONE)(table)
    with pytest.raises(InputError, match="has a column 'embedding' already"):
        computer(found)
    with pytest.raises(ConfigError, match="int8 vectors go by the ranges of a sample"):
        TableComputer(SentenceVectors(str(sentence_folder), vectors="int8"), "text", devices=ONE)
    job = a_job(tmp_path, sentence_folder, corpus, max_seq_length=20, vectors="int8")
    run(job, devices=ONE)
    by_plan = TableComputer(job.work, "text", plan=plan(job, ONE), devices=ONE)(pa.table({"text": TEXTS}))
    ours = by_plan["embedding"].combine_chunks().flatten().to_numpy().reshape(300, 16)
    assert np.abs(ours.astype(int) - vectors(tmp_path / "out")).max() <= 1


def test_a_job_is_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = Job("a.txt", "out", SentenceVectors("m"), text="text")
    assert (job.inputs, job.out, job.text) == ((str(tmp_path / "a.txt"),), str(tmp_path / "out"), ("text",))


def test_a_parquet_file_with_bad_rows_can_be_read(sentence_folder, tmp_path):
    """pyarrow up to 25 can't read back a null among vectors."""
    vectors_ = pa.array([[1.0, 2.0], None, [3.0, 4.0]], pa.list_(pa.float32(), 2))
    pq_path = tmp_path / "a.arrow"
    table = pa.table({"text": ["a cat", None, "a dog"], "kept": vectors_})
    with pa.ipc.new_file(pq_path, table.schema) as writer:
        writer.write_table(table)
    run(a_job(tmp_path, sentence_folder, pq_path, keep=("kept",), on_bad="skip"), devices=ONE)
    found = pq.read_table(tmp_path / "out")
    assert found["kept"].to_pylist() == [[1.0, 2.0], None, [3.0, 4.0]]
    first, bad, last = found["embedding"].to_pylist()
    assert bad == [None] * 16
    assert None not in [*first, *last]
    of_table = TableComputer(SentenceVectors(str(sentence_folder)), "text", on_bad="skip", devices=ONE)(table)
    pq.write_table(of_table.select(["embedding"]), tmp_path / "b.parquet")
    assert pq.read_table(tmp_path / "b.parquet")["embedding"].to_pylist()[1] == bad


def test_csv_beside_large_strings_keeps_their_type(sentence_folder, tmp_path):
    (tmp_path / "a.csv").write_text("text,k\na cat,1\n")
    pq.write_table(pa.table({"text": ["a dog"], "k": pa.array(["2"], pa.large_string())}), tmp_path / "b.parquet")
    run(a_job(tmp_path, sentence_folder, tmp_path / "?.*", keep=("k",)), devices=ONE)
    assert pq.read_table(tmp_path / "out")["k"].to_pylist() == ["1", "2"]


@pytest.mark.parametrize(
    ("lines", "keep", "message"),
    [
        ('{"text": "a", "k": {}}\n', ("k",), r"column 'k' \(struct<>\) can't be written to Parquet"),
        ('{"n": 1}\n', (), "there is no column of texts"),
    ],
)
def test_what_can_not_be_written_is_refused_before_anything_is_computed(
    sentence_folder, tmp_path, lines, keep, message
):
    (tmp_path / "a.jsonl").write_text(lines)
    with pytest.raises(InputError, match=message):
        plan(a_job(tmp_path, sentence_folder, tmp_path / "a.jsonl", keep=keep, text=None), ONE)


def test_a_kept_value_that_is_no_text_is_a_bad_row(sentence_folder, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "k": "x"}\n{"text": "b", "k": "\\ud800"}\n')
    summary = run(a_job(tmp_path, sentence_folder, tmp_path / "a.jsonl", keep=("k",), on_bad="skip"), devices=ONE)
    assert (summary.counts.rows, summary.counts.bad) == (2, 1)
    assert pq.read_table(tmp_path / "out")["k"].to_pylist() == ["x", None]


@pytest.mark.parametrize("index", [5, -1, 0.5])
def test_a_shard_that_a_job_does_not_have_is_refused(sentence_folder, corpus, tmp_path, index):
    job = a_job(tmp_path, sentence_folder, corpus, id="id", max_seq_length=20)
    with pytest.raises(InputError, match=f"shards has {index}, and the job has 5, numbered from 0"):
        run(job, [0, index], devices=ONE)
    assert not list(job.folder.glob("part-*"))


def test_more_shards_than_names_that_sort_are_refused(sentence_folder, tmp_path):
    pq.write_table(pa.table({"text": pa.array(["a"] * 100_001)}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"100,001 rows are 100,001 files of 1, .* raise shard_rows"):
        plan(a_job(tmp_path, sentence_folder, tmp_path / "a.parquet", shard_rows=1), ONE)


def test_what_is_said_of_a_shard_that_makes_no_sense_is_named(sentence_folder, corpus, tmp_path):
    job = a_job(tmp_path, sentence_folder, corpus, id="id", max_seq_length=20)
    run(job, [0], devices=ONE)
    (job.folder / "_job" / "part-00000.json").write_text("{}")
    with pytest.raises(JobError, match=r"does not say what is in .*part-00000.parquet; remove the shard"):
        run(job, devices=ONE)
