"""Models in int8: what is quantised and how, what they compute, and what they refuse."""

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import random_model
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bertjax import BertConfig, BertForMaskedLM, BertModel, SentenceEncoder, cpu, functional
from bertjax.cli import main
from bertjax.cpu import library
from bertjax.errors import CheckpointError, ConfigError, InputError
from bertjax.export import export_encoder
from bertjax.export.load import Encoder
from bertjax.int8 import Int8Linear, int8_matmul, quantize
from bertjax.pretrained import parameters
from bertjax.tasks.fill_mask import Fill, FillMask

CONFIG = BertConfig(vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
FILL_MASK = Path(__file__).parent / "data/tasks/fill_mask/model"
EPSILON = np.finfo(np.float32).eps
# Where the native encoder can compute in int8, it is tested, too.
WAYS = library.possible_ways("int8")
NATIVE = ["auto"] * bool(WAYS)
ATTENTION = ["xla", *NATIVE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A float32 checkpoint with random weights, of which one output of one dense layer has none."""
    model = random_model(CONFIG)
    for part in (model.encoder.layers.attention.query, model.encoder.layers.attention.key):
        part.kernel[...] = part.kernel[...] * 0.3  # attention that is not all on one token
    up = model.encoder.layers.feed_forward.intermediate
    up.kernel[...] = up.kernel[...].at[1, :, 5].set(0.0)
    path = tmp_path_factory.mktemp("int8") / "model"
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def exact(folder):
    return BertModel.from_pretrained(folder, attention="xla")


@pytest.fixture(scope="module")
def models(folder):
    """By attention."""
    return {attention: BertModel.from_pretrained(folder, dtype="int8", attention=attention) for attention in ATTENTION}


def packed():
    """Two rows of three texts and padding."""
    ids = np.random.default_rng(0).integers(1, CONFIG.vocab_size, (2, 48))
    return {"input_ids": ids, "segment_ids": np.tile(np.repeat([1, 2, 3, 0], [9, 20, 12, 7]), (2, 1))}


def states(model, inputs):
    return np.asarray(model(**inputs).last_hidden_state)


def angles(a, b):
    """1 - cosine."""
    return 1 - (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@settings(deadline=None)  # the first example compiles
@given(arrays(np.float32, (4, 6), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_a_vector_is_off_by_half_a_step(x):
    levels, scale = quantize(x, 1, np)
    assert (levels.dtype, scale.dtype, scale.shape) == (np.int8, np.float32, (4, 1))
    assert levels.min() >= -127
    small = np.abs(x).max(1) <= np.float32(1e-30)
    assert not levels[small].any()
    # The largest level is 127: its float32 quotient is off by a few units in the last place of that.
    error = np.abs(x - levels * scale.astype(np.float64))[~small]
    assert (error <= scale[~small] * (0.5 + 4 * 127 * EPSILON)).all()
    assert (np.abs(levels[~small]).max(1, initial=0) == 127).all()
    # What is compiled and what loads weights give the same integers.
    np.testing.assert_array_equal(_compiled(x)[0], levels)


_compiled = jax.jit(lambda x: quantize(x, 1))


def test_a_product_is_the_sum_of_integers_times_both_scales():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 7, 300)).astype(np.float32) * np.logspace(-3, 3, 7, dtype=np.float32)[:, None]
    kernel = rng.integers(-127, 128, (300, 20)).astype(np.int8)
    scale = rng.uniform(0.5, 2, 20).astype(np.float32)
    largest = np.abs(x).max(-1, keepdims=True)
    sums = np.round(x * (np.float32(127) / largest)).astype(np.int64) @ kernel.astype(np.int64)
    found = jax.jit(int8_matmul)(x, kernel, scale)
    # Four roundings: of two scales, and of two products with them. An integer that is one off would show.
    np.testing.assert_allclose(found, sums * (largest / np.float64(127)) * scale, rtol=4 * EPSILON, atol=0)


def test_zeros_stay_zeros_and_what_is_no_number_stays_in_its_row():
    x = np.ones((4, 8), np.float32)
    x[1], x[2, 3], x[3, 0] = 0, np.nan, np.inf
    found = np.asarray(int8_matmul(x, np.ones((8, 5), np.int8), np.ones(5, np.float32)))
    np.testing.assert_allclose(found[0], 8, rtol=4 * EPSILON)
    np.testing.assert_array_equal(found[1], 0)
    assert np.isnan(found[2:]).all()


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_loading_quantises_the_layers_kernels_and_nothing_else(folder, exact, tmp_path, stored):
    if stored != "float32":
        exact.save_pretrained(tmp_path / "model", dtype=stored)
        folder, exact = tmp_path / "model", BertModel.from_pretrained(tmp_path / "model", param_dtype="float32")
    model = BertModel.from_pretrained(folder, dtype="int8")
    found, expected = dict(parameters(model)), dict(parameters(exact))
    assert found.keys() == expected.keys()
    quantised = [path for path in found if found[path].dtype == jnp.int8]
    assert len(quantised) == 6
    for path in found.keys() - set(quantised):
        assert found[path].dtype == jnp.float32
        np.testing.assert_array_equal(found[path], expected[path])
    for path in quantised:
        kernel = np.asarray(expected[path])
        largest = np.abs(kernel).max(1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            levels = np.where(largest > 0, np.round(kernel * (np.float32(127) / largest)), 0)
        np.testing.assert_array_equal(found[path], levels)
        part = model.encoder.layers
        for name in path[2:-1]:
            part = getattr(part, name)
        np.testing.assert_allclose(part.scale[...], largest[:, 0] / 127, rtol=EPSILON, atol=0)
    assert not np.asarray(model.encoder.layers.feed_forward.intermediate.kernel[...])[1, :, 5].any()


def test_products_are_in_int8_and_attentions_own_in_bfloat16(models):
    apply, params = functional(models["xla"])
    program = jax.jit(lambda params, inputs: apply(params, **inputs)).lower(params, packed()).as_text()
    products = [line for line in program.splitlines() if "stablehlo.dot_general" in line]
    kinds = [tuple(re.findall(r"tensor<(?:\d+x)+(\w+)>", line)) for line in products]
    assert Counter(kinds) == {("i8", "i8", "i32"): 6, ("bf16", "bf16", "f32"): 2, ("f32", "f32", "f32"): 1}


@pytest.mark.parametrize("attention", ATTENTION)
def test_states_are_near_those_in_float32(attention, models, exact):
    inputs = packed()
    real = inputs["segment_ids"] > 0
    found = angles(states(models[attention], inputs)[real], states(exact, inputs)[real])
    # A step is about 3 / 127 of a vector's spread, and what rounding adds 0.3 of that: an angle whose square is 5e-5
    # for each side of a product. Of that 1 - cosine has half, and the last two of the products show most.
    assert 1e-6 < found.max() < 5e-4


@pytest.mark.parametrize("way", WAYS)
def test_the_native_encoder_computes_the_same(way, models, exact, monkeypatch):
    monkeypatch.setattr("bertjax.cpu.encoder.ways", lambda dtype: [way])
    apply, params = functional(models["auto"])
    native = jax.jit(lambda params, inputs: apply(params, **inputs))
    for inputs in (packed(), {"input_ids": packed()["input_ids"][:1, :33]}):
        real = inputs.get("segment_ids", np.ones(inputs["input_ids"].shape)) > 0
        found = np.asarray(native(params, inputs).last_hidden_state)[real]
        expected = states(models["xla"], inputs)[real]
        # Both round the same numbers, but not those that rounding errors move to another level.
        assert angles(found, expected).max() < angles(expected, states(exact, inputs)[real]).max()
    program = native.lower(params, packed()).as_text()
    assert program.count(f"@{library.TARGET}") == 1
    assert f"way = {way:d} : i64" in program


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_text_is_the_same_alone_and_in_company(attention, models, exact):
    inputs = packed()
    second = inputs["segment_ids"] == 2
    together = states(models[attention], inputs)
    alone = states(models[attention], {"input_ids": inputs["input_ids"][second].reshape(2, -1)})
    own = angles(states(exact, inputs)[second], together[second]).max()
    assert angles(alone.reshape(-1, CONFIG.hidden_size), together[second]).max() < own
    changed = inputs | {"input_ids": np.where(second, inputs["input_ids"][:, ::-1], inputs["input_ids"])}
    others = ~second & (inputs["segment_ids"] > 0)
    np.testing.assert_array_equal(states(models[attention], changed)[others], together[others])


def test_new_layers_are_quantised(models):
    kernel = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    layer = Int8Linear(6, 3, kernel_init=lambda key, shape, dtype: jnp.asarray(kernel, dtype), rngs=nnx.Rngs(0))
    scale = np.asarray(layer.scale[...])
    np.testing.assert_allclose(scale, np.abs(kernel).max(0) / 127, rtol=EPSILON)
    assert (np.abs(kernel - np.asarray(layer.kernel[...]) * scale) <= 0.501 * scale).all()
    assert "kernel: int8[2, 64, 128]\n" in str(models["xla"])
    assert "scale: float32[2, 128]\n" in str(models["xla"])


def test_dtypes_that_do_not_go_together_are_refused(folder):
    for make in (
        lambda: BertModel.from_pretrained(folder, dtype="int8", param_dtype="bfloat16"),
        lambda: BertModel(CONFIG, dtype="int8", param_dtype="bfloat16", rngs=nnx.Rngs(0)),
        lambda: BertForMaskedLM(CONFIG, dtype="int8", param_dtype="bfloat16", rngs=nnx.Rngs(0)),
    ):
        with pytest.raises(ConfigError, match=r"param_dtype is bfloat16; with dtype int8, .* float32 only"):
            make()
    with pytest.raises(ConfigError, match="param_dtype='int8' is not supported; expected one of float32, "):
        BertModel.from_pretrained(folder, param_dtype="int8")


@pytest.mark.parametrize("attention", ATTENTION)
def test_training_is_refused(attention, models):
    model = models[attention]
    with pytest.raises(InputError, match="dropout_key: a model in int8 is for inference"):
        model(**packed(), dropout_key=jax.random.key(0))
    embeds = jnp.ones((1, 5, CONFIG.hidden_size))
    with pytest.raises(InputError, match="no gradients; load it with another dtype"):
        jax.grad(lambda embeds: model(inputs_embeds=embeds).last_hidden_state.sum())(embeds)


def test_saving_is_refused(models, tmp_path):
    with pytest.raises(CheckpointError, match=r"a model in int8 does not have the weights .* convert the original"):
        models["xla"].save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="dtype='int8' is not supported"):
        random_model(CONFIG).save_pretrained(tmp_path / "model", dtype="int8")
    assert not list(tmp_path.iterdir())


def test_the_native_encoders_sizes():
    for name, change in (
        ("intermediate_size=96", {"intermediate_size": 96}),
        ("hidden_size=96", {"hidden_size": 96, "num_attention_heads": 3}),
    ):
        assert cpu.problem(dataclasses.replace(CONFIG, **change), "int8") == (
            f"it needs sizes that are multiples of 64, not {name}"
        )


@pytest.mark.slow
def test_a_sentence_encoder_on_the_command_line_and_exported(sentence_folder, tmp_path):
    texts = ["a cat sat on the mat .", "", "the dog ran fast", "it is slow"]
    exact = SentenceEncoder.from_pretrained(sentence_folder).encode(texts)
    encoder = SentenceEncoder.from_pretrained(sentence_folder, dtype="int8")
    vectors = encoder.encode(texts)
    assert 1e-6 < angles(vectors, exact).max() < 5e-3
    arguments = ["embed", "-m", str(sentence_folder), "--dtype", "int8", *(f"--text={text}" for text in texts)]
    lines = CliRunner().invoke(main, arguments).stdout.splitlines()
    np.testing.assert_array_equal(np.array([json.loads(line) for line in lines], np.float32), vectors)
    with pytest.raises(CheckpointError, match="a model in int8"):
        encoder.save_pretrained(tmp_path / "model")
    assert export_encoder(encoder, tmp_path / "exported", lengths=[16])["compute_dtype"] == "int8"
    assert angles(Encoder(tmp_path / "exported").encode(texts), vectors).max() < 5e-3


@pytest.mark.slow
def test_a_task_has_its_head_in_float32():
    golden = json.loads((FILL_MASK.parent / "expected.json").read_text(encoding="utf-8"))
    task = FillMask.from_pretrained(FILL_MASK, dtype="int8", step_tokens=256)
    kernels = {path: array.dtype for path, array in parameters(task.model) if path[-1] == "kernel"}
    assert all((dtype == jnp.int8) == (path[:2] == ("bert", "encoder")) for path, dtype in kernels.items())
    assert kernels["predictions", "transform", "dense", "kernel"] == jnp.float32
    call = golden["calls"][0]
    scores = [fill.score for fill in flat(task(golden["texts"], **call["options"]))]
    difference = np.abs(np.array(scores) - [fill[0] for fill in flat(call["fills"])]).max()
    assert 0 < difference < 0.05


def flat(answers):
    """The fills in an answer's lists; a fill is a `Fill` or, as JSON has it, a list that begins with its score."""
    if isinstance(answers, Fill) or isinstance(answers[0], float):
        return [answers]
    return [fill for part in answers for fill in flat(part)]
