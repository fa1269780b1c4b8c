import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DATA, compiles, tolerance
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from oracle import require

from bertjax import BertConfig, functional, heads
from bertjax.convert import bert
from bertjax.convert.rules import LINEAR, NORM, Leaf, Row, by_array, expand, unflatten
from bertjax.errors import ConfigError, InputError
from bertjax.pretrained import abstract, parameters

TINY = BertConfig(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=20,
    extra={"id2label": {"0": "a", "1": "b", "2": "c"}, "classifier_dropout": 0.5},
)
UNTIED = dataclasses.replace(TINY, extra={"tie_word_embeddings": False})
LOGITS = {
    "BertForPreTraining": ("prediction_logits", "seq_relationship_logits"),
    "BertForMaskedLM": ("logits",),
    "BertForNextSentencePrediction": ("logits",),
    "BertForSequenceClassification": ("logits",),
    "BertForMultipleChoice": ("logits",),
    "BertForTokenClassification": ("logits",),
    "BertForQuestionAnswering": ("start_logits", "end_logits"),
}
SHAPES = {
    "BertForPreTraining": [(4, 9, 50), (4, 2)],
    "BertForMaskedLM": [(4, 9, 50)],
    "BertForNextSentencePrediction": [(4, 2)],
    "BertForSequenceClassification": [(4, 3)],
    "BertForMultipleChoice": [(2, 2)],
    "BertForTokenClassification": [(4, 9, 3)],
    "BertForQuestionAnswering": [(4, 9), (4, 9)],
}
#: PyTorch's names for the models with heads.
TABLE = (
    *(Row(f"bert.{row.torch}", ("bert", *row.path), row.kind) for row in bert.TABLE),
    Row("cls.predictions.transform.dense", ("predictions", "transform", "dense"), LINEAR),
    Row("cls.predictions.transform.LayerNorm", ("predictions", "transform", "layer_norm"), NORM),
    Row("cls.predictions", ("predictions",), (Leaf("bias", "bias", False),)),
    Row("cls.predictions.decoder", ("predictions", "decoder"), LINEAR[:1]),
    Row("cls.seq_relationship", ("seq_relationship",), LINEAR),
    Row("classifier", ("classifier",), LINEAR),
    Row("qa_outputs", ("qa_outputs",), LINEAR),
)
every_model = pytest.mark.parametrize("name", LOGITS)


def fill(make, draw):
    """A model whose parameters are what `draw` says of each path and shape."""
    graphdef, shapes = abstract(make)
    dtypes = {path: struct.dtype for path, struct in parameters(nnx.eval_shape(make))}
    arrays = ((path, jnp.asarray(draw(path, shape), dtypes[path])) for path, shape in shapes.items())
    return nnx.merge(graphdef, unflatten(arrays))


def random_heads(name, config=TINY, **options):
    """A model with random weights, the same at every call; see `conftest.random_model`."""
    rng = np.random.default_rng(0)
    make = getattr(heads, name)
    return fill(
        lambda: make(config, rngs=nnx.Rngs(0), **options),
        lambda path, shape: rng.normal(float(path[-1] == "scale"), 0.3, shape),
    )


def inputs_of(name, seed=0):
    """Ids, mask and types: one row full, one padded, one nearly all padding, and types of both kinds."""
    rng = np.random.default_rng(seed)
    mask = np.ones((4, 9), int)
    mask[1, 5:] = 0
    mask[2, 1:] = 0
    given = (rng.integers(0, TINY.vocab_size, mask.shape), mask, rng.integers(0, 2, mask.shape))
    return [array.reshape(2, 2, 9) for array in given] if name == "BertForMultipleChoice" else list(given)


def torch_model(name, config):
    """A model of transformers with random weights."""
    torch, transformers = require("torch"), require("transformers")
    theirs = transformers.BertConfig(**config.to_hf(), attn_implementation="eager")
    model = getattr(transformers, name)(theirs).eval()
    rng = np.random.default_rng(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            values = rng.normal(float(key.endswith("LayerNorm.weight")), 0.3, tuple(parameter.shape))
            parameter.copy_(torch.tensor(values))
        if name in ("BertForMaskedLM", "BertForPreTraining"):
            # transformers 5 gives an untied decoder a second bias; version 4 and the checkpoints have one
            model.cls.predictions.decoder.bias.copy_(model.cls.predictions.bias)
    return model


def from_torch(name, config, state):
    """Our model with the weights of a PyTorch state dict, of tensors or of arrays."""
    make = getattr(heads, name)

    def build():
        return make(config, rngs=nnx.Rngs(0))

    slots = by_array(expand(TABLE, abstract(build)[1]))

    def draw(path, shape):
        array = np.empty(shape, np.float32)
        for slot in slots[path]:
            slot.view(array)[...] = np.asarray(state[slot.name])
        return array

    return fill(build, draw)


CASES = [
    # transformers can only answer questions with two labels
    *((name, UNTIED if name == "BertForQuestionAnswering" else TINY) for name in LOGITS),
    ("BertForMaskedLM", UNTIED),
    ("BertForPreTraining", UNTIED),
    ("BertForSequenceClassification", UNTIED),  # no labels named: two
    ("BertForMaskedLM", dataclasses.replace(TINY, hidden_act="relu", layer_norm_eps=0.1)),
]


@functools.cache
def shared(name):
    """One model for all tests that only call it."""
    return random_heads(name)


def targets_of(name, seed=7):
    """Labels for `inputs_of`, some of them ignored."""
    rng = np.random.default_rng(seed)

    def some(classes, *shape):
        labels = rng.integers(0, classes, shape)
        labels.flat[1::4] = -100
        return labels

    return {
        "BertForPreTraining": lambda: {"labels": some(50, 4, 9), "next_sentence_label": some(2, 4)},
        "BertForMaskedLM": lambda: {"labels": some(50, 4, 9)},
        "BertForNextSentencePrediction": lambda: {"labels": some(2, 4)},
        "BertForSequenceClassification": lambda: {"labels": some(3, 4)},
        "BertForMultipleChoice": lambda: {"labels": np.array([1, 0])},
        "BertForTokenClassification": lambda: {"labels": some(3, 4, 9)},
        "BertForQuestionAnswering": lambda: {
            "start_positions": np.array([0, 8, 9, 3]),
            "end_positions": np.array([4, 30, 9, -1]),
        },
    }[name]()


#: Most of these tests' time is spent on compiling programs that run once, so XLA is told not to try hard.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def loss_and_gradients(model, *given, **options):
    """A model's output and its loss's gradients, a nested dict."""
    apply, params = functional(model)

    def loss(params):
        output = apply(params, *given, **options)
        return output.loss, output

    (_, output), gradients = quick_jit(jax.value_and_grad(loss, has_aux=True))(params)
    return output, gradients


def by_torchs_names(gradients):
    """Arrays by PyTorch's names of the parameters."""
    arrays = {tuple(key.key for key in path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(gradients)}
    slots = expand(TABLE, {path: array.shape for path, array in arrays.items()})
    return {slot.name: slot.view(arrays[path]) for path, group in by_array(slots).items() for slot in group}


def check_gradients(gradients, expected):
    found = by_torchs_names(gradients)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=0, atol=1e-5, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "config"), CASES)
def test_logits_loss_and_gradients_match_torch(name, config):
    torch = require("torch")
    reference, given, targets = torch_model(name, config), inputs_of(name), targets_of(name)
    if (name, config) == ("BertForSequenceClassification", UNTIED):
        targets["labels"] = np.minimum(targets["labels"], 1)  # it has two classes only
    more = {"output_hidden_states": True, "output_attentions": True}
    labels = {key: torch.tensor(value) for key, value in targets.items()}
    expected = reference(*map(torch.tensor, given), **labels, **more)
    expected.loss.backward()
    model = from_torch(name, config, reference.state_dict())
    output, gradients = loss_and_gradients(model, *given, **targets, **more)
    for field in ("loss", *LOGITS[name]):
        value = getattr(expected, field).detach().numpy()
        # a head is one layer more, the masked-LM head two
        bound = tolerance(value, config.num_hidden_layers + 2)
        np.testing.assert_allclose(getattr(output, field), value, rtol=0, atol=bound, err_msg=field)
    for field in ("hidden_states", "attentions"):
        value = np.stack([part.detach().numpy() for part in getattr(expected, field)])
        bound = tolerance(value, config.num_hidden_layers)
        np.testing.assert_allclose(getattr(output, field), value, rtol=0, atol=bound, err_msg=field)
    slopes = {key: parameter.grad for key, parameter in reference.named_parameters()}
    # of version 5's two biases of an untied decoder, the one that is used
    bias = slopes.pop("cls.predictions.decoder.bias", None)
    check_gradients(gradients, {key: (bias if slope is None else slope).numpy() for key, slope in slopes.items()})


ONE_LAYER = dataclasses.replace(TINY, num_hidden_layers=1, hidden_size=16, intermediate_size=24)


@pytest.mark.parametrize(
    ("extra", "labels"),
    [
        ({"num_labels": 1}, np.array([0.5, -2, 3, 5], np.float32)),
        ({"num_labels": 3, "problem_type": "regression"}, np.arange(12, dtype=np.float32).reshape(4, 3) - 5),
        ({"num_labels": 3}, np.tile(np.array([0, 1, 0.25], np.float32), (4, 1))),
        ({"num_labels": 1, "problem_type": "multi_label_classification"}, np.array([[1], [0], [1], [0.5]], np.float32)),
        ({"num_labels": 3, "problem_type": "single_label_classification"}, np.array([0, 2, 1, -100])),
    ],
)
def test_every_type_of_problem_matches_torch(extra, labels):
    """The classifier's gradients tell one loss from another; what comes before it has its own test.

    Some of these models differ in the problem alone, and none may be given what was compiled for another.
    """
    torch, name = require("torch"), "BertForSequenceClassification"
    config = dataclasses.replace(ONE_LAYER, extra=extra)
    reference, given = torch_model(name, config), inputs_of(name)
    expected = reference(*map(torch.tensor, given), labels=torch.tensor(labels))
    expected.loss.backward()
    apply, params = functional(from_torch(name, config, reference.state_dict()))

    def loss(classifier):
        return apply(params | {"classifier": classifier}, *given, labels=labels).loss

    value, slopes = quick_jit(jax.value_and_grad(loss))(params["classifier"])
    np.testing.assert_allclose(value, expected.loss.item(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(slopes["kernel"].T, reference.classifier.weight.grad, rtol=0, atol=1e-5)
    np.testing.assert_allclose(slopes["bias"], reference.classifier.bias.grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["absolute", "relative_key", "relative_key_query"])
def test_masked_heads_and_relative_positions_train_as_in_version_4(kind):
    with np.load(DATA / "heads" / f"training_{kind}.npz") as file:
        golden = dict(file)
    config = BertConfig.from_hf(json.loads(str(golden["config"])))
    names = ("input_ids", "attention_mask", "token_type_ids", "labels", "next_sentence_label")
    given = {name: golden[name] for name in names}
    shapes = abstract(lambda: heads.BertForPreTraining(config, rngs=nnx.Rngs(0)))[1]
    slots = {slot.name: slot for slot in expand(TABLE, shapes)}
    ends = np.cumsum([np.prod(slots[name].shape) for name in golden["names"]])

    def unpacked(flat):
        parts = zip(golden["names"], np.split(flat, ends[:-1]), strict=True)
        return {str(name): part.reshape(slots[name].shape) for name, part in parts}

    apply, params = functional(from_torch("BertForPreTraining", config, unpacked(golden["parameters"])))

    @quick_jit
    def train(params, head_mask):
        def loss(params, head_mask):
            output = apply(params, **given, head_mask=head_mask, output_attentions=True)
            return output.loss, output

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, head_mask)

    (_, output), (gradients, by_head) = train(params, golden["head_mask"])
    for field in ("loss", "prediction_logits", "attentions"):
        np.testing.assert_allclose(getattr(output, field), golden[field], rtol=0, atol=1e-5, err_msg=field)
    check_gradients(gradients, unpacked(golden["gradients"]))
    np.testing.assert_allclose(by_head, golden["head_mask_gradient"], rtol=0, atol=1e-5)


def test_embeddings_in_the_place_of_ids_match_torch():
    name = "BertForMultipleChoice"
    torch, reference, (_, mask, types) = require("torch"), torch_model(name, TINY), inputs_of(name)
    embeds = np.random.default_rng(5).normal(size=(*mask.shape, 32)).astype(np.float32)
    theirs = torch.tensor(embeds, requires_grad=True)
    rest = {"attention_mask": mask, "token_type_ids": types, **targets_of(name)}
    expected = reference(inputs_embeds=theirs, **{key: torch.tensor(value) for key, value in rest.items()})
    expected.loss.backward()
    model = from_torch(name, TINY, reference.state_dict())
    value, slope = quick_jit(jax.value_and_grad(lambda embeds: model(inputs_embeds=embeds, **rest).loss))(embeds)
    np.testing.assert_allclose(value, expected.loss.item(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(slope, theirs.grad, rtol=0, atol=1e-5)


PACKED = np.array([[1, 1, 1, 2, 2, 3, 3, 3, 0], [2, 2, 2, 2, 2, 2, 1, 1, 1], [1, 0, 0, 0, 0, 0, 0, 0, 0]])


def unpack(array, fill=0):
    """Every segment of PACKED in a row of its own, in the order of its number, padded."""
    rows = [array[row][PACKED[row] == number] for row, number in SEGMENTS]
    return np.stack([np.pad(row, (0, 9 - len(row)), constant_values=fill) for row in rows])


SEGMENTS = [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (2, 1)]


def test_packed_texts_train_as_texts_of_their_own():
    model, (ids, _, types) = shared("BertForPreTraining"), (array[:3] for array in inputs_of("BertForPreTraining"))
    words = np.where((ids % 3 == 0) & (PACKED > 0), ids, -100)
    follows = np.array([[1, 0, -100, -100], [-100, 1, -100, -100], [0, -100, -100, -100]])
    packed = {"labels": words, "next_sentence_label": follows, "segment_ids": PACKED, "max_segments": 4}
    alone = {"labels": unpack(words, -100), "attention_mask": unpack(np.ones_like(ids))}
    alone["next_sentence_label"] = np.array([follows[row, number - 1] for row, number in SEGMENTS])
    found, gradients = loss_and_gradients(model, ids, token_type_ids=types, **packed)
    expected, slopes = loss_and_gradients(model, unpack(ids), token_type_ids=unpack(types), **alone)
    logits = found.seq_relationship_logits
    assert logits.shape == (3, 4, 2)
    assert jnp.isfinite(logits).all()
    there = np.stack([logits[row, number - 1] for row, number in SEGMENTS])
    np.testing.assert_allclose(there, expected.seq_relationship_logits, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.loss, expected.loss, rtol=0, atol=1e-5)
    check_gradients(gradients, by_torchs_names(slopes))


def test_packed_texts_are_classified_as_texts_of_their_own():
    model, ids = shared("BertForSequenceClassification"), inputs_of("BertForSequenceClassification")[0][:3]
    labels = np.array([[1, 2, -100], [-100, 1, -100], [0, -100, -100]])
    found = model(ids, segment_ids=PACKED, max_segments=3, labels=labels)
    flat = np.array([labels[row, number - 1] for row, number in SEGMENTS])
    expected = model(unpack(ids), unpack(np.ones_like(ids)), labels=flat)
    there = np.stack([found.logits[row, number - 1] for row, number in SEGMENTS])
    np.testing.assert_allclose(there, expected.logits, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.loss, expected.loss, rtol=0, atol=1e-5)


def few_labels(ids):
    return np.where(ids % 4 == 0, (ids + 1) % 50, -100)


def test_scoring_labelled_tokens_only_changes_nothing():
    model, given = random_heads("BertForPreTraining", UNTIED), inputs_of("BertForPreTraining")
    targets = {"labels": few_labels(given[0]), "next_sentence_label": TEXTS}
    there = targets["labels"] != -100
    count = int(there.sum())
    assert 0 < count < 20
    expected, slopes = loss_and_gradients(model, *given, **targets)
    found, gradients = loss_and_gradients(model, *given, **targets, max_predictions=count + 3)
    np.testing.assert_allclose(found.loss, expected.loss, rtol=0, atol=1e-5)
    check_gradients(gradients, by_torchs_names(slopes))
    logits = found.prediction_logits
    assert logits.shape == (count + 3, 50)
    assert jnp.isfinite(logits).all()
    np.testing.assert_allclose(logits[:count], expected.prediction_logits[there], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def train_masked_lm():
    """The loss of at most six labels and its gradients, compiled once for [4, 9]; and how it is lowered."""
    apply, params = functional(shared("BertForMaskedLM"))

    def loss(params, ids, labels, max_predictions):
        return apply(params, ids, labels=labels, max_predictions=max_predictions).loss

    compiled = quick_jit(jax.value_and_grad(loss), static_argnums=3)
    return functools.partial(compiled, params), functools.partial(compiled.lower, params)


def test_word_embeddings_are_multiplied_as_they_lie():
    apply, params = functional(random_heads("BertForMaskedLM", dtype=jnp.bfloat16))
    slopes = jax.jit(jax.grad(lambda params: (apply(params, *inputs_of("BertForMaskedLM")).logits ** 2).sum()))
    assert not re.search(r"stablehlo.transpose.*<(50x32|32x50)x", slopes.lower(params).as_text())


def test_scoring_labelled_tokens_only_has_no_logits_of_the_others(train_masked_lm):
    ids = inputs_of("BertForMaskedLM")[0]

    def big(max_predictions):
        text = train_masked_lm[1](ids, few_labels(ids), max_predictions).as_text()
        shapes = {tuple(map(int, shape.split("x"))) for shape in re.findall(r"tensor<([\dx]+)x[a-z]", text)}
        return {shape for shape in shapes if 50 in shape and np.prod(shape) == 4 * 9 * 50}

    assert big(None)
    assert not big(6)


def test_more_labels_than_may_be_scored_are_never_left_out_in_silence(train_masked_lm):
    ids = inputs_of("BertForMaskedLM")[0]
    labels = np.full_like(ids, -100)
    for count, usable in ((6, True), (7, False), (0, False), (36, False)):
        labels.flat[:count] = 3
        loss, gradients = train_masked_lm[0](ids, labels, 6)
        assert np.isfinite(loss) == usable
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
        assert any(leaf.any() for leaf in jax.tree.leaves(gradients)) == usable
        labels[:] = -100


def test_inside_jit_a_label_without_a_class_is_nan(train_masked_lm):
    ids = inputs_of("BertForMaskedLM")[0]
    for wrong in (50, -1, -99):
        labels = np.full_like(ids, -100)
        labels[1, 1:3] = 3, wrong
        loss, gradients = train_masked_lm[0](ids, labels, 6)
        assert np.isnan(loss)
        assert not any(leaf.any() for leaf in jax.tree.leaves(gradients))


def test_a_pretraining_loss_is_the_sum_of_those_that_have_labels():
    model, given = shared("BertForPreTraining"), inputs_of("BertForPreTraining")
    targets = targets_of("BertForPreTraining")
    both = model(*given, **targets).loss
    parts = [model(*given, **{name: value}).loss for name, value in targets.items()]
    np.testing.assert_allclose(both, sum(parts), rtol=1e-6)
    assert all(part > 0 for part in parts)


def changed(array, where, value):
    array = array.copy()
    array[where] = value
    return array


WORDS, TEXTS = targets_of("BertForMaskedLM")["labels"], np.array([1, 0, -100, 1])
SEGMENT_IDS = {"segment_ids": np.repeat([[1, 2, 0]], 3, axis=1).repeat(4, axis=0)}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("MaskedLM", {"labels": WORDS[:, :8]}, r"labels has shape \(4, 8\), expected \(4, 9\)"),
        ("MaskedLM", {"labels": WORDS * 1.0}, "labels has dtype float64, expected integers"),
        ("MaskedLM", {"labels": changed(WORDS, (1, 2), 50)}, r"labels\[1, 2\] is 50, neither -100 nor inside 0..49"),
        ("MaskedLM", {"labels": changed(WORDS, (3, 0), -1)}, r"labels\[3, 0\] is -1, neither -100 nor inside"),
        ("MaskedLM", {"labels": changed(WORDS, (3, 0), 2**32)}, r"labels\[3, 0\] is 4294967296, neither"),
        ("MaskedLM", {"labels": [[1, 2], [3]]}, "labels is ragged"),
        ("MaskedLM", {"max_predictions": 4}, "pass labels with it"),
        ("MaskedLM", {"labels": WORDS, "max_predictions": 26}, "labels has 27 positions .* max_predictions is 26"),
        ("MaskedLM", {"labels": WORDS, "max_predictions": 0}, "max_predictions is 0, expected a positive integer"),
        ("MaskedLM", {"labels": WORDS, "max_predictions": 40.0}, "max_predictions is 40.0, expected a positive"),
        ("PreTraining", {"next_sentence_label": TEXTS, "max_predictions": 4}, "pass labels with it"),
        ("PreTraining", {"next_sentence_label": TEXTS + 1}, r"next_sentence_label\[0\] is 2, neither"),
        ("NextSentencePrediction", {"labels": TEXTS[:, None]}, r"shape \(4, 1\), expected \(4,\)"),
        ("SequenceClassification", {"labels": changed(TEXTS, 3, 3)}, r"labels\[3\] is 3, neither -100 nor inside 0..2"),
        ("SequenceClassification", {"labels": TEXTS * 0.5}, r"labels has shape \(4,\), expected \(4, 3\)"),
        ("SequenceClassification", {"labels": np.full((4, 3), -100.0)}, r"labels\[0, 0\] is -100.0, outside 0..1"),
        ("SequenceClassification", {"labels": np.full((4, 3), "a")}, "labels has dtype <U1, expected numbers"),
        ("SequenceClassification", SEGMENT_IDS | {"labels": TEXTS, "max_segments": 2}, r"expected \(4, 2\)"),
        (
            "SequenceClassification",
            SEGMENT_IDS | {"labels": np.ones((4, 3)), "max_segments": 3},
            r"labels has shape \(4, 3\), expected \(4, 3, 3\)",
        ),
        (
            "NextSentencePrediction",
            SEGMENT_IDS | {"labels": changed(np.full((4, 3), -100), (2, 2), 1), "max_segments": 3},
            r"labels\[2, 2\] is 1, but the row has no such segment; set it to -100",
        ),
        ("TokenClassification", {"labels": WORDS % 7}, "neither -100 nor inside 0..2"),
        ("TokenClassification", SEGMENT_IDS | {"max_segments": 2}, "this model has no pooler"),
        ("QuestionAnswering", {"start_positions": [1] * 4}, "start_positions and end_positions go together"),
        ("QuestionAnswering", {"start_positions": [1] * 4, "end_positions": [2.0] * 4}, "end_positions has dtype"),
        ("QuestionAnswering", {"start_positions": [2**31] * 4, "end_positions": [2] * 4}, r"start_positions\[0\] is"),
        ("MultipleChoice", {"labels": [0, 2]}, r"labels\[1\] is 2, neither -100 nor inside 0..1"),
        ("MultipleChoice", {"labels": [0, 1, 1, 0]}, r"labels has shape \(4,\), expected \(2,\)"),
        ("MultipleChoice", {"max_segments": 2}, "max_segments is not for multiple choice"),
        ("MultipleChoice", {"inputs_embeds": np.ones((2, 2, 9, 32))}, "pass either input_ids or inputs_embeds"),
    ],
)
def test_unusable_labels_are_refused(name, options, message):
    with pytest.raises(InputError, match=message):
        shared(f"BertFor{name}")(*inputs_of(f"BertFor{name}"), **options)


def test_numbers_to_be_learnt_are_finite():
    config = dataclasses.replace(TINY, extra={"num_labels": 1})
    with pytest.raises(InputError, match=r"labels\[1\] is nan, not finite"):
        random_heads("BertForSequenceClassification", config)(
            *inputs_of("BertForSequenceClassification"), labels=[1, np.nan, 2, 3]
        )


def test_an_unknown_problem_type_is_refused():
    config = dataclasses.replace(TINY, extra={"problem_type": "ranking"})
    with pytest.raises(ConfigError, match="problem_type='ranking': expected null or one of"):
        random_heads("BertForSequenceClassification", config)(*inputs_of("BertForSequenceClassification"), labels=TEXTS)


def test_multiple_choice_embeddings_have_a_hidden_axis():
    embeds = np.ones((2, 2, 9))
    with pytest.raises(
        InputError, match=r"inputs_embeds has shape \(2, 2, 9\), expected \[batch, choices, length, hid"
    ):
        shared("BertForMultipleChoice")(inputs_embeds=embeds)


def test_labels_may_be_spread_over_devices():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    model, (ids, *_) = shared("BertForMaskedLM"), inputs_of("BertForMaskedLM")
    labels = few_labels(ids)
    spread = [jax.device_put(array, NamedSharding(mesh, PartitionSpec("data"))) for array in (ids, labels)]
    expected = model(ids, labels=labels).loss
    found = model(spread[0], labels=spread[1], max_predictions=20).loss
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_parameters_are_torchs_own():
    for name, config in CASES:
        reference = torch_model(name, config)
        expected = {key: tuple(parameter.shape) for key, parameter in reference.named_parameters()}
        expected.pop("cls.predictions.decoder.bias", None)  # the head's bias under a second name
        make = getattr(heads, name)
        shapes = abstract(lambda make=make, config=config: make(config, rngs=nnx.Rngs(0)))[1]
        assert {slot.name: slot.shape for slot in expand(TABLE, shapes)} == expected, name


@every_model
def test_shapes_and_outputs_not_asked_for(name):
    output = shared(name)(*inputs_of(name))
    assert [getattr(output, field).shape for field in LOGITS[name]] == SHAPES[name]
    assert output.loss is None
    assert output.hidden_states is None
    assert output.attentions is None


@every_model
def test_functional_composes_with_jit(name):
    model, given = shared(name), inputs_of(name)
    apply, params = functional(model)
    expected, found = model(*given), jax.jit(apply)(params, *given)
    for field in LOGITS[name]:
        np.testing.assert_allclose(getattr(found, field), getattr(expected, field), rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [TINY, UNTIED])
def test_lower_precision_is_near_and_gives_float32(config):
    given = inputs_of("BertForPreTraining")
    exact = random_heads("BertForPreTraining", config)(*given)
    model = random_heads("BertForPreTraining", config, dtype=jnp.bfloat16)
    near = model(*given)
    for field in LOGITS["BertForPreTraining"]:
        expected, found = getattr(exact, field), getattr(near, field)
        assert found.dtype == jnp.float32
        scale = float(jnp.abs(expected).max())
        assert 0 < float(jnp.abs(found - expected).max()) < 16 * float(jnp.finfo(jnp.bfloat16).eps) * scale
    text = jax.jit(lambda ids: model(ids)).lower(given[0]).as_text()
    dots = [line.split(" : ")[1] for line in text.splitlines() if "dot_general" in line]
    assert all(dot.count("xbf16>") == 2 and dot.endswith("xf32>") for dot in dots), dots


def test_a_second_call_compiles_nothing():
    model = random_heads("BertForTokenClassification")
    model(*inputs_of("BertForTokenClassification"))
    assert compiles(lambda: model(*inputs_of("BertForTokenClassification", seed=1))) == 0


def test_tied_logits_follow_the_word_embeddings():
    tied, untied = (random_heads("BertForMaskedLM", config) for config in (TINY, UNTIED))
    ids = inputs_of("BertForMaskedLM")[0]
    for model, moves in ((tied, True), (untied, False)):
        before = model(ids).logits
        table = model.bert.embeddings.word_embeddings.embedding
        word = min(set(range(TINY.vocab_size)) - set(ids.flat))  # one that the encoder never sees
        table[...] = table[...].at[word].add(1.0)
        changed = np.abs(np.asarray(model(ids).logits - before)).max(axis=(0, 1)) > 1e-3
        assert changed[word] == moves
        assert changed.sum() == moves


@pytest.mark.parametrize(
    ("name", "rate"),
    [("BertForSequenceClassification", 0.5), ("BertForTokenClassification", 0.5), ("BertForTokenClassification", 0)],
)
def test_classifier_dropout_drops_before_the_classifier_only(name, rate):
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    given, key = inputs_of(name), jax.random.key(3)
    model = random_heads(name, dataclasses.replace(TINY, **rates, extra={"classifier_dropout": rate}))
    plain = model(*given, output_hidden_states=True)
    dropped = model(*given, output_hidden_states=True, dropout_key=key)
    np.testing.assert_allclose(dropped.hidden_states, plain.hidden_states, rtol=0, atol=1e-5)
    assert (float(jnp.abs(dropped.logits - plain.logits).max()) > 1e-2) == (rate > 0)


def test_choices_are_the_rows_of_a_classifier():
    model, (ids, mask, types) = random_heads("BertForMultipleChoice"), inputs_of("BertForMultipleChoice")
    alone = model(ids[1:, 1:], mask[1:, 1:], token_type_ids=types[1:, 1:]).logits
    np.testing.assert_allclose(model(ids, mask, types).logits[1, 1], alone[0, 0], rtol=0, atol=1e-5)
    for wrong, message in (
        ((ids[0],), r"input_ids has shape \(2, 9\), expected \[batch, choices, length\]"),
        ((ids, mask[0]), r"attention_mask has shape \(2, 9\), input_ids has \(2, 2, 9\)"),
        ((np.tile(ids, (1, 3, 1)), np.tile(mask, (3, 1, 1))), r"attention_mask has shape \(6, 2, 9\)"),
        (([[[1, 2], [3]]],), "input_ids is ragged"),
        ((ids[..., :0],), "there are no tokens"),
        ((ids + 50,), "input_ids.* outside 0..49"),
    ):
        with pytest.raises(InputError, match=message):
            model(*wrong)


def test_unusable_inputs_are_refused():
    with pytest.raises(InputError, match=r"input_ids has shape \(2, 2, 9\)"):
        random_heads("BertForMaskedLM")(inputs_of("BertForMultipleChoice")[0])


def test_any_combination_of_heads_has_its_parameters():
    def paths(names, **options):
        shapes = abstract(lambda: heads.BertWithHeads(TINY, names, rngs=nnx.Rngs(0), **options))[1]
        return {path: shape for path, shape in shapes.items() if path[0] != "bert" or path[1] == "pooler"}

    assert paths((), add_pooling_layer=False) == {}
    assert paths(frozenset(heads.HEADS), add_pooling_layer=True, tied=False, num_labels=7) == {
        ("bert", "pooler", "dense", "kernel"): (32, 32),
        ("bert", "pooler", "dense", "bias"): (32,),
        ("predictions", "transform", "dense", "kernel"): (32, 32),
        ("predictions", "transform", "dense", "bias"): (32,),
        ("predictions", "transform", "layer_norm", "scale"): (32,),
        ("predictions", "transform", "layer_norm", "bias"): (32,),
        ("predictions", "bias"): (50,),
        ("predictions", "decoder", "kernel"): (32, 50),
        ("seq_relationship", "kernel"): (32, 2),
        ("seq_relationship", "bias"): (2,),
        ("classifier", "kernel"): (32, 7),
        ("classifier", "bias"): (7,),
        ("qa_outputs", "kernel"): (32, 2),
        ("qa_outputs", "bias"): (2,),
    }
    assert paths(("classifier",), add_pooling_layer=False)["classifier", "kernel"] == (32, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": ("prediction",)}, "unknown head.* 'prediction'; expected predictions, seq_relationship"),
        ({"heads": ("classifier",), "num_labels": 0}, "num_labels is 0, expected a positive integer"),
        ({"heads": (), "dtype": "int16"}, "dtype='int16' is not supported"),
        ({"heads": (), "unroll": 0}, "unroll is 0"),
    ],
)
def test_unusable_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        heads.BertWithHeads(TINY, **options, add_pooling_layer=False, rngs=nnx.Rngs(0))


def test_printing_shows_the_module_tree():
    lines = str(random_heads("BertForMaskedLM")).splitlines()
    assert lines[:2] == ["BertForMaskedLM", "  bert: BertModel"]
    assert "  predictions: BertPredictionHead" in lines
    assert "    bias: float32[50]" in lines
