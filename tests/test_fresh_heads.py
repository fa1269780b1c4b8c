"""Heads that a checkpoint lacks: made only on request, said aloud, and what transformers loads afterwards."""

import json
import logging
import re
import sys

import jax
import numpy as np
import pytest
from conftest import DATA, tolerance
from flax import nnx
from oracle import require
from safetensors.numpy import load_file, save_file

import bertjax
from bertjax import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification, BertModel
from bertjax.convert.files import INDEX_FILE, SINGLE_FILE
from bertjax.errors import CheckpointError, ConfigError, InputError
from bertjax.fresh import initialise
from bertjax.pretrained import abstract, from_pretrained, parameters

HEADS = DATA / "heads"
IDS = np.random.default_rng(0).integers(1, 20, (2, 9))
NAMES = {0: "bad", 1: "fair", 2: "good"}


def copy(source, folder, change=lambda name: name, **fields):
    """A copy of a folder, with other names of tensors (None leaves one out) or fields of config.json."""
    folder.mkdir()
    config = json.loads((source / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {change(name): array for name, array in load_file(source / SINGLE_FILE).items()}
    tensors.pop(None, None)
    save_file(tensors, folder / SINGLE_FILE, {"format": "pt"})
    return folder


def without_pooler(name):
    return None if "pooler" in name else name


def wrapped(name):
    """As torch's wrapper and the library of 2019 spelt it."""
    modern = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, old in modern.items():
        name = name.replace(new, old)
    return f"module.bert.{name}"


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def assert_transformers_agrees(model, folder, kind):
    """Saves a model; transformers must find every tensor, make up none, and compute the same logits."""
    torch, transformers = require("torch"), require("transformers")
    model.save_pretrained(folder)
    theirs, info = getattr(transformers, kind).from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(IDS))[0].numpy()
    np.testing.assert_allclose(model(IDS).logits, expected, rtol=0, atol=tolerance(expected, 4))
    return theirs


@pytest.mark.slow
def test_a_classifier_on_an_encoder_with_spellings_of_its_own(tmp_path, caplog):
    """The pooler is read, the classifier is new; the rest is to the bit what the file has."""
    source = copy(HEADS / "model", tmp_path / "in", wrapped)
    model = BertForSequenceClassification.from_pretrained(
        source, fresh="classifier", id2label=NAMES, problem_type="single_label_classification", rngs=nnx.Rngs(3)
    )
    assert warnings_of(caplog) == [
        f"{source}: new in BertForSequenceClassification, train before use: classifier.weight, classifier.bias"
    ]
    kernel, bias = (np.asarray(each[...]) for each in (model.classifier.kernel, model.classifier.bias))
    assert kernel.shape == (8, 3)
    assert 0.005 < kernel.std() < 0.04
    assert not bias.any()
    theirs = assert_transformers_agrees(model, tmp_path / "out", "BertForSequenceClassification")
    assert theirs.config.id2label == NAMES
    assert theirs.config.label2id == {name: label for label, name in NAMES.items()}
    assert (theirs.config.num_labels, theirs.config.problem_type) == (3, "single_label_classification")
    before, after = load_file(HEADS / "model" / SINGLE_FILE), load_file(tmp_path / "out" / SINGLE_FILE)
    assert after.keys() == {*(f"bert.{name}" for name in before), "classifier.weight", "classifier.bias"}
    assert all(after[f"bert.{name}"].tobytes() == array.tobytes() for name, array in before.items())
    again = from_pretrained(tmp_path / "out")
    assert type(again) is BertForSequenceClassification
    np.testing.assert_array_equal(again.classifier.kernel[...], kernel)
    assert again.config.id2label == NAMES


@pytest.mark.slow
def test_a_masked_lm_head_on_an_encoder_alone(tmp_path, caplog):
    kernels = []
    for tied in (True, False):
        source = copy(HEADS / "model", tmp_path / f"in {tied}", tie_word_embeddings=tied)
        caplog.clear()
        model = BertForMaskedLM.from_pretrained(source, fresh=["predictions"], rngs=int(tied))
        (message,) = warnings_of(caplog)  # none of the pooler, which a masked language model has no use for
        assert "train before use: cls.predictions.transform.dense.weight, " in message
        assert ("cls.predictions.decoder.weight" in message) == (not tied)
        assert (model.predictions.decoder is None) == tied
        assert_transformers_agrees(model, tmp_path / f"out {tied}", "BertForMaskedLM")
        kernels.append(np.asarray(model.predictions.transform.dense.kernel[...]))
    assert not np.allclose(*kernels), "the seeds differ"


@pytest.mark.slow
def test_a_replaced_head_and_a_new_pooler_are_both_named(tmp_path, caplog):
    """From shards, whose index has no place for a pooler."""
    source = copy(HEADS / "token", tmp_path / "in")
    tensors = load_file(source / SINGLE_FILE)
    (source / SINGLE_FILE).rename(source / "model-1.safetensors")
    (source / INDEX_FILE).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model-1.safetensors")}))
    model = BertForSequenceClassification.from_pretrained(
        source, fresh=("classifier", "pooler"), num_labels=2, param_dtype="float32", sharding=jax.devices()[5]
    )
    assert warnings_of(caplog) == [
        f"{source}: new in BertForSequenceClassification, train before use: bert.pooler.dense.weight, "
        "bert.pooler.dense.bias, classifier.weight, classifier.bias, in the place of classifier.bias, classifier.weight"
    ]
    assert all(array.devices() == {jax.devices()[5]} for _, array in parameters(model))
    assert model.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert model.bert.pooler.dense.kernel[...].any()
    assert_transformers_agrees(model, tmp_path / "out", "BertForSequenceClassification")


def test_a_pooler_for_an_encoder_in_half_precision(tmp_path, caplog):
    source = copy(HEADS / "model", tmp_path / "in", without_pooler)
    model = from_pretrained(source, fresh="pooler", dtype="float32", param_dtype="bfloat16")
    (message,) = warnings_of(caplog)
    assert message.endswith("new in BertModel, train before use: pooler.dense.weight, pooler.dense.bias")
    assert {array.dtype.name for _, array in parameters(model)} == {"bfloat16"}
    with pytest.raises(InputError, match=r"neither nnx\.Rngs nor a seed"):
        from_pretrained(source, fresh="pooler", rngs="0")
    with pytest.raises(InputError, match=r"no stream called params.*nnx.Rngs\(0\)"):
        from_pretrained(source, fresh="pooler", rngs=nnx.Rngs(dropout=0))
    with pytest.raises(InputError, match="fresh='pooler' and add_pooling_layer=False"):
        from_pretrained(source, fresh="pooler", add_pooling_layer=False)


@pytest.mark.parametrize(
    ("kind", "name", "change", "options", "advice"),
    [
        (
            "BertForSequenceClassification",
            "model",
            str,
            {},
            'no classifier; .*fresh="classifier".*; to do without, load',
        ),
        (
            "BertForSequenceClassification",
            "model",
            without_pooler,
            {},
            r'no classifier and no pooler; .*fresh=\("classifier", "pooler"\)',
        ),
        (
            "BertForSequenceClassification",
            "token",
            str,
            {"num_labels": 7},
            'the checkpoint has no pooler.*"pooler"[)]$',
        ),
        ("BertForMaskedLM", "model", str, {}, 'fresh="predictions"'),
        ("BertForQuestionAnswering", "model", str, {}, 'fresh="qa_outputs"'),
        ("BertModel", "model", without_pooler, {"add_pooling_layer": True}, 'fresh="pooler"[)]$'),
    ],
)
def test_without_fresh_what_is_absent_is_refused_with_the_way_out(kind, name, change, options, advice, tmp_path):
    source = copy(HEADS / name, tmp_path / "in", change)
    with pytest.raises(CheckpointError, match=r"missing") as error:
        getattr(bertjax, kind).from_pretrained(source, **options)
    assert re.search(advice, str(error.value)), error.value


def test_a_damaged_head_or_encoder_gets_no_such_advice_and_no_fresh_tensors(tmp_path):
    source = copy(HEADS / "token", tmp_path / "head", lambda name: None if name == "classifier.bias" else name)
    with pytest.raises(CheckpointError, match=r"classifier.bias: missing") as error:
        from_pretrained(source)
    assert "fresh" not in str(error.value)
    lost = "bert.encoder.layer.0.output.dense.bias"
    source = copy(HEADS / "token", tmp_path / "encoder", lambda name: None if name == lost else name)
    with pytest.raises(CheckpointError, match=rf"1 problem.*{lost}: missing") as error:
        from_pretrained(source, fresh="classifier", num_labels=2)
    assert "fresh" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        (
            None,
            {"fresh": "predictions"},
            InputError,
            "BertForTokenClassification has no 'predictions', only c",
        ),
        (BertForTokenClassification, {"fresh": ("pooler", "x")}, InputError, "has no 'pooler' and no 'x'"),
        (BertModel, {"fresh": "classifier"}, InputError, "BertModel has no 'classifier', only pooler"),
        (BertModel, {"num_labels": 2}, InputError, "BertModel has no labels"),
        (bertjax.BertForMultipleChoice, {"id2label": {0: "a"}}, InputError, "BertForMultipleChoice has no labels"),
        ("BertModel", {}, InputError, "kind='BertModel' is not a class to load"),
        (BertConfig, {}, InputError, "is not a class to load"),
        (None, {"num_labels": 3}, InputError, 'the classifier has 7 labels, not 3; .*fresh="classifier"'),
        (None, {"id2label": NAMES}, InputError, "the classifier has 7 labels, not 3"),
        (None, {"id2label": {1: "a", 2: "b"}}, ConfigError, "names 2 labels but not label 0"),
        (None, {"id2label": {0: "a", 1: "a"}}, ConfigError, "several labels the name 'a'"),
        (None, {"id2label": ["a", "b"]}, ConfigError, "expected a name for every label"),
        (None, {"id2label": {}}, ConfigError, "expected a name for every label"),
        (None, {"id2label": NAMES, "num_labels": 4}, ConfigError, "num_labels=4 but id2label names 3"),
        (None, {"num_labels": 0}, ConfigError, "num_labels is 0"),
        (None, {"num_labels": True}, ConfigError, "num_labels is True"),
        (None, {"problem_type": "ranking"}, ConfigError, "problem_type='ranking': expected null or one of regression"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_read(kind, options, error, message):
    with pytest.raises(error, match=message):
        from_pretrained(HEADS / "token", kind, **options)


def test_labels_are_renamed_where_the_count_fits(tmp_path):
    names = {label: f"tag {label}" for label in range(7)}
    model = from_pretrained(HEADS / "token", id2label=names, problem_type=None)
    assert (model.config.id2label, model.config.label2id["tag 6"]) == (names, 6)
    model.save_pretrained(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["id2label"] == {str(label): name for label, name in names.items()}
    assert written["label2id"] == {name: label for label, name in names.items()}
    assert (tmp_path / "out" / SINGLE_FILE).read_bytes() == (HEADS / "token" / SINGLE_FILE).read_bytes()
    # As many labels as there are: they keep their names; where the config has none, the count is enough.
    assert from_pretrained(tmp_path / "out", num_labels=7).config.id2label == names
    nameless = copy(HEADS / "token", tmp_path / "nameless", id2label=None, label2id=None, _num_labels=2)
    found = from_pretrained(nameless, num_labels=7).config
    assert found.id2label == {label: f"LABEL_{label}" for label in range(7)}
    assert "_num_labels" not in found.extra


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory from /proc")
def test_what_is_not_asked_for_is_never_allocated():
    """A BERT-large of 1.3 GB, of which the classifier is wanted."""

    def make(rngs):
        return BertForTokenClassification(BertConfig.preset("large"), rngs=rngs)

    def peak():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

    size = sum(int(np.prod(shape)) for shape in abstract(lambda: make(nnx.Rngs(0)))[1].values()) * 4
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = peak()
    initialise(make, [("classifier", "kernel")], jax.random.key(0))
    assert peak() - before < size / 4
