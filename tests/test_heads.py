import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import compiles, tolerance
from flax import nnx
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
    """Our model with the weights of a PyTorch state dict."""
    make = getattr(heads, name)

    def build():
        return make(config, rngs=nnx.Rngs(0))

    slots = by_array(expand(TABLE, abstract(build)[1]))

    def draw(path, shape):
        array = np.empty(shape, np.float32)
        for slot in slots[path]:
            slot.view(array)[...] = state[slot.name].numpy()
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


@pytest.mark.parametrize(("name", "config"), CASES)
def test_logits_match_torch(name, config):
    torch = require("torch")
    reference = torch_model(name, config)
    given = inputs_of(name)
    with torch.no_grad():
        expected = reference(*map(torch.tensor, given), output_hidden_states=True, output_attentions=True)
    output = from_torch(name, config, reference.state_dict())(*given, output_hidden_states=True, output_attentions=True)
    for field in LOGITS[name]:
        value = getattr(expected, field).numpy()
        # a head is one layer more, the masked-LM head two
        bound = tolerance(value, config.num_hidden_layers + 2)
        np.testing.assert_allclose(getattr(output, field), value, rtol=0, atol=bound, err_msg=field)
    for field in ("hidden_states", "attentions"):
        value = np.stack([part.numpy() for part in getattr(expected, field)])
        bound = tolerance(value, config.num_hidden_layers)
        np.testing.assert_allclose(getattr(output, field), value, rtol=0, atol=bound, err_msg=field)


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
    output = random_heads(name)(*inputs_of(name))
    assert [getattr(output, field).shape for field in LOGITS[name]] == SHAPES[name]
    assert output.hidden_states is None
    assert output.attentions is None


@every_model
def test_functional_composes_with_jit(name):
    model, given = random_heads(name), inputs_of(name)
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
        ({"heads": (), "dtype": "int8"}, "dtype='int8' is not supported"),
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
