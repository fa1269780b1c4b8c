"""Scores for pairs of texts, and passages ranked by them: those of sentence-transformers' CrossEncoder."""

import json
import shutil

import numpy as np
import pytest
from conftest import compiles
from oracle import require
from test_classification import EXPECTED, FOLDER, TOKENIZER

from bertjax import convert_checkpoint
from bertjax.errors import ConfigError, InputError, SourceError
from bertjax.tasks.rank import CrossEncoder, RankedDocument

PAIRS = [*map(tuple, EXPECTED["pairs"]), ("the game", ""), ("she was happy", "the song is sad"), ("sun", "sun")]
QUERY = "who won the game?"
PASSAGES = [text for text in EXPECTED["texts"] if text] + ["The team won it.", "rain and storm", "the old team"]
SIGMOID, IDENTITY = "torch.nn.modules.activation.Sigmoid", "torch.nn.modules.linear.Identity"


def load(folder, **options):
    """The task that a folder holds; with few shapes, so that little is compiled."""
    return CrossEncoder.from_pretrained(folder, step_tokens=160, **options)


def change(folder, name, **fields):
    """Changes fields of one of a folder's JSON files."""
    content = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps(content | fields))


@pytest.fixture(scope="module")
def single(cross_encoder_folder):
    return cross_encoder_folder


@pytest.fixture(scope="module")
def task(single):
    return load(single)


@pytest.fixture
def copy(single, tmp_path):
    return shutil.copytree(single, tmp_path / "copy")


def reference(folder, **options):
    return require("sentence_transformers").CrossEncoder(str(folder), device="cpu", **options)


@pytest.mark.parametrize(
    ("fields", "activation"),
    [
        ({}, "sigmoid"),
        ({"sentence_transformers": {"activation_fn": IDENTITY, "version": "5.0.0"}}, "identity"),
        ({"sbert_ce_default_activation_function": IDENTITY}, "identity"),
        ({"sbert_ce_default_activation_function": "torch.nn.Sigmoid"}, "sigmoid"),
        (
            {"sentence_transformers": {"activation_fn": None}, "sbert_ce_default_activation_function": IDENTITY},
            "sigmoid",
        ),
    ],
)
def test_scores_are_those_of_sentence_transformers(copy, fields, activation):
    change(copy, "config.json", **fields)
    task = load(copy)
    assert task.activation == activation
    expected = reference(copy).predict(PAIRS)
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(task(PAIRS), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("activation", [SIGMOID, IDENTITY])
def test_a_folder_that_sentence_transformers_saved(single, tmp_path, activation):
    torch = require("torch")
    function = {SIGMOID: torch.nn.Sigmoid, IDENTITY: torch.nn.Identity}[activation]()
    theirs = reference(single, activation_fn=function, max_length=20)
    theirs.save_pretrained(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "modules.json").exists()
    task = load(tmp_path / "saved")
    assert task.max_length == 20
    convert_checkpoint(tmp_path / "saved", tmp_path / "converted", to="msgpack")
    converted = load(tmp_path / "converted")
    assert (converted.max_length, converted.activation) == (20, task.activation)
    np.testing.assert_allclose(task(PAIRS), theirs.predict(PAIRS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("activation", ["sigmoid", "identity"])
def test_a_folder_that_was_saved_is_the_same_task_here_and_there(copy, tmp_path, activation):
    # What the folder said before is not what the task does.
    change(copy, "config.json", sbert_ce_default_activation_function=SIGMOID)
    task = load(copy, activation_fn=activation, max_length=12)
    task.save_pretrained(tmp_path / "saved")
    again, theirs = load(tmp_path / "saved"), reference(tmp_path / "saved")
    assert (again.activation, again.max_length, theirs.max_seq_length) == (activation, 12, 12)
    expected = task([[*pair] for pair in PAIRS])
    assert again(PAIRS) == expected
    np.testing.assert_allclose(theirs.predict(PAIRS), expected, rtol=0, atol=1e-5)
    # Before version 5.4 nothing but config.json is read.
    for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        (tmp_path / "saved" / name).unlink()
    assert load(tmp_path / "saved")(PAIRS) == expected
    np.testing.assert_allclose(reference(tmp_path / "saved").predict(PAIRS), expected, rtol=0, atol=1e-5)
    with pytest.raises(SourceError, match="exists"):
        task.save_pretrained(tmp_path / "saved")
    task.save_pretrained(tmp_path / "saved", force=True)


def test_several_labels_have_logits_or_a_softmax():
    theirs = reference(FOLDER)
    task = load(FOLDER)
    for apply_softmax in (False, True):
        found = task(PAIRS, apply_softmax=apply_softmax)
        expected = theirs.predict(PAIRS, apply_softmax=apply_softmax)
        assert isinstance(found[0], list)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="model of one label, and this one has 3"):
        task.rank(QUERY, PASSAGES)


def test_ranks_are_those_of_sentence_transformers(single, task):
    theirs = reference(single)
    for options in ({}, {"top_k": np.int64(3), "return_documents": True}, {"top_k": 99}):
        found, expected = task.rank(QUERY, PASSAGES, **options), theirs.rank(QUERY, PASSAGES, **options)
        assert [each.corpus_id for each in found] == [each["corpus_id"] for each in expected]
        assert [each.text for each in found] == [each.get("text") for each in expected]
        scores = [each["score"] for each in expected]
        np.testing.assert_allclose([each.score for each in found], scores, rtol=0, atol=1e-5)


def test_passages_of_one_score_keep_their_order(single):
    task = load(single)
    for parameter in (task.model.classifier.kernel, task.model.classifier.bias):
        parameter[...] = 0 * parameter[...]
    expected = [RankedDocument(index, 0.5) for index in range(len(PASSAGES))]
    assert task.rank(QUERY, PASSAGES) == expected
    assert task.rank(QUERY, PASSAGES, top_k=2) == expected[:2]


def test_packed_scores_are_those_of_rows_of_one_pair(single):
    task = load(single, activation_fn="identity")
    first, second = map(list, zip(*PAIRS, strict=True))
    alone = np.asarray(task.model(**TOKENIZER(first, second, max_length=40).padded(40)).logits)[:, 0]
    np.testing.assert_allclose(task(PAIRS), alone, rtol=0, atol=1e-5)
    order = np.random.default_rng(0).permutation(len(PAIRS))
    np.testing.assert_allclose(task([PAIRS[place] for place in order]), alone[order], rtol=0, atol=1e-5)
    for pair, score in zip(PAIRS, alone, strict=True):
        assert task(pair) == pytest.approx(float(score), abs=1e-5)


def test_a_second_call_compiles_nothing(task):
    task(PAIRS * 4)
    assert compiles(lambda: task([(second, first) for first, second in PAIRS] * 4)) == 0


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("config.json", {"sbert_ce_default_activation_function": "torch.nn.Tanh"}, "'torch.nn.Tanh'.* not supported"),
        ("config.json", {"sentence_transformers": {"activation_fn": "mine.Own"}}, "'mine.Own'.* pass 'identity'"),
        ("config.json", {"sentence_transformers": {"activation_fn": [1]}}, r"activation_fn is \[1\]"),
        ("config.json", {"sentence_transformers": "5.0"}, "sentence_transformers is '5.0', expected an object"),
    ],
)
def test_unknown_activations_are_refused(copy, name, fields, message):
    change(copy, name, **fields)
    with pytest.raises(ConfigError, match=message):
        load(copy)
    assert load(copy, activation_fn="identity").activation == "identity"


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("config_sentence_transformers.json", {"model_type": "SentenceTransformer"}, "only 'CrossEncoder' will do"),
        ("config_sentence_transformers.json", {"activation_fn": "torch.nn.ReLU"}, "'torch.nn.ReLU'.* not supported"),
        ("config_sentence_transformers.json", {"default_prompt_name": "query"}, "prompts of pairs are not supported"),
        ("sentence_bert_config.json", {"transformer_task": "text-generation"}, "transformer_task is 'text-generation'"),
        ("sentence_bert_config.json", {"max_seq_length": 0}, "max_seq_length is 0, expected a positive integer"),
        ("sentence_bert_config.json", {"unheard_of": 1}, "unknown field.s. ..unheard_of"),
        ("modules.json", [], "lists 0 module.s. in .*; only a cross-encoder of"),
        (
            "modules.json",
            [{"type": "sentence_transformers.models.Transformer", "path": "0_Transformer"}],
            "lists 1 module.s. in ..0_Transformer",
        ),
        ("modules.json", ["x"], "entry 0 is 'x', expected a module's type and path"),
    ],
)
def test_other_folders_of_sentence_transformers_are_refused(copy, name, fields, message):
    kind = "sentence_transformers.base.modules.transformer.Transformer"
    (copy / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": kind}]))
    change(copy, "config_sentence_transformers.json", model_type="CrossEncoder")
    change(copy, "sentence_bert_config.json", max_seq_length=30)
    assert load(copy).max_length == 30
    if isinstance(fields, dict):
        change(copy, name, **fields)
    else:
        (copy / name).write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=message):
        load(copy)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda task: task([("a", "b")], apply_softmax=True), InputError, "apply_softmax is for models of several"),
        (lambda task: task([("a", "b"), "c"]), InputError, r"inputs\[1\] is no pair of texts; pass a tuple"),
        (lambda task: task.rank("a", "passage"), InputError, "documents is a str, expected a list"),
        (lambda task: task.rank("a", {"b", "c"}), InputError, "documents is a set, expected a list"),
        (lambda task: task.rank("a", ["b", None]), InputError, r"documents\[1\] is None of type NoneType"),
        (lambda task: task.rank("a", ["b", "\ud800"]), InputError, r"documents\[1\] has a lone surrogate"),
        (lambda task: task.rank(5, ["b"]), InputError, "query is 5 of type int, not a str"),
        (lambda task: task.rank(5, []), InputError, "query is 5"),
        (lambda task: task([("a", "b")], apply_softmax="no"), InputError, "apply_softmax is 'no', expected one of"),
        (lambda task: task.rank("a", ["b"], top_k=0), InputError, "top_k is 0"),
    ],
)
def test_unusable_inputs_and_options_are_refused(task, call, error, message):
    with pytest.raises(error, match=message):
        call(task)


def test_no_passages_have_no_ranks(task):
    assert task.rank(QUERY, []) == []
    assert task.rank(QUERY, (text for text in PASSAGES[:1]))[0].corpus_id == 0
