"""The same results by another way where a program runs: the ways of TPUs and GPUs, run on a CPU or only lowered."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_model, tolerance
from flax import nnx
from jax import lax
from scipy.special import erf

from bertjax import BertConfig, functional
from bertjax.layers import _gelu_fitted, _normalise_on_gpu, layer_norm
from bertjax.platforms import on_platform

CONFIG = BertConfig(
    vocab_size=50, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96,
    max_position_embeddings=64,
)  # fmt: skip


def model_of(**options):
    """A model with random weights whose attention is not so sharp that it multiplies any rounding."""
    model = random_model(CONFIG, attention="xla", **options)
    for part in (model.encoder.layers.attention.query, model.encoder.layers.attention.key):
        part.kernel[...] = part.kernel[...] * 0.3
    return model


def lowered(function, platform, *args):
    """The program of a function for a platform that need not be there."""
    return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()


@pytest.fixture
def run_as(monkeypatch):
    """Makes programs for this CPU go the way of another platform."""

    def run_as(platform):
        def platform_dependent(*args, default, **others):
            return others.get(platform, default)(*args)

        monkeypatch.setattr(lax, "platform_dependent", platform_dependent)
        jax.clear_caches()

    yield run_as
    monkeypatch.undo()
    jax.clear_caches()


def test_the_way_is_that_of_the_platform_which_the_program_is_for():
    function = on_platform(lambda tree: jnp.sin(tree["x"]), tpu=lambda tree: jnp.cos(tree["x"]))
    tree = {"x": jnp.arange(3.0), "n": jnp.arange(3)}
    np.testing.assert_allclose(jax.jit(function)(tree), np.sin(tree["x"]), rtol=1e-6)
    ways = {platform: lowered(function, platform, tree) for platform in ("cpu", "cuda", "tpu")}
    found = {platform: re.findall(r"stablehlo\.(sine|cosine)\b", text) for platform, text in ways.items()}
    assert found == {"cpu": ["sine"], "cuda": ["sine"], "tpu": ["cosine"]}


@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])
def test_derivatives_are_of_one_way_wherever_they_run(backend, run_as, monkeypatch):
    run_as("tpu")
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    function = on_platform(jnp.sin, tpu=jnp.tanh, cuda=jnp.exp)
    slope = np.exp if backend == "gpu" else np.cos
    x = jnp.arange(1.0, 4.0)
    np.testing.assert_allclose(jax.jit(function)(x), np.tanh(x), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda x: function(x).sum())(x), slope(x), rtol=1e-6)
    np.testing.assert_allclose(jax.jvp(function, (x,), (jnp.ones(3),))[1], slope(x), rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(function)(x[:, None])[:, 0], np.tanh(x), rtol=1e-6)


def test_nothing_is_computed_for_what_has_no_derivative():
    def product(x, y):
        return x @ y

    function = on_platform(product, tpu=product)
    x, frozen, numbers = jnp.ones((2, 3)), jnp.ones((3, 4)), jnp.arange(2)

    def products(call):
        return len(re.findall(r"\bdot_general\b", str(jax.make_jaxpr(jax.grad(lambda x: call(x, frozen).sum()))(x))))

    assert products(function) == products(product)
    with_integers = on_platform(lambda tree: tree[0] * tree[1][:, None], tpu=lambda tree: tree[0])
    np.testing.assert_array_equal(jax.grad(lambda x: with_integers((x, numbers)).sum())(x), [[0] * 3, [1] * 3])


def test_the_fitted_gelu_is_as_near_as_it_says():
    x = np.concatenate([np.linspace(-12, 12, 24_001), [-1e20, -1e4, -40, 40, 1e4, 1e20]]).astype(np.float32)
    exact = 0.5 * x.astype(np.float64) * (1 + erf(x.astype(np.float64) / np.sqrt(2)))
    # The fit's own error, and float32's of x times a number near 1.
    bound = 3.1e-6 + 4 * np.finfo(np.float32).eps * np.abs(x)
    assert (np.abs(np.asarray(_gelu_fitted(jnp.asarray(x)), np.float64) - exact) <= bound).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_layer_norm_by_every_way(dtype, platform, run_as):
    run_as(platform)
    norm = layer_norm(CONFIG, dtype, jnp.float32, nnx.Rngs(0))
    rng = np.random.default_rng(0)
    norm.scale[...], norm.bias[...] = (jnp.asarray(rng.normal(size=64), jnp.float32) for _ in range(2))
    x = rng.normal(3.0, 2.0, (5, 7, 64)).astype(np.float32)
    exact = (x - x.mean(-1, keepdims=True, dtype=np.float64)) / np.sqrt(x.var(-1, keepdims=True, dtype=np.float64))
    exact = exact * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])
    np.testing.assert_allclose(norm(jnp.asarray(x)), exact, rtol=0, atol=5e-6)
    # A mean a thousand times the deviation: E[x^2] - E[x]^2 is taken only where bfloat16 hides more than it loses.
    far = np.asarray(norm(jnp.asarray(x + 2000.0)))
    careful = dtype == "float32" or platform == "cuda"
    assert (np.abs(far - exact).max() < 0.01) == careful


def test_a_gpus_layer_norm_has_the_slopes_of_the_formula():
    rng = np.random.default_rng(0)
    x, dx = (jnp.asarray(rng.normal(size=(5, 7, 64)), jnp.float32) for _ in range(2))
    scale, bias, dscale, dbias = (jnp.asarray(rng.normal(size=64), jnp.float32) for _ in range(4))

    def formula(x, scale, bias):
        difference = x - x.mean(-1, keepdims=True)
        return difference / jnp.sqrt(jnp.square(difference).mean(-1, keepdims=True) + 1e-5) * scale + bias

    def layer_norm(x, scale, bias):
        return _normalise_on_gpu(1e-5, x, scale, bias)

    given, slopes = (x, scale, bias), (dx, dscale, dbias)
    expected, found = (jax.jvp(function, given, slopes) for function in (formula, layer_norm))
    for one, two in zip(expected, found, strict=True):
        np.testing.assert_allclose(two, one, rtol=0, atol=1e-5)
    expected, found = (jax.vjp(function, *given)[1](dx) for function in (formula, layer_norm))
    for one, two in zip(expected, found, strict=True):
        np.testing.assert_allclose(two, one, rtol=0, atol=2e-5)


@pytest.mark.parametrize("count", [1, 64])
def test_slopes_forwards_are_those_backwards(count):
    """Of many directions at once, too: XLA computes sums of products in another way where they are many."""
    apply, params = functional(model_of())
    ids, rest = inputs(packed=False)
    bias = params["encoder"]["layers"]["attention_norm"]["bias"][0]

    def loss(bias):
        tree = jax.tree.map(lambda array: array, params)  # a copy of the dicts
        norm = tree["encoder"]["layers"]["attention_norm"]
        norm["bias"] = norm["bias"].at[0].set(bias)
        return (apply(tree, ids, **rest).last_hidden_state ** 2 * rest["attention_mask"][..., None]).mean()

    backwards = jax.grad(loss)(bias)[:count]
    forwards = jax.vmap(lambda direction: jax.jvp(loss, (bias,), (direction,))[1])(jnp.eye(64)[:count])
    np.testing.assert_allclose(forwards, backwards, rtol=0, atol=1e-5 * float(abs(backwards).max()))


def inputs(packed):
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(1, 50, (3, 40)))
    if packed:
        return ids, {"segment_ids": jnp.asarray(np.repeat([[1, 2, 3, 0]], 3, 0).repeat(10, 1))}
    return ids, {"attention_mask": jnp.asarray(np.arange(40) < np.array([[40], [23], [5]])).astype(int)}


def states(model, packed):
    """The last hidden states of real tokens, [tokens, hidden]."""
    ids, rest = inputs(packed)
    found = np.asarray(model(ids, **rest).last_hidden_state)
    return found[np.asarray(next(iter(rest.values()))) > 0]


@pytest.mark.parametrize("packed", [False, True])
def test_a_tpu_computes_the_same_in_float32(packed, run_as):
    model = model_of()
    expected = states(model, packed)
    run_as("tpu")
    np.testing.assert_allclose(states(model, packed), expected, rtol=0, atol=tolerance(expected, 3))


@pytest.mark.parametrize("packed", [False, True])
def test_in_bfloat16_a_gpu_is_about_as_near_to_float32(packed, run_as):
    exact = states(model_of(), packed)
    model = model_of(dtype=jnp.bfloat16)
    usual = states(model, packed)
    run_as("cuda")
    other = states(model, packed)
    assert other.dtype == np.float32
    assert np.abs(other - usual).max() > 0  # another way it is
    errors = [np.sqrt(np.square(found - exact).mean()) for found in (usual, other)]
    # What stands between the products is rounded, too, for a GPU: about as often as the products' inputs are.
    assert errors[1] < 2 * errors[0]


def products(text):
    """The dtypes of every product's inputs and result in the text of a program."""
    found = []
    for line in text.splitlines():
        if "stablehlo.dot_general" in line:
            types = re.findall(r"tensor<(?:\d+x)*(\w+)>", line[line.rindex(" : ") :])
            found.append(tuple(types))
    return found


def test_in_bfloat16_a_gpu_keeps_what_stands_between_products_in_bfloat16():
    apply, params = functional(random_model(CONFIG, dtype=jnp.bfloat16, attention="xla"))
    ids, mask = inputs(packed=False)

    def run(params):
        return apply(params, ids, **mask).last_hidden_state

    found = {platform: products(lowered(run, platform, params)) for platform in ("cuda", "cpu")}
    short, usual = ("bf16", "bf16", "bf16"), ("bf16", "bf16", "f32")
    # The six dense layers; attention's own two have the scores and their sum in float32.
    assert (found["cuda"].count(short), found["cuda"].count(usual), len(found["cuda"])) == (6, 2, 8)
    assert found["cpu"] == [usual] * 8
    # What a layer hands to the next.
    loops = [line for line in lowered(run, "cuda", params).splitlines() if "stablehlo.while" in line]
    assert any("tensor<3x40x64xbf16>" in line for line in loops) and not any("3x40x64xf32" in line for line in loops)


def test_in_bfloat16_a_tpu_has_the_fitted_gelu():
    ids, mask = inputs(packed=False)
    for dtype, expected in ((jnp.bfloat16, {"tanh"}), (jnp.float32, {"erf"})):
        apply, params = functional(random_model(CONFIG, dtype=dtype, attention="xla"))
        text = lowered(lambda params, apply=apply: apply(params, ids, **mask).last_hidden_state, "tpu", params)
        assert set(re.findall(r"\b(tanh|erf)\b", text)) == expected


def test_float32_and_float16_are_the_same_on_a_gpu():
    ids, mask = inputs(packed=False)
    for dtype, name in ((jnp.float32, "f32"), (jnp.float16, "f16")):
        apply, params = functional(random_model(CONFIG, dtype=dtype, attention="xla"))
        found = products(lowered(lambda params, apply=apply: apply(params, ids, **mask), "cuda", params))
        assert found == [(name, name, "f32")] * 9


def slopes(model, dropout_key=None):
    """The gradient of a loss by every parameter, and the program that computes it for a GPU."""
    apply, params = functional(model)
    ids, rest = inputs(packed=True)

    def loss(params):
        states = apply(params, ids, **rest, dropout_key=dropout_key).last_hidden_state
        return (jnp.where(rest["segment_ids"][..., None] > 0, states, 0) ** 2).mean()

    return jax.jit(jax.grad(loss))(params), lowered(jax.grad(loss), "cuda", params)


@pytest.mark.parametrize("dropped", [False, True])
def test_training_in_bfloat16_on_a_gpu(dropped, run_as, monkeypatch):
    """What stands between products is in bfloat16 both ways, but for what is summed up for a parameter."""
    config = dataclasses.replace(CONFIG, hidden_dropout_prob=0.1 * dropped, attention_probs_dropout_prob=0.1 * dropped)
    key = jax.random.key(0) if dropped else None
    exact, _ = slopes(random_model(config, attention="xla"), key)
    model = random_model(config, attention="xla", dtype=jnp.bfloat16, param_dtype=jnp.float32)
    usual, _ = slopes(model, key)
    run_as("cuda")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found, text = slopes(model, key)
    # Of the dense layers: the results, and the gradients of what went in; but of the kernels in float32.
    assert products(text).count(("bf16", "bf16", "bf16")) == 12
    assert products(text).count(("bf16", "bf16", "f32")) == 6 + 2 + 4
    for (path, one), two, three in zip(
        jax.tree.leaves_with_path(exact), jax.tree.leaves(usual), jax.tree.leaves(found), strict=True
    ):
        assert three.dtype == jnp.float32
        name = jax.tree_util.keystr(path)
        if "key']['bias" in name or "pooler" in name:  # zero, but for rounding
            continue
        errors = [float(jnp.sqrt(jnp.square(each - one).mean())) for each in (two, three)]
        assert errors[1] < 3 * errors[0], name
