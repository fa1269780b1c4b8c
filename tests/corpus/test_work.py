import dataclasses
import json

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import DATA
from corpora import write

from bertjax import CrossEncoder, SparseEncoder, TextClassification, TokenClassification
from bertjax.corpus import Entities, Job, Labels, PairScores, SentenceVectors, SparseVectors, run

ONE = jax.devices()[:1]
CLASSIFIER, SPLADE = (str(DATA / "tasks" / name / "model") for name in ("classification", "fill_mask"))
TEXTS = ["The storm was the worst in Paris.", "", "She went to the naïve café"] * 30


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return str(write(tmp_path_factory.mktemp("texts") / "a.jsonl", TEXTS))


def results(job):
    summary = run(job, devices=ONE)
    assert summary.counts.rows == len(TEXTS)
    return pq.read_table(job.out).to_pylist()


def test_labels(texts, tmp_path):
    task = TextClassification.from_pretrained(CLASSIFIER)
    one = results(Job(texts, str(tmp_path / "one"), Labels(model=CLASSIFIER), text="text", shard_rows=40))
    for row, expected in zip(one, task(TEXTS), strict=True):
        assert row["label"] == expected.label
        assert abs(row["score"] - expected.score) < 1e-5
    work = Labels(model=CLASSIFIER, top_k=2, function_to_apply="none")
    two = results(Job(texts, str(tmp_path / "two"), work, text="text", shard_rows=40))
    for row, expected in zip(two, task(TEXTS, top_k=2, function_to_apply="none"), strict=True):
        assert [label["label"] for label in row["labels"]] == [label.label for label in expected]
        np.testing.assert_allclose(
            [label["score"] for label in row["labels"]], [label.score for label in expected], rtol=0, atol=1e-5
        )


def test_labels_of_pairs(tmp_path):
    pairs = [("it rained", "a goal"), ("sun", "")] * 20
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"a": first, "b": second}) + "\n" for first, second in [*pairs, ("x", None)]))
    work = Labels(model=CLASSIFIER, pair=True)
    summary = run(Job(str(path), str(tmp_path / "out"), work, text=("a", "b"), on_bad="skip"), devices=ONE)
    assert (summary.counts.rows, summary.counts.bad) == (41, 1)
    found = pq.read_table(tmp_path / "out").to_pylist()
    expected = TextClassification.from_pretrained(CLASSIFIER)(pairs)
    assert [row["label"] for row in found] == [*(label.label for label in expected), None]


@pytest.mark.slow
def test_sparse_vectors(texts, tmp_path):
    task = SparseEncoder.from_pretrained(SPLADE)
    rows = results(Job(texts, str(tmp_path / "out"), SparseVectors(model=SPLADE), text="text", shard_rows=40))
    for row, expected in zip(rows, task(TEXTS), strict=True):
        assert row["indices"] == expected.indices.tolist()
        np.testing.assert_allclose(row["values"], expected.values, rtol=0, atol=1e-5)


def test_labels_on_eight_devices(texts, tmp_path):
    summary = run(Job(texts, str(tmp_path / "out"), Labels(model=CLASSIFIER), text="text"))
    found = pq.read_table(tmp_path / "out")["label"].to_pylist()
    assert summary.counts.rows == len(found)
    assert found == [label.label for label in TextClassification.from_pretrained(CLASSIFIER)(TEXTS)]


def test_entities(tmp_path):
    model = str(DATA / "tasks" / "token_classification" / "model")
    texts = [*TEXTS[:6], "Ada Lovelace met the storm in Paris. " * 30]  # the last one in windows
    path, task = str(write(tmp_path / "a.jsonl", texts)), TokenClassification.from_pretrained(model)
    for strategy in ("simple", "none"):
        work = Entities(model=model, aggregation_strategy=strategy, ignore_labels=())
        run(Job(path, str(tmp_path / strategy), work, text="text"), devices=ONE)
        rows = pq.read_table(tmp_path / strategy)["entities"].to_pylist()
        expected = task(texts, aggregation_strategy=strategy, ignore_labels=())
        assert any(map(len, expected))
        for row, entities in zip(rows, expected, strict=True):
            for found, entity in zip(row, map(dataclasses.asdict, entities), strict=True):
                assert abs(found.pop("score") - entity.pop("score")) < 1e-5
                assert found == entity


@pytest.mark.parametrize("labels", [1, 3])
def test_scores_of_pairs(labels, cross_encoder_folder, tmp_path):
    model = str(cross_encoder_folder) if labels == 1 else CLASSIFIER
    pairs = [("who was it", "it was her"), ("sun", "")] * 10
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"q": query, "p": passage}) + "\n" for query, passage in pairs))
    run(Job(str(path), str(tmp_path / "out"), PairScores(model=model), text=("q", "p")), devices=ONE)
    found = pq.read_table(tmp_path / "out").columns[-1].to_pylist()
    np.testing.assert_allclose(found, CrossEncoder.from_pretrained(model)(pairs), rtol=0, atol=1e-5)


def test_a_model_in_a_folder_is_named_from_anywhere(monkeypatch):
    monkeypatch.chdir(DATA / "tasks")
    assert Labels(model="classification/model").model == CLASSIFIER
    assert SentenceVectors("some/repository").model == "some/repository"
