"""Work of a job on Beam's local runner."""

import importlib
import sys

import apache_beam as beam
import jax
import numpy as np
import pytest
from apache_beam.ml.inference.base import KeyedModelHandler, RunInference
from apache_beam.testing.util import assert_that
from corpora import a_job, some_texts, vectors, write

from bertjax.corpus import SentenceVectors, plan, run
from bertjax.corpus.on_beam import TableModelHandler
from bertjax.errors import InputError, SourceError

TEXTS = some_texts(150)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write(tmp_path_factory.mktemp("corpus") / "a.parquet", TEXTS)


@pytest.fixture(scope="module")
def expected(tmp_path_factory, sentence_folder, corpus):
    """The vectors of a job over files, [rows, dim]."""
    folder = tmp_path_factory.mktemp("out")
    run(a_job(folder, sentence_folder, corpus), devices=jax.devices()[:1])
    return vectors(folder / "out")


@pytest.fixture(scope="module")
def handler(sentence_folder):
    return TableModelHandler(SentenceVectors(str(sentence_folder)), "text")


@pytest.fixture(scope="module")
def computer(handler):
    return handler.load_model()


def test_results_come_in_order(handler, computer, expected):
    examples = [{"text": text, "id": index} for index, text in enumerate(TEXTS)]
    results = list(handler.run_inference(examples, computer))
    assert [result.example for result in results] == examples
    assert all(result.inference.keys() == {"embedding"} for result in results)
    found = np.stack([result.inference["embedding"] for result in results])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_examples_that_can_t_be_computed_are_named(handler, computer, sentence_folder):
    def compute(*examples, of=handler):
        return list(of.run_inference(examples, computer))

    with pytest.raises(InputError, match="example 1 of the batch has no field 'text'"):
        compute({"text": "a cat"}, {"body": "a dog"})
    with pytest.raises(InputError, match="example 0 of the batch has no field 'text'"):
        compute("a cat")
    with pytest.raises(InputError, match=r"example 0 of the batch is NoneType, expected 1 text\(s\)"):
        compute({"text": None})
    plain = TableModelHandler(SentenceVectors(str(sentence_folder)))
    with pytest.raises(InputError, match="example 1 of the batch is dict, expected 1 text"):
        compute("a cat", {"text": "a dog"}, of=plain)
    with pytest.raises(InputError, match=r"no Unicode \(surrogates not allowed\)"):
        compute("a cat", "a \ud800", of=plain)


def test_options_that_are_no_use_are_refused(handler, sentence_folder):
    with pytest.raises(InputError, match="text names 2 fields, and the work reads 1"):
        TableModelHandler(SentenceVectors(str(sentence_folder)), ("title", "text"))
    with pytest.raises(InputError, match=r"inference_args \['top_k'\] are not known"):
        handler.validate_inference_args({"top_k": 3})


def test_batches_are_large_unless_asked(sentence_folder):
    work = SentenceVectors(str(sentence_folder))
    assert TableModelHandler(work).batch_elements_kwargs() == {"min_batch_size": 256, "max_batch_size": 4096}
    small = TableModelHandler(work, max_batch_size=8, max_batch_duration_secs=5).batch_elements_kwargs()
    assert small == {"min_batch_size": 8, "max_batch_size": 8, "max_batch_duration_secs": 5}


def test_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam.ml.inference.base", None)
    monkeypatch.delitem(sys.modules, "bertjax.corpus.on_beam")
    with pytest.raises(SourceError, match=r"pip install 'bertjax\[beam\]'"):
        importlib.import_module("bertjax.corpus.on_beam")


@pytest.mark.slow
def test_a_pipeline_equals_a_job_over_files(handler, expected):
    def check(results):
        assert [key for key, _ in sorted(results)] == list(range(len(TEXTS)))
        found = {key: result.inference["embedding"] for key, result in results}
        np.testing.assert_allclose(np.stack([found[key] for key in sorted(found)]), expected, rtol=0, atol=1e-6)

    with beam.Pipeline() as pipeline:
        examples = pipeline | beam.Create([(index, {"text": text}) for index, text in enumerate(TEXTS)])
        assert_that(examples | RunInference(KeyedModelHandler(handler)), check)


@pytest.mark.slow
def test_bad_examples_can_be_set_aside(sentence_folder):
    handler = TableModelHandler(SentenceVectors(str(sentence_folder)), max_batch_size=1)
    with beam.Pipeline() as pipeline:
        texts = pipeline | beam.Create(["a cat", None, "a dog"])
        good, bad = texts | RunInference(handler).with_exception_handling()
        assert_that(good, lambda results: check_examples(results, ["a cat", "a dog"]))
        failed = bad.failed_inferences | beam.Map(lambda failure: failure[0])
        assert_that(failed, lambda batches: check_examples(batches, None), label="bad")


def check_examples(results, expected):
    if expected is None:
        assert list(results) == [[None]]
    else:
        assert sorted(result.example for result in results) == expected


@pytest.mark.slow
def test_int8_vectors_go_by_a_plan(sentence_folder, corpus, tmp_path):
    job = a_job(tmp_path, sentence_folder, corpus, vectors="int8")
    one = jax.devices()[:1]
    planned = plan(job, one)
    run(job, devices=one)
    handler = TableModelHandler(job.work, plan=planned)
    found = [result.inference["embedding"] for result in handler.run_inference(TEXTS, handler.load_model())]
    assert found[0].dtype == np.int8
    # What is packed beside a text changes its last bits, and so, rarely, a step.
    assert np.abs(np.stack(found).astype(int) - vectors(tmp_path / "out")).max() <= 1
