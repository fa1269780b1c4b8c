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
from bertjax.activations import _gelu_fitted
from bertjax.layer_norm import _normalise_on_gpu, layer_norm
from bertjax.platforms import on_platform
from bertjax.training.lora import adapters_of, add_lora
from bertjax.training.lora_settings import TARGETS, LoRA

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


@pytest.mark.parametrize(
    ("count", "dtype", "bound"), [(1, "float32", 1e-5), (64, "float32", 1e-5), (2, "bfloat16", 0.02)]
)
def test_slopes_forwards_are_those_backwards(count, dtype, bound):
    """Of many directions at once, too: XLA computes sums of products in another way where they are many."""
    apply, params = functional(model_of(dtype=dtype, param_dtype=jnp.float32))
    ids, rest = inputs(packed=False)
    bias = params["encoder"]["layers"]["attention_norm"]["bias"][0]

    def loss(bias):
        tree = jax.tree.map(lambda array: array, params)  # a copy of the dicts
        norm = tree["encoder"]["layers"]["attention_norm"]
        norm["bias"] = norm["bias"].at[0].set(bias)
        return (apply(tree, ids, **rest).last_hidden_state ** 2 * rest["attention_mask"][..., None]).mean()

    backwards = jax.grad(loss)(bias)[:count]
    forwards = jax.vmap(lambda direction: jax.jvp(loss, (bias,), (direction,))[1])(jnp.eye(64)[:count])
    np.testing.assert_allclose(forwards, backwards, rtol=0, atol=bound * float(abs(backwards).max()))


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_slopes_of_a_mapped_model_in_bfloat16(platform, run_as, monkeypatch):
    run_as(platform)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu" if platform == "cuda" else "cpu")
    apply, params = functional(model_of(dtype=jnp.bfloat16, param_dtype=jnp.float32))
    ids, rest = inputs(packed=False)

    def run(params, ids, mask):
        return apply(params, ids, mask).last_hidden_state * mask[..., None]

    def mapped(params, ids, mask):
        return jax.vmap(lambda *row: run(params, *(each[None] for each in row))[0])(ids, mask)

    plain, other = (
        jax.jit(jax.grad(lambda params, call=call: (call(params, ids, rest["attention_mask"]) ** 2).mean()))(params)
        for call in (run, mapped)
    )
    for (path, one), two in zip(jax.tree.leaves_with_path(plain), jax.tree.leaves(other), strict=True):
        name = jax.tree_util.keystr(path)
        if "key']['bias" not in name and "pooler" not in name:  # zero, but for rounding
            np.testing.assert_allclose(two, one, rtol=0, atol=0.02 * float(abs(one).max()), err_msg=name)


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


def program_of(dtype, platform, differentiate=False):
    """The text of a model's program, or of the program of its gradients."""
    ids, mask = inputs(packed=False)
    apply, params = functional(random_model(CONFIG, dtype=dtype, param_dtype=jnp.float32, attention="xla"))

    def run(params):
        states = apply(params, ids, **mask).last_hidden_state
        return (states**2).sum() if differentiate else states

    return lowered(jax.grad(run) if differentiate else run, platform, params)


def test_in_bfloat16_a_tpu_has_the_fitted_gelu():
    for dtype, expected in ((jnp.bfloat16, {"tanh"}), (jnp.float32, {"erf"})):
        assert set(re.findall(r"\b(tanh|erf)\b", program_of(dtype, "tpu"))) == expected


def test_a_tpu_multiplies_queries_keys_and_values_by_columns():
    for platform, expected in (("tpu", 3), ("cpu", 0), ("cuda", 0)):
        assert program_of(jnp.float32, platform).count("contracting_dims = [0] x [2]") == expected


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_only_a_cpu_divides_the_sums_instead_of_the_weights(dtype):
    for platform in ("tpu", "cuda", "cpu"):
        divisions = [line for line in program_of(dtype, platform).splitlines() if "stablehlo.divide" in line]
        assert any(line.endswith("tensor<3x4x40x40xf32>") for line in divisions) == (platform != "cpu")


def test_where_a_gpu_may_not_merge_what_stands_between_products():
    """Barriers: one for queries, keys and values, and one after each LayerNorm."""
    counts = {dtype: program_of(dtype, "cuda").count("optimization_barrier") for dtype in ("float32", "bfloat16")}
    assert counts["bfloat16"] == counts["float32"] + 3


def test_a_gpus_layer_norm_has_its_own_slopes(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    norm = layer_norm(CONFIG, jnp.bfloat16, jnp.float32, nnx.Rngs(0))
    x = jnp.ones((5, 64))
    wanted = jax.make_jaxpr(jax.grad(lambda x: _normalise_on_gpu(1e-12, x, norm.scale[...], norm.bias[...]).sum()))(x)
    found = jax.make_jaxpr(jax.grad(lambda x: norm(x).sum()))(x)
    assert [each.primitive.name for each in found.eqns] == [each.primitive.name for each in wanted.eqns]


def test_a_gpu_hands_out_float32(run_as):
    model = model_of(dtype=jnp.bfloat16)
    ids, rest = inputs(packed=False)
    run_as("cuda")
    found = model(ids, **rest, output_hidden_states=True, output_attentions=True)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_array_equal(found.hidden_states[-1], found.last_hidden_state)


def test_a_gpu_adapts_a_layer_in_bfloat16(run_as):
    """The dense layers of LoRA: what they add does not bring float32 back."""
    model = add_lora(model_of(dtype=jnp.bfloat16), LoRA(rank=4, alpha=4, targets=tuple(TARGETS)))
    rng = np.random.default_rng(0)
    for adapter in adapters_of(model).values():
        adapter.lora_b[...] = jnp.asarray(rng.normal(0.0, 0.1, adapter.lora_b.shape), jnp.float32)
    usual = states(model, packed=False)
    run_as("cuda")
    np.testing.assert_allclose(states(model, packed=False), usual, rtol=0, atol=0.2)
    layer = jax.tree.map(lambda array: array[0], nnx.to_pure_dict(nnx.state(model.encoder.layers.attention.query)))
    one = nnx.clone(model.encoder.layers.attention.query)
    nnx.update(one, layer)
    assert one(jnp.ones((2, 64), jnp.bfloat16)).dtype == jnp.bfloat16


def test_cudnns_attention_is_not_computed_twice(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    # What JAX wants to know of a GPU's libraries before it traces: they are not there.
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_compute_capability", lambda _: True)
    config = dataclasses.replace(CONFIG, attention_probs_dropout_prob=0.0)
    ids, rest = inputs(packed=True)
    for remat, expected in ((False, 1), (True, 2)):
        apply, params = functional(random_model(config, attention="cudnn", dtype=jnp.bfloat16, remat=remat))
        slopes = jax.grad(lambda params, apply=apply: apply(params, ids, **rest).last_hidden_state.sum())
        text = str(jax.make_jaxpr(slopes)(params))
        found = re.findall(r"= dot_product_attention_(fwd|bwd)_wrapper\[", text)
        assert (found.count("fwd"), found.count("bwd")) == (expected, 1)
        assert text.count("= erf ") == 2  # what lies between products is


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
