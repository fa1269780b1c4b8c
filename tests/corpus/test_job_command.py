import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import DATA
from corpora import ids, some_texts, write
from test_cli import run

from bertjax import SentenceEncoder
from bertjax.corpus.folder import JobFolder

TEXTS = some_texts(40)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write(folder / "a.parquet", TEXTS[:25])
    write(folder / "b.csv.gz", TEXTS[25:], 25)
    return folder


def test_a_folder_becomes_a_folder(sentence_folder, inputs, tmp_path):
    options = "--field text --id id --prompt-name query --normalize --truncate-dim 8 --shard-rows 15".split()
    command = ["embed", inputs, "-m", sentence_folder, *options, "--out", tmp_path / "out"]
    result = run(*command)
    assert result.stdout == ""
    table = pq.read_table(tmp_path / "out")
    assert table["id"].to_pylist() == ids(40)
    encoder = SentenceEncoder.from_pretrained(sentence_folder)
    expected = encoder.encode(TEXTS, prompt_name="query", truncate_dim=8, normalize_embeddings=True)
    np.testing.assert_allclose(table["embedding"].to_pylist(), expected, rtol=0, atol=1e-6)
    tokens = json.loads((tmp_path / "out" / "_summary.json").read_text())["tokens"]
    empty = TEXTS.count("")
    assert result.stderr.startswith(f"40 row(s), {tokens:,} tokens, ")
    assert f" 0 truncated, {empty} empty, 0 bad; in " in result.stderr
    again = run(*command)
    assert again.stderr.endswith("0 shape(s) compiled\n")
    assert "rows/s" not in again.stderr
    changed = run(*command, "--dtype", "bfloat16", code=1)
    assert changed.stderr.startswith(f"Error: {tmp_path / 'out'}: holds another job")
    assert 'dtype was "float32", is "bfloat16"' in changed.stderr


def test_arrays_and_bad_rows(sentence_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"body": "a cat"}\nnonsense\n')
    command = ["embed", "*.jsonl", "-m", sentence_folder, "--out", "out", "--format", "npy", "--vectors", "binary"]
    stopped = run(*command, code=1)
    assert stopped.stderr == (
        f"Error: {tmp_path / 'a.jsonl'}: row 1 (row 1 of the job): not a line of JSON (Expecting value: line 1 "
        "column 1 (char 0)); on_bad='skip' (--on-bad skip) goes on without such rows\n"
    )
    assert "1 bad; in " in run(*command, "--on-bad", "skip").stderr
    assert np.load("out/part-00000.npy").dtype == np.uint8
    assert sorted(os.listdir("out")) == ["_bad", "_job", "_summary.json", "part-00000.npy"]


def test_two_columns_of_texts_need_a_name(sentence_folder, inputs, tmp_path):
    result = run("embed", inputs, "-m", sentence_folder, "--out", tmp_path / "out", code=1)
    assert "2 columns of texts ('id', 'text') to choose from; name one with text= (or --field)" in result.stderr


def test_a_column_of_texts_that_is_there_twice_is_refused(sentence_folder, tmp_path):
    (tmp_path / "a.csv").write_text("text,text\none,two\n")
    both = pa.Table.from_arrays([pa.array(["one"]), pa.array([1])], names=["text", "text"])
    pq.write_table(both, tmp_path / "b.parquet")
    for name, message in {"a.csv": "has 2 columns 'text'", "b.parquet": "has more than one column 'text'"}.items():
        options = ["-m", sentence_folder, "--field", "text", "--out", tmp_path / "out"]
        assert f"{tmp_path / name}: {message}" in run("embed", tmp_path / name, *options, code=1).stderr


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "a.jsonl"
    rows = [{"n": index, "query": "the storm", "passage": text} for index, text in enumerate(TEXTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("command", "model", "columns"),
    [
        ("classify --field passage --id n", "classification", ["n", "label", "score"]),
        ("classify --field query --pair-field passage --top-k 0", "classification", ["row", "labels"]),
        ("tag --field passage --stride 3", "token_classification", ["row", "entities"]),
        ("rank --keep n", "rank", ["row", "n", "score"]),
        ("sparse --field passage --max-active-dims 4", "fill_mask", ["row", "indices", "values"]),
    ],
)
def test_tasks_make_folders_too(command, model, columns, pairs, cross_encoder_folder, tmp_path):
    name, *options = command.split()
    model = cross_encoder_folder if model == "rank" else DATA / "tasks" / model / "model"
    result = run(name, pairs, "-m", model, *options, "--out", tmp_path / "out")
    assert result.stderr.startswith("40 row(s), ")
    table = pq.read_table(tmp_path / "out")
    assert table.column_names == columns
    assert table.num_rows == 40
    assert not any(table[name].null_count for name in columns)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("classify --out out -t text", "--text does not go with --out"),
        ("tag a.jsonl --out out -o b.jsonl", "--output does not go with --out"),
        ("sparse a.jsonl --shard-rows 5", "--shard-rows goes with --out"),
        ("classify a.jsonl --out out -l sport", "--candidate-label does not go with --out"),
        ("rank a.jsonl --out out -q what", "--query does not go with --out"),
        ("embed a.jsonl --format npy", "--format goes with --out"),
        ("tag --out out", "--out takes files, folders or patterns, not standard input"),
    ],
)
def test_options_that_have_no_effect_are_refused(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in run(*options.split(), "-m", tmp_path, code=2).stderr
    assert not list(tmp_path.iterdir())


def test_a_worker_that_finds_nothing_left_to_take_says_that_others_are_at_it(sentence_folder, inputs, tmp_path):
    options = [
        "embed",
        inputs,
        "-m",
        sentence_folder,
        "--field",
        "text",
        "--shard-rows",
        "15",
        "--out",
        tmp_path / "out",
    ]
    run(*options)
    (tmp_path / "out" / "part-00001.parquet").unlink()
    claim = JobFolder(tmp_path / "out", ".parquet").claim(1)
    result = run(*options, code=75)
    assert result.stderr.splitlines()[-1] == f"{tmp_path / 'out'}: others are at work on 1 of 3 shards"
    claim.release()
    assert "40 row(s), " in run(*options).stderr
