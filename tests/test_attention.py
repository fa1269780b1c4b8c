import contextlib
import dataclasses
import functools
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_model
from jax.experimental.pallas import tpu as pltpu

import bertjax.attention
from bertjax import BertConfig, BertForSequenceClassification, BertModel, functional
from bertjax.attention import Segments, attend, choice, choose_backend, prepare
from bertjax.errors import ConfigError, InputError

# Every backend that this machine can run; a TPU's kernel is interpreted where there is no TPU.
BACKENDS = ["xla", "tpu", *(["cudnn"] if jax.default_backend() == "gpu" else [])]

# dtype, batch, length, heads, head_dim. No length is a multiple of a kernel's block. The heads of the first two fill
# whole vector registers and those of the third don't, and the first has several blocks of queries in both directions.
CASES = [("float32", 1, 600, 4, 32), ("bfloat16", 2, 72, 2, 64), ("float32", 3, 40, 3, 8)]
each_case = pytest.mark.parametrize(
    ("backend", "case"),
    [(name, case) for name in BACKENDS for case in CASES if name != "cudnn" or case[0] == "bfloat16"],
    ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value)),
)

TINY = BertConfig(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=40,
    attention_probs_dropout_prob=0.0,
)


@pytest.fixture(autouse=True)
def interpreted():
    """Has Pallas interpret TPU kernels where there is no TPU."""
    with contextlib.nullcontext() if jax.default_backend() == "tpu" else pltpu.force_tpu_interpret_mode():
        yield


@functools.partial(jax.jit, static_argnames="attention")
def run(attention, arrays, segments, wanted):
    """The context, float32, and the slopes of the sum over it, times `wanted`, by query, key and value."""

    def total(arrays):
        context = attention(*arrays, segments).astype(jnp.float32)
        return (context * wanted).sum(), context

    slopes, context = jax.grad(total, has_aux=True)(arrays)
    return context, slopes


def by(backend):
    """`attend` with this backend; the same function at every call, so that `run` compiles it once per shape."""
    return _BY[backend]


_BY = {
    name: lambda query, key, value, segments, name=name: attend(
        query, key, value, prepare(segments, name), backend=name
    )[0]
    for name in BACKENDS
}


def draw(case, seed=0):
    """Queries, keys and values, and what the context is multiplied with."""
    dtype, batch, length, heads, head_dim = case
    rng = np.random.default_rng(seed)
    shape = (batch, length, heads, head_dim)
    arrays = tuple(jnp.asarray(rng.normal(size=shape), dtype) for _ in range(3))
    return arrays, rng.normal(size=shape).astype(np.float32)


def packed(case):
    """Three texts in every row, of other lengths in each, then padding."""
    _, batch, length, _, _ = case
    ids = np.zeros((batch, length), np.int32)
    for row in range(batch):
        ends = np.array([0.2, 0.5, 0.9]) * length - row
        ids[row, : int(ends[2])] = 1 + np.searchsorted(ends[:2], np.arange(int(ends[2])), side="right")
    return ids


def exact(arrays, query_ids, key_ids, wanted):
    """What `run` is to return, in float64, and how far from it rounding may lead: [(value, bound), ...].

    A bound is that of a sum, of which every term is off by a few roundings: u times the sum of the terms' sizes.
    Products are rounded to the dtype before they are multiplied again, which counts for one u each: the weights, their
    slopes and the result. Scores are accumulated in float32; an error there is one of the weights, of the same factor.
    """
    q, k, v, g = (np.asarray(x, np.float64).transpose(0, 2, 1, 3) for x in (*arrays, wanted))
    scale = q.shape[-1] ** -0.5
    scores = q @ k.swapaxes(-1, -2) * scale
    seen = query_ids[:, None, :, None] == key_ids[:, None, None, :]
    weights = np.where(seen, np.exp(scores - np.where(seen, scores, -np.inf).max(-1, keepdims=True)), 0)
    weights = weights / weights.sum(-1, keepdims=True)
    dweights = g @ v.swapaxes(-1, -2)
    mean = (weights * dweights).sum(-1, keepdims=True)
    dscores = weights * (dweights - mean) * scale
    sizes = weights * (abs(dweights) + (weights * abs(dweights)).sum(-1, keepdims=True)) * scale
    dtype = arrays[0].dtype
    float32, own = float(np.finfo(np.float32).eps), float(jnp.finfo(dtype).eps)
    # Of a sum of n terms in float32, and of exp() of it; n additions of random sign lose about sqrt(n) roundings.
    terms = max(q.shape[-1], k.shape[2])
    u = 2 * own + float32 * (np.sqrt(terms) + (abs(q) @ abs(k).swapaxes(-1, -2) * scale).max())
    turn = lambda x: x.transpose(0, 2, 1, 3)  # noqa: E731
    pairs = [(weights @ v, weights @ abs(v)), (dscores @ k, sizes @ abs(k))]
    pairs += [(dscores.swapaxes(-1, -2) @ q, sizes.swapaxes(-1, -2) @ abs(q))]
    pairs += [(weights.swapaxes(-1, -2) @ g, weights.swapaxes(-1, -2) @ abs(g))]
    return [(turn(value), u * turn(size) + float32) for value, size in pairs]


@each_case
def test_it_is_the_papers_softmax_within_each_segment(backend, case):
    arrays, wanted = draw(case)
    ids = packed(case)
    context, slopes = run(by(backend), arrays, Segments(jnp.asarray(ids), jnp.asarray(ids)), wanted)
    names = ("context", "query", "key", "value")
    for name, found, (value, bound) in zip(names, (context, *slopes), exact(arrays, ids, ids, wanted), strict=True):
        error = abs(np.asarray(found, np.float64) - value)
        assert (error <= bound).all(), f"{name}: {error.max()}, {(error / bound).max()} times what rounding explains"


def check_isolation(attention, case):
    """Asserts that a text in a row neither sees the others and the padding, nor teaches them."""
    arrays, wanted = draw(case)
    ids = packed(case)
    others = [np.asarray(x, np.float32) for x in draw(case, seed=1)[0]]
    for number in (1, 2, 3):
        own = (ids == number)[..., None, None]
        query_ids, key_ids = jnp.asarray(ids), jnp.asarray(np.where(ids == 0, -1, ids))
        # In half precision the largest number is 65504, and the sum over a row must not pass it.
        changed = tuple(jnp.where(own, x, 50 * y).astype(x.dtype) for x, y in zip(arrays, others, strict=True))
        before = run(attention, arrays, Segments(query_ids, key_ids), jnp.where(own, wanted, 0))
        after = run(attention, changed, Segments(query_ids, key_ids), jnp.where(own, wanted, 0))
        np.testing.assert_array_equal(*(np.asarray(context)[ids == number] for context, _ in (before, after)))
        for one, two in zip(before[1], after[1], strict=True):
            np.testing.assert_array_equal(np.asarray(one)[ids == number], np.asarray(two)[ids == number])
            assert not np.asarray(two, np.float32)[ids != number].any()
            assert np.asarray(two, np.float32)[ids == number].any()


@each_case
def test_no_token_attends_outside_its_segment(backend, case):
    check_isolation(by(backend), case)


def _sees_its_row(query, key, value, segments):
    """What is wrong here is what once was elsewhere: the padding is masked, the texts are not told apart."""
    return attend(query, key, value, Segments(None, jnp.where(segments.key > 0, 1, -1)))[0]


def _sees_faintly(query, key, value, segments):
    bias = jnp.where(segments.dense_mask(), 0.0, -40.0)
    return attend(query, key, value, Segments(), bias)[0]


def _teaches_others(query, key, value, segments):
    """Right forward, wrong backward."""
    context = attend(query, key, value, segments)[0]
    return context + 1e-3 * (value.sum(1, keepdims=True) - jax.lax.stop_gradient(value.sum(1, keepdims=True)))


@pytest.mark.parametrize("leaky", [_sees_its_row, _sees_faintly, _teaches_others])
def test_an_attention_that_leaks_is_found_out(leaky):
    with pytest.raises(AssertionError):
        check_isolation(leaky, CASES[2])


@each_case
def test_packed_is_as_if_each_text_had_its_own_row(backend, case):
    arrays, wanted = draw(case)
    ids = packed(case)
    together, _ = run(by(backend), arrays, Segments(jnp.asarray(ids), jnp.asarray(ids)), wanted)
    bounds = exact(arrays, ids, ids, wanted)[0][1]
    for number in (1, 2, 3):
        for row in range(ids.shape[0]):
            places = np.flatnonzero(ids[row] == number)
            alone = tuple(np.zeros_like(x[:1]) for x in map(np.asarray, arrays))
            for target, source in zip(alone, arrays, strict=True):
                target[0, : places.size] = np.asarray(source)[row, places]
            alone = tuple(jnp.asarray(np.repeat(x, ids.shape[0], axis=0)) for x in alone)
            mask = jnp.asarray(np.arange(ids.shape[1]) < places.size)[None].repeat(ids.shape[0], axis=0)
            segments = Segments(jnp.ones_like(mask, jnp.int32), mask.astype(jnp.int32))
            context, _ = run(by(backend), alone, segments, wanted)
            error = abs(np.asarray(context[0, : places.size]) - np.asarray(together[row, places]))
            assert (error <= 2 * bounds[row, places]).all()  # both are rounded


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_may_look_at_nothing_gets_something_finite(backend):
    arrays, wanted = draw(CASES[1])
    none = jnp.full((2, 72), -1, jnp.int32)
    context, slopes = run(by(backend), arrays, Segments(none + 2, none), wanted)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in (context, *slopes))


@pytest.fixture(scope="module")
def models():
    """One model by every backend; cuDNN's in the dtype that it has."""
    dtypes = {"cudnn": jnp.bfloat16}
    return {name: random_model(TINY, attention=name, dtype=dtypes.get(name, jnp.float32)) for name in BACKENDS}


def inputs(kind):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, TINY.vocab_size, (3, 21))
    segments = np.repeat([[1, 2, 3, 0]], 3, axis=0).repeat([5, 9, 4, 3], axis=1)
    mask = np.arange(21) < np.array([[21], [13], [2]])
    given = {"plain": {}, "padded": {"attention_mask": mask}, "packed": {"segment_ids": segments}}
    given["both"] = {"segment_ids": segments, "attention_mask": (np.arange(21) % 5 > 0) * np.ones((3, 1), int)}
    return ids, given[kind]


def outputs_and_slopes(model, kind):
    """Of every token that is real, and of the parameters by them."""
    ids, given = inputs(kind)
    apply, params = functional(model)
    real = given.get("segment_ids", given.get("attention_mask", np.ones_like(ids))) != 0

    @jax.jit
    def compute(params):
        states = apply(params, ids, **given).last_hidden_state
        # The gradient of the keys' bias is zero, but for the rounding of what cancels out in it. Divided, it is as far
        # below what is allowed absolutely as the other gradients are above it.
        return (jnp.where(real[..., None], states, 0) ** 3).sum() / 8, states

    slopes, states = jax.grad(compute, has_aux=True)(params)
    return np.asarray(states)[real], slopes


@pytest.mark.parametrize("kind", ["padded", "both"])
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_a_model_computes_the_same_with_every_backend(models, backend, kind):
    expected, slopes = outputs_and_slopes(models["xla"], kind)
    found, theirs = outputs_and_slopes(models[backend], kind)
    half = backend == "cudnn"
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.2 if half else 1e-5)
    for (path, one), two in zip(jax.tree.leaves_with_path(slopes), jax.tree.leaves(theirs), strict=True):
        bound = (0.1 if half else 1e-4) * float(abs(one).max()) + 1e-4
        np.testing.assert_allclose(two, one, rtol=0, atol=bound, err_msg=jax.tree_util.keystr(path))


def test_the_mask_is_made_once_for_all_layers(models):
    ids, given = inputs("packed")
    states = jnp.zeros((*ids.shape, TINY.hidden_size))
    segments = jnp.asarray(given["segment_ids"])
    program = jax.make_jaxpr(lambda x, ids: models["xla"].encoder(x, Segments(ids, ids)))(states, segments)
    [layers] = [equation for equation in program.eqns if equation.primitive.name == "scan"]
    outside = [equation for equation in program.eqns if equation.primitive.name == "eq"]
    assert [equation.outvars[0].aval.shape for equation in outside] == [(3, 1, 21, 21)]
    assert "= select_n" in str(layers.params["jaxpr"])
    assert "= eq" not in str(layers.params["jaxpr"])


@pytest.mark.parametrize(
    ("table", "options", "expected"),
    [
        ({}, {}, "xla"),
        ({"tpu": ("tpu", 256)}, {}, "tpu"),
        ({"tpu": ("tpu", 512)}, {}, "xla"),
        ({"gpu": ("cudnn", 128)}, {}, "xla"),
        ({"gpu": ("cudnn", 128)}, {"platform": "gpu"}, "cudnn"),
        ({"gpu": ("cudnn", 128)}, {"platform": "gpu", "dtype": jnp.float32}, "xla"),
        ({"tpu": ("tpu", 128)}, {"dtype": jnp.float16}, "xla"),
        ({"tpu": ("tpu", 128)}, {"head_dim": 20}, "xla"),
        ({"tpu": ("tpu", 128)}, {"relative": True}, "xla"),
        ({"tpu": ("tpu", 128)}, {"dropout": True}, "xla"),
        ({"tpu": ("tpu", 128)}, {"return_weights": True}, "xla"),
    ],
)
def test_auto_goes_by_what_was_measured_and_by_what_a_kernel_can_do(monkeypatch, table, options, expected):
    monkeypatch.setattr(choice, "FASTER_FROM", MappingProxyType(table))
    call = {"length": 384, "head_dim": 64, "dtype": jnp.bfloat16, "platform": "tpu"} | options
    assert choose_backend("auto", **call) == expected


@pytest.mark.parametrize(
    ("attention", "options", "message"),
    [
        ("flash", {}, "attention is 'flash', expected one of auto, xla, cudnn, tpu"),
        ("cudnn", {}, "attention='cudnn' computes in bfloat16 or float16, not in float32"),
        ("tpu", {"dtype": jnp.float16}, "attention='tpu' computes in bfloat16 or float32, not in float16"),
        ("tpu", {"position_embedding_type": "relative_key"}, "attention='tpu' has no relative positions"),
        ("tpu", {"hidden_size": 40}, "heads of 8, 16, ... 128 numbers, not of 20"),
    ],
)
def test_a_model_that_a_backend_cannot_compute_is_refused(attention, options, message):
    model_options = {"attention": attention} | {key: value for key, value in options.items() if key == "dtype"}
    fields = {key: value for key, value in options.items() if key != "dtype"}
    config = BertConfig(**({"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16} | fields))
    with pytest.raises(ConfigError, match=message):
        BertModel(config, rngs=None, **model_options)


def test_a_call_that_a_backend_cannot_compute_is_refused(models):
    ids, _ = inputs("plain")
    with pytest.raises(InputError, match="attention='tpu' has no way to return the weights: leave out output_att"):
        models["tpu"](ids, output_attentions=True)
    config = dataclasses.replace(TINY, attention_probs_dropout_prob=0.1)
    with pytest.raises(InputError, match="no way to drop weights: set attention_probs_dropout_prob to 0"):
        random_model(config, attention="tpu")(ids, dropout_key=jax.random.key(0))
    with pytest.raises(InputError, match="'tpu' has no bias"):
        attend(*draw(CASES[2])[0], Segments(), jnp.zeros(()), backend="tpu")


def test_without_the_accelerator_a_kernel_is_refused(models):
    ids, _ = inputs("plain")
    with pltpu.force_tpu_interpret_mode(None):
        with pytest.raises(ConfigError, match="attention='tpu' needs a TPU, and this program is compiled for cpu"):
            models["tpu"](ids)
        with pytest.raises(ConfigError, match="attention='tpu' needs a TPU"):
            attend(*draw(CASES[2])[0], Segments(), backend="tpu")
        with pytest.raises(ConfigError, match="attention='cudnn' needs a GPU, and JAX runs on cpu"):
            random_model(TINY, attention="cudnn", dtype=jnp.bfloat16)(ids)


def test_a_program_for_a_tpu_can_be_made_without_one(models):
    ids, given = inputs("both")
    apply, params = functional(models["tpu"])
    with pltpu.force_tpu_interpret_mode(None):
        program = jax.export.export(
            jax.jit(jax.grad(lambda params: apply(params, ids, **given).last_hidden_state.sum())), platforms=["tpu"]
        )(params)
    assert program.mlir_module().count("tpu_custom_call") == 2  # forward and backward, each once for all layers


def test_loaders_pass_the_choice_on(tmp_path, models, sentence_folder):
    models["xla"].save_pretrained(tmp_path / "model")
    loaded = BertModel.from_pretrained(tmp_path / "model", attention="tpu")
    assert loaded.encoder.attention == "tpu"
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "model", fresh="classifier", attention="tpu")
    assert loaded.bert.encoder.attention == "tpu"
    assert (
        bertjax.SentenceEncoder.from_pretrained(sentence_folder, attention="tpu").model.bert.encoder.attention == "tpu"
    )
