import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import compiles, random_model, tolerance
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from oracle import require

from bertjax import BertConfig, BertModel, functional, named_parameters, parameter_table
from bertjax.activations import ACTIVATION_FUNCTIONS
from bertjax.attention import relative_bias
from bertjax.errors import ConfigError, InputError
from bertjax.sentence import POOLING_MODES, Normalize, SentenceModel

INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
OUTPUTS = ("last_hidden_state", "pooler_output", "hidden_states", "attentions")
TINY = BertConfig(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=40,
)


def tiny(config=TINY, **options) -> BertModel:
    return random_model(config, **options)


def random_ids(shape, seed=0):
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, shape)


def test_every_output_matches_torch_golden(golden):
    expected = np.load(golden / "expected.npz")
    model = BertModel.from_pretrained(golden)
    output = model(*(expected[name] for name in INPUTS), output_hidden_states=True, output_attentions=True)
    for name in OUTPUTS:
        bound = tolerance(expected[name], model.config.num_hidden_layers)
        np.testing.assert_allclose(getattr(output, name), expected[name], rtol=0, atol=bound, err_msg=name)


@pytest.mark.parametrize("seed", range(6))
def test_every_output_matches_torch_live(seed, tmp_path):
    """Random sizes, a torch model saved by transformers, the same inputs on both sides, defaults left out."""
    torch, transformers = require("torch"), require("transformers")
    rng = np.random.default_rng(seed)
    heads = int(rng.choice([1, 2, 3, 6]))
    config = transformers.BertConfig(
        vocab_size=int(rng.integers(10, 90)),
        hidden_size=heads * int(rng.choice([1, 4, 7, 16])),
        num_hidden_layers=int(rng.integers(1, 5)),
        num_attention_heads=heads,
        intermediate_size=int(rng.integers(1, 60)),
        max_position_embeddings=int(rng.integers(16, 40)),
        type_vocab_size=int(rng.integers(1, 4)),
        hidden_act=str(rng.choice(["gelu", "gelu_new", "relu", "silu", "tanh"])),
        layer_norm_eps=float(rng.choice([1e-12, 1e-5, 1e-2])),
        initializer_range=0.2,
        attn_implementation="eager",
    )
    torch.manual_seed(seed)
    reference = transformers.BertModel(config, add_pooling_layer=bool(seed % 2)).eval()
    reference.save_pretrained(tmp_path)
    ids = rng.integers(0, config.vocab_size, (2, 13))
    mask = np.ones_like(ids)
    mask[0, 9:] = 0
    with torch.no_grad():
        expected = reference(torch.tensor(ids), torch.tensor(mask), output_hidden_states=True, output_attentions=True)
    output = BertModel.from_pretrained(tmp_path)(ids, mask, output_hidden_states=True, output_attentions=True)
    for name in OUTPUTS:
        value = getattr(expected, name)
        if value is None:
            assert getattr(output, name) is None
            continue
        value = np.stack([part.numpy() for part in value]) if isinstance(value, tuple) else value.numpy()
        bound = tolerance(value, config.num_hidden_layers)
        np.testing.assert_allclose(getattr(output, name), value, rtol=0, atol=bound, err_msg=name)


def test_activations_match_torch():
    torch, activations = require("torch"), require("transformers.activations")
    x = np.linspace(-8, 8, 4001, dtype=np.float32)
    for name, function in ACTIVATION_FUNCTIONS.items():
        expected = activations.ACT2FN[name](torch.tensor(x)).numpy()
        np.testing.assert_allclose(function(jnp.asarray(x)), expected, rtol=0, atol=2e-6, err_msg=name)


def test_gelu_is_the_erf_form_and_gelu_new_the_tanh_form():
    x = np.linspace(-4, 4, 401)
    erf = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x])
    tanh = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    assert np.abs(erf - tanh).max() > 4e-4  # two hundred times the tolerance below
    for name, expected in (("gelu", erf), ("gelu_new", tanh), ("gelu_pytorch_tanh", tanh), ("gelu_fast", tanh)):
        found = ACTIVATION_FUNCTIONS[name](jnp.asarray(x, jnp.float32))
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("field", ["layer_norm_eps", "hidden_act", "num_attention_heads"])
def test_a_config_field_changes_the_numbers(field):
    other = {"layer_norm_eps": 0.1, "hidden_act": "relu", "num_attention_heads": 8}[field]
    ids = random_ids((2, 9))
    a = tiny()(ids).last_hidden_state
    b = tiny(dataclasses.replace(TINY, **{field: other}))(ids).last_hidden_state
    assert float(jnp.abs(a - b).max()) > 1e-3


def test_defaults_are_no_padding_type_zero_and_counted_positions():
    model, ids = tiny(), random_ids((2, 9))
    explicit = model(ids, np.ones_like(ids), np.zeros_like(ids), np.tile(np.arange(9), (2, 1)))
    # Two programs, so not to the bit; any other type or position would differ by more than 0.1.
    np.testing.assert_allclose(model(ids).last_hidden_state, explicit.last_hidden_state, rtol=0, atol=5e-6)


def test_padding_changes_nothing_for_real_tokens():
    model, ids = tiny(), random_ids((2, 9))
    padded = np.pad(ids, ((0, 0), (0, 6)), constant_values=7)
    mask = np.pad(np.ones_like(ids), ((0, 0), (0, 6)))
    np.testing.assert_allclose(
        model(padded, mask).last_hidden_state[:, :9], model(ids).last_hidden_state, rtol=0, atol=1e-5
    )


def test_segments_in_a_row_do_not_see_each_other():
    model = tiny()
    parts = [random_ids((1, n), seed=n) for n in (5, 1, 8)]
    packed = np.concatenate([*parts, random_ids((1, 3))], axis=1)
    segments = np.repeat([1, 2, 3, 0], [5, 1, 8, 3])[None]
    output = model(packed, segment_ids=segments).last_hidden_state[0]
    start = 0
    for part in parts:
        alone = model(part).last_hidden_state[0]
        np.testing.assert_allclose(output[start : start + len(alone)], alone, rtol=0, atol=1e-5)
        start += len(alone)
    # and the comparison is able to fail: without segment ids the texts do see each other
    assert float(jnp.abs(model(packed).last_hidden_state[0, :5] - output[:5]).max()) > 1e-2


def test_a_packed_row_may_be_longer_than_the_positions():
    model = tiny()
    parts = [random_ids((1, n), seed=n) for n in (30, 25)]
    packed = np.concatenate([*parts, np.zeros((1, 45), int)], axis=1)
    output = model(packed, segment_ids=np.repeat([[1, 2, 0]], [30, 25, 45], axis=1)).last_hidden_state[0]
    for part, found in zip(parts, (output[:30], output[30:55]), strict=True):
        np.testing.assert_allclose(found, model(part).last_hidden_state[0], rtol=0, atol=1e-5)


def test_segments_and_padding_mask_combine():
    model, ids = tiny(), random_ids((1, 10))
    segments = np.repeat([[1, 2]], 5, axis=1)
    mask = np.array([[1, 1, 1, 0, 0, 1, 1, 1, 1, 1]])
    output = model(ids, mask, segment_ids=segments).last_hidden_state
    np.testing.assert_allclose(output[0, :3], model(ids[:, :3]).last_hidden_state[0], rtol=0, atol=1e-5)


RELATIVE = [dataclasses.replace(TINY, position_embedding_type=kind) for kind in ("relative_key", "relative_key_query")]
relative = pytest.mark.parametrize("config", RELATIVE, ids=lambda config: config.position_embedding_type)


def relative_bias_by_the_book(query, key, table, with_keys):
    """Shaw et al., equation 5, with an embedding for every pair of tokens, in float64."""
    query, key, table = (np.asarray(array, np.float64) for array in (query, key, table))
    place = np.arange(query.shape[1])
    distances = place[:, None] - place[None] + (len(table) - 1) // 2
    pairs = table[distances.clip(0, len(table) - 1)]
    bias = np.einsum("blhd,lrd->bhlr", query, pairs)
    if with_keys:
        bias += np.einsum("brhd,lrd->bhlr", key, pairs)
    return bias / math.sqrt(query.shape[-1])


@pytest.mark.parametrize("length", [1, 2, 5, 6, 7, 20])  # the table holds six positions
@pytest.mark.parametrize("with_keys", [False, True])
def test_relative_bias_is_the_papers(length, with_keys):
    rng = np.random.default_rng(length)
    query, key = rng.normal(size=(2, 3, length, 2, 8)).astype(np.float32)
    table = rng.normal(size=(11, 8)).astype(np.float32)
    expected = relative_bias_by_the_book(query, key, table, with_keys)
    found = jax.jit(relative_bias, static_argnames="with_keys")(query, key, table, with_keys=with_keys)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
    half = relative_bias(*(jnp.bfloat16(array) for array in (query, key, table)), with_keys=with_keys)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, expected, rtol=0, atol=0.1)


@relative
def test_relative_positions_with_padding_packing_jit_and_lower_precision(config):
    model = tiny(config)
    parts = [random_ids((1, n), seed=n) for n in (40, 25)]  # 40 is all the positions there are
    alone = [model(part).last_hidden_state[0] for part in parts]
    packed = np.concatenate([*parts, np.zeros((1, 15), int)], axis=1)
    output = model(packed, segment_ids=np.repeat([[1, 2, 0]], [40, 25, 15], axis=1)).last_hidden_state[0]
    np.testing.assert_allclose(output[:65], np.concatenate(alone), rtol=0, atol=1e-5)
    padded, mask = np.full((1, 40), 7), np.zeros((1, 40), int)
    padded[:, :25], mask[:, :25] = parts[1], 1
    jitted = jax.jit(lambda model, *ids: model(*ids).last_hidden_state)(model, padded, mask)
    np.testing.assert_allclose(jitted[0, :25], alone[1], rtol=0, atol=1e-5)
    half = tiny(config, dtype=jnp.bfloat16)(parts[1]).last_hidden_state[0]
    assert 0 < float(jnp.abs(half - alone[1]).max()) < 64 * float(jnp.finfo(jnp.bfloat16).eps)


@relative
def test_relative_positions_count(config):
    model, ids = tiny(config), random_ids((1, 9))
    output = model(ids).last_hidden_state[0]
    assert float(jnp.abs(model(ids[:, ::-1]).last_hidden_state[0, ::-1] - output).max()) > 1e-2
    apply, params = functional(model)
    gradients = jax.grad(lambda params: jnp.square(apply(params, ids).pooler_output).sum())(params)
    # every layer learns the distances from -8 to 8 and no other, and nothing learns absolute positions
    learnt = jnp.abs(gradients["encoder"]["layers"]["attention"]["distance_embedding"]["embedding"]).max(-1) > 0
    np.testing.assert_array_equal(learnt[0], np.abs(np.arange(79) - 39) <= 8)
    assert not gradients["embeddings"]["position_embeddings"]["embedding"].any()


def test_relative_positions_leave_no_choice_of_position_ids():
    model, ids = tiny(RELATIVE[0]), random_ids((2, 9))
    expected = model(ids).last_hidden_state
    counted = np.arange(9) + np.array([[0], [5]])
    np.testing.assert_allclose(model(ids, position_ids=counted).last_hidden_state, expected, rtol=0, atol=1e-5)
    mask, segments = np.ones_like(ids), np.repeat([[1, 2, 0]], [5, 3, 1], axis=1).repeat(2, axis=0)
    mask[0, 3] = 0
    model(ids, mask, None, np.array([[0, 1, 2, 0, 4, 0, 1, 2, 9], [0, 1, 2, 3, 4, 0, 1, 2, 0]]), segments)
    for wrong, options, where in (
        (np.zeros_like(ids), {}, r"\[0, 1\] is 0"),
        (counted[:, ::-1], {}, r"\[0, 1\] is 7"),
        (np.array([[0, 1, 2, 0, 3, 5, 6, 7, 8]] * 2), {"attention_mask": mask}, r"\[0, 4\] is 3"),
        (np.array([[0, 1, 2, 3, 4, 0, 1, 3, 0]] * 2), {"segment_ids": segments}, r"\[0, 7\] is 3"),
    ):
        with pytest.raises(InputError, match=rf"position_ids{where}, but the model's positions are relative"):
            model(ids, position_ids=wrong, **options)


def test_embeddings_stand_in_for_ids():
    model = tiny(RELATIVE[1])
    table = np.asarray(model.embeddings.word_embeddings.embedding[...])
    ids, segments = random_ids((2, 9)), np.repeat([[1, 2, 0]], [4, 3, 2], axis=1).repeat(2, axis=0)
    options = {"segment_ids": segments, "max_segments": 2, "token_type_ids": ids % 2}
    expected, found = model(ids, **options), model(inputs_embeds=table[ids], **options)
    for field in ("last_hidden_state", "pooler_output"):
        np.testing.assert_allclose(getattr(found, field), getattr(expected, field), rtol=0, atol=1e-5)
    model(inputs_embeds=table[ids])  # and nothing but embeddings will do


def test_the_pooler_reads_every_segment():
    model, ids = tiny(), random_ids((2, 9))
    segments = np.array([[2, 2, 1, 1, 1, 1, 3, 0, 0], [0, 0, 0, 3, 3, 3, 3, 3, 3]])
    pooled = model(ids, segment_ids=segments, max_segments=4).pooler_output
    assert pooled.shape == (2, 4, 32)
    assert jnp.isfinite(pooled).all()
    # each text alone, in a row of its own
    rows, mask = np.zeros((4, 9), int), np.zeros((4, 9), int)
    places = [(0, 1), (0, 2), (0, 3), (1, 3)]
    for at, (row, number) in enumerate(places):
        text = ids[row][segments[row] == number]
        rows[at, : len(text)], mask[at, : len(text)] = text, 1
    alone = model(rows, mask).pooler_output
    found = np.stack([pooled[row, number - 1] for row, number in places])
    np.testing.assert_allclose(found, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_segments": 2}, "pass segment_ids with it"),
        ({"max_segments": 0, "segment_ids": np.ones((2, 9), int)}, "max_segments is 0, expected a positive integer"),
        ({"max_segments": True, "segment_ids": np.ones((2, 9), int)}, "max_segments is True, expected"),
        ({"max_segments": 2.0, "segment_ids": np.ones((2, 9), int)}, "max_segments is 2.0, expected"),
    ],
)
def test_other_max_segments_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        tiny()(random_ids((2, 9)), **options)
    if message.startswith("pass"):
        with pytest.raises(InputError, match="this model has no pooler"):
            tiny(add_pooling_layer=False)(random_ids((2, 9)), max_segments=2, segment_ids=np.ones((2, 9), int))


def test_a_masked_head_counts_for_what_its_mask_says():
    model, ids = tiny(), random_ids((2, 9))
    plain = model(ids, output_attentions=True)
    ones = model(ids, output_attentions=True, head_mask=np.ones(4, bool))
    np.testing.assert_allclose(ones.last_hidden_state, plain.last_hidden_state, rtol=0, atol=1e-5)
    mask = np.array([[1, 0.5, 0, 1]] * 3)
    masked = model(ids, output_attentions=True, head_mask=mask)
    sums = np.broadcast_to(mask[:, None, :, None], (3, 2, 4, 9))
    np.testing.assert_allclose(masked.attentions.sum(-1), sums, rtol=0, atol=1e-6)
    # what a head adds is linear in its values, which may as well be scaled
    values, scale = model.encoder.layers.attention.value, np.repeat(mask[0], 8).astype(np.float32)
    values.kernel[...], values.bias[...] = values.kernel[...] * scale, values.bias[...] * scale
    np.testing.assert_allclose(model(ids).last_hidden_state, masked.last_hidden_state, rtol=0, atol=1e-5)


def test_padding_teaches_its_embedding_nothing():
    """As in the reference, whose word embeddings have a padding_idx; the other words that occur do learn."""
    ids = np.array([[5, 7, 9, 7]])
    for pad, learnt in ((7, [5, 9]), (None, [5, 7, 9])):
        embeddings = tiny(dataclasses.replace(TINY, pad_token_id=pad)).embeddings
        graphdef, state = nnx.split(embeddings)
        weights = np.random.default_rng(0).normal(size=(1, 4, 32)).astype(np.float32)

        def total(state, graphdef=graphdef, weights=weights):
            return jnp.sum(weights * nnx.merge(graphdef, state)(ids, 0 * ids, 0 * ids))

        gradients = nnx.to_pure_dict(jax.jit(jax.grad(total))(state))
        rows = jnp.abs(gradients["word_embeddings"]["embedding"]).max(-1)
        np.testing.assert_array_equal(np.flatnonzero(rows), learnt)


def test_activations_slopes_match_torch():
    torch, activations = require("torch"), require("transformers.activations")
    x = np.linspace(-8, 8, 2001, dtype=np.float32)
    found = jax.jit(lambda x: {name: jax.vmap(jax.grad(f))(x) for name, f in ACTIVATION_FUNCTIONS.items()})(x)
    for name, slopes in found.items():
        theirs = torch.tensor(x, requires_grad=True)
        activations.ACT2FN[name](theirs).sum().backward()
        # where tanh is all but -1, a rounding of 1 + tanh is multiplied by the slope of its argument, up to 60 here
        np.testing.assert_allclose(slopes, theirs.grad, rtol=0, atol=1e-5, err_msg=name)


def test_all_layers_unrolled_is_not_taken_for_one_at_a_time():
    ids = random_ids((2, 9))
    for unroll, loops in ((1, True), (True, False)):
        apply, params = functional(tiny(unroll=unroll))
        assert ("stablehlo.while" in jax.jit(apply).lower(params, ids).as_text()) == loops


@pytest.mark.parametrize("unroll", [True, 4, 6, 7])
def test_layers_without_a_loop_are_not_computed_again(unroll):
    config = dataclasses.replace(TINY, num_hidden_layers=6)
    message = rf"unroll is {6 if unroll is True else unroll} of 6 layers and remat is True.*unroll at most 3, or"
    with pytest.raises(ConfigError, match=message):
        BertModel(config, unroll=unroll, remat=True, rngs=nnx.Rngs(0))
    BertModel(dataclasses.replace(config, num_hidden_layers=1), unroll=unroll, remat=True, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("unroll", [1, 3])
def test_remat_saves_memory(unroll):
    config = dataclasses.replace(
        TINY, num_hidden_layers=6, hidden_size=64, num_attention_heads=2, intermediate_size=256
    )
    ids = np.ones((8, 40), np.int32)

    def temporary(remat):
        apply, params = functional(BertModel(config, remat=remat, unroll=unroll, rngs=nnx.Rngs(0)))
        slopes = jax.jit(jax.grad(lambda params: (apply(params, ids).last_hidden_state ** 2).sum()))
        return slopes.lower(params).compile().memory_analysis().temp_size_in_bytes

    assert temporary(True) < 0.7 * temporary(False)


def test_unroll_and_remat_change_nothing():
    ids = random_ids((2, 9))
    expected = tiny()(ids).last_hidden_state
    for options in ({"unroll": 2}, {"unroll": True}, {"remat": True}):
        np.testing.assert_allclose(tiny(**options)(ids).last_hidden_state, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("remat", "dropped", "expected"), [(False, False, 12), (False, True, 12.75), (True, True, 1)])
def test_what_is_kept_of_a_layer_for_the_backward_pass(remat, dropped, expected):
    config = dataclasses.replace(TINY, hidden_size=64, num_attention_heads=2, intermediate_size=256)
    apply, params = functional(BertModel(config, remat=remat, rngs=nnx.Rngs(0)))
    ids, layers = np.ones((5, 32), np.int32), config.num_hidden_layers
    key = jax.random.key(0) if dropped else None
    back = jax.vjp(lambda params: apply(params, ids, dropout_key=key).last_hidden_state, params)[1]
    kept = [array.nbytes for array in jax.tree.leaves(back) if array.shape[:2] == (layers, 5)]
    # In hidden states: the layer's input, query, key, value, context, the output of attention and that of the
    # feed-forward block, whose inside is four wide; scores, of 32 keys in two heads, are one. And a byte for each
    # number that may be dropped, in two hidden states and the scores.
    assert sum(kept) / (layers * 5 * 32 * 64 * 4) == expected


def test_remat_gives_the_same_gradients():
    def gradients(model):
        apply, params = functional(model)
        return jax.grad(lambda params: apply(params, random_ids((2, 9))).last_hidden_state[:, 0].sum())(params)

    for a, b in zip(jax.tree.leaves(gradients(tiny())), jax.tree.leaves(gradients(tiny(remat=True))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_lower_precision_is_near_and_accumulates_in_float32(dtype):
    ids = random_ids((2, 9))
    model = tiny(dtype=dtype)
    output = model(ids, output_attentions=True)
    exact = tiny()(ids)
    assert output.last_hidden_state.dtype == jnp.float32
    # Rows of float32 softmax sum to one far more closely than this dtype could say.
    np.testing.assert_allclose(output.attentions.sum(-1), 1.0, rtol=0, atol=1e-6)
    error = float(jnp.abs(output.last_hidden_state - exact.last_hidden_state).max())
    assert 0 < error < 64 * float(jnp.finfo(dtype).eps)
    text = jax.jit(lambda ids: model(ids).last_hidden_state).lower(ids).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    name = {"bfloat16": "bf16", "float16": "f16"}[jnp.dtype(dtype).name]
    assert dots
    for line in dots:
        operands, result = line.split(" : ")[1].split("->")
        assert operands.count(f"x{name}>") == 2, line
        assert result.strip().endswith("xf32>"), line


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_matmuls_take_xlas_fast_path_on_cpu(dtype):
    """XLA hands a matmul to its CPU kernel library only if the operands' layout suits; a slip costs half the speed."""
    model = tiny(dtype=dtype, add_pooling_layer=False)
    run = jax.jit(lambda ids, segments: model(ids, segment_ids=segments).last_hidden_state)
    text = run.lower(random_ids((4, 32)), np.ones((4, 32), int)).compile().as_text()
    fast = set(re.findall(r"%ynn_fusion\S* = .*calls=(%\S+),", text))
    computations = {part.split(" ")[0]: part for part in text.split("\n\n")}
    with_dots = {name: part.count(" dot(") for name, part in computations.items() if " dot(" in part}
    # query, key, value and output, the two of the feed-forward, and attention's own two
    assert sum(with_dots.values()) == 8
    assert with_dots.keys() <= fast


def test_float32_asks_for_the_highest_precision():
    text = jax.jit(lambda ids: tiny()(ids)).lower(random_ids((2, 9))).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert dots
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in dots)


def test_dropout_is_off_without_a_key_and_random_with_one():
    model, ids = tiny(), random_ids((2, 9))
    plain = model(ids).last_hidden_state
    np.testing.assert_array_equal(plain, model(ids).last_hidden_state)
    for wrong in (3, "key", np.float32(1), jax.random.split(jax.random.key(1))):
        with pytest.raises(InputError, match="expected one random key"):
            model(ids, dropout_key=wrong)
    one = model(ids, dropout_key=jax.random.key(1)).last_hidden_state
    np.testing.assert_array_equal(one, model(ids, dropout_key=jax.random.key(1)).last_hidden_state)
    two = model(ids, dropout_key=jax.random.key(2)).last_hidden_state
    assert float(jnp.abs(one - plain).max()) > 1e-2
    assert float(jnp.abs(one - two).max()) > 1e-2


def test_dropout_rates_of_zero_drop_nothing():
    config = dataclasses.replace(TINY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model, ids = tiny(config), random_ids((2, 9))
    with_key = model(ids, dropout_key=jax.random.key(1)).last_hidden_state
    np.testing.assert_allclose(with_key, model(ids).last_hidden_state, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rate", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_each_dropout_rate_is_used(rate):
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, rate: 0.5}
    model, ids = tiny(dataclasses.replace(TINY, **rates)), random_ids((2, 9))
    dropped = model(ids, dropout_key=jax.random.key(1)).last_hidden_state
    assert float(jnp.abs(dropped - model(ids).last_hidden_state).max()) > 1e-2


def test_functional_composes_with_jit_grad_and_vmap():
    model = tiny()
    apply, params = functional(model)
    ids = random_ids((4, 2, 9))
    expected = np.stack([model(rows).last_hidden_state for rows in ids])
    jitted = jax.jit(apply)
    np.testing.assert_allclose(jitted(params, ids[0]).last_hidden_state, expected[0], rtol=0, atol=1e-5)
    mapped = jax.vmap(apply, in_axes=(None, 0))(params, ids)
    np.testing.assert_allclose(mapped.last_hidden_state, expected, rtol=0, atol=1e-5)
    gradients = jax.jit(jax.grad(lambda params: jitted(params, ids[0]).pooler_output.sum()))(params)
    assert jax.tree.structure(gradients) == jax.tree.structure(params)
    for path, leaf in jax.tree.leaves_with_path(gradients):
        # A key's bias shifts all scores of a query alike, so the softmax ignores it.
        assert float(jnp.abs(leaf).max()) > 0 or "'key'" in str(path), path


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_inputs_may_be_spread_over_devices(kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    model, ids = tiny(), random_ids((16, 9))
    spread = jax.device_put(ids, NamedSharding(mesh, PartitionSpec("data")))
    output = model(spread).last_hidden_state
    assert len(output.sharding.device_set) == 8
    np.testing.assert_allclose(output, model(ids).last_hidden_state, rtol=0, atol=1e-5)


def test_strict_promotion_of_dtypes_and_ranks():
    sentence = SentenceModel(tiny(add_pooling_layer=False), pooling=POOLING_MODES, modules=(Normalize(),))
    ids = random_ids((2, 9))
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        output = tiny(dtype=jnp.bfloat16)(ids, segment_ids=np.ones_like(ids), dropout_key=jax.random.key(0))
        assert jnp.isfinite(output.last_hidden_state).all()
        assert jnp.isfinite(sentence(ids, np.ones_like(ids))).all()


def test_functional_composes_with_shard_map():
    devices = jax.devices()
    assert len(devices) == 8, "this test needs eight devices; see conftest.py"
    mesh = Mesh(np.array(devices), ("data",))
    model = tiny()
    apply, params = functional(model)
    ids = random_ids((16, 9))
    sharded = jax.jit(
        jax.shard_map(
            lambda params, ids: apply(params, ids).last_hidden_state,
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec("data")),
            out_specs=PartitionSpec("data"),
        )
    )(params, ids)
    assert len(sharded.sharding.device_set) == 8
    np.testing.assert_allclose(sharded, model(ids).last_hidden_state, rtol=0, atol=1e-5)


def test_the_gradient_is_the_slope():
    apply, params = functional(tiny())
    ids = random_ids((2, 9))
    direction = jax.tree.map(lambda leaf: jnp.sign(leaf + 0.1), params)
    loss = jax.jit(lambda params: jnp.square(apply(params, ids).pooler_output).sum())
    slope = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (jax.grad(loss)(params), direction)), strict=True))
    step = 1e-3
    moved = [jax.tree.map(lambda leaf, d, sign=sign: leaf + sign * step * d, params, direction) for sign in (1, -1)]
    numeric = (loss(moved[0]) - loss(moved[1])) / (2 * step)
    np.testing.assert_allclose(slope, numeric, rtol=2e-2)


def test_works_with_nnx_transforms():
    model, ids = tiny(), random_ids((2, 9))
    expected = model(ids).pooler_output
    np.testing.assert_allclose(nnx.jit(lambda model, ids: model(ids).pooler_output)(model, ids), expected, atol=1e-5)
    gradients = nnx.grad(lambda model: model(ids).pooler_output.sum())(model)
    assert jax.tree.leaves(gradients)


def test_a_second_call_compiles_nothing():
    model, ids = tiny(), random_ids((2, 9))
    model(ids)
    assert compiles(lambda: model(random_ids((2, 9), seed=1))) == 0
    assert compiles(lambda: model(random_ids((2, 10)))) > 0  # the counter does count


def test_named_parameters_of_bert_base_and_large():
    for preset, tensors, total in (("base", 199, 109_482_240), ("large", 391, 335_141_888)):
        config = BertConfig.preset(preset)
        model = nnx.eval_shape(lambda config=config: BertModel(config, rngs=nnx.Rngs(0)))
        parameters = named_parameters(model)
        assert len(parameters) == tensors
        assert sum(int(np.prod(struct.shape)) for struct in parameters.values()) == total
        assert parameter_table(model).endswith(f"{tensors} tensors, {total:,} parameters")


def test_named_parameters_are_torchs_own():
    transformers = require("transformers")
    config = {name: getattr(TINY, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    config |= {"num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 40}
    reference = transformers.BertModel(transformers.BertConfig(**config))
    expected = {name: tuple(parameter.shape) for name, parameter in reference.named_parameters()}
    assert {name: struct.shape for name, struct in named_parameters(tiny()).items()} == expected


def test_initialisation_is_the_papers():
    model = BertModel(dataclasses.replace(TINY, vocab_size=5000, initializer_range=0.02), rngs=nnx.Rngs(0))
    words = np.asarray(model.embeddings.word_embeddings.embedding[...])
    assert np.abs(words).max() <= 0.04
    assert abs(words.std() - 0.02 * 0.8796) < 2e-4  # a normal cut at two deviations has 0.8796 of its deviation
    layers = model.encoder.layers
    kernels = np.asarray(layers.attention.query.kernel[...])
    assert np.abs(kernels[0] - kernels[1]).max() > 0.01  # every layer has its own draw
    assert not np.asarray(layers.attention.query.bias[...]).any()
    assert (np.asarray(layers.attention_norm.scale[...]) == 1).all()


def test_printing_shows_the_module_tree():
    text = str(tiny())
    assert text.splitlines()[0] == "BertModel"
    assert "  encoder: BertEncoder\n    layers: BertLayer\n      attention: BertSelfAttention" in text
    assert "kernel: float32[3, 32, 64]" in text


def test_without_a_pooler():
    assert tiny(add_pooling_layer=False)(random_ids((2, 9))).pooler_output is None


@pytest.mark.parametrize("option", ["dtype", "param_dtype"])
@pytest.mark.parametrize("value", ["int16", "float64", "no such"])
def test_other_dtypes_are_refused(option, value):
    with pytest.raises(ConfigError, match=rf"{option}='{value}' is not supported.*float32, bfloat16, float16"):
        tiny(**{option: value})


@pytest.mark.parametrize("unroll", [0, -1, False, "all"])
def test_other_unrolls_are_refused(unroll):
    with pytest.raises(ConfigError, match="expected a positive integer or True"):
        tiny(unroll=unroll)


def test_functional_takes_a_model():
    for other in (None, "model", tiny):
        with pytest.raises(InputError, match="functional takes a model, not a"):
            functional(other)
    with pytest.raises(InputError, match="expected a BertModel, not a BertEncoder"):
        named_parameters(tiny().encoder)
