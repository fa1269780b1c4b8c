import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_model, tolerance
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from oracle import require

from bertjax import BertConfig, ConfigError, InputError, SentenceModel, functional
from bertjax.sentence import DENSE_ACTIVATIONS, POOLING_MODES, Dense, Normalize, pool

TINY = BertConfig(
    vocab_size=30,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=12,
)
EPSILON = np.finfo(np.float32).eps
# Full, padded on the right, on the left, on both sides, with a hole, and a single token.
MASK = np.array(
    [
        [1, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 1, 1, 1, 1],
        [0, 1, 1, 1, 1, 1, 1, 0, 0],
        [1, 1, 0, 1, 1, 1, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 1],
    ]
)
# Two rows of packed texts, and the same texts a row each. Segment 4 is in neither row, 3 in the first only.
SEGMENTS = np.array([[1, 1, 1, 1, 2, 3, 3, 3, 0], [1, 1, 1, 2, 2, 2, 2, 2, 0]])
UNUSED = [(0, 3), (1, 2), (1, 3)]


def draw(shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def token_ids(shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, TINY.vocab_size, shape)


def dense(*sizes, **options) -> Dense:
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Dense(*sizes, rngs=nnx.Rngs(0), **options)))
    values = jax.tree.map(lambda struct: jnp.asarray(draw(struct.shape, seed=7)), nnx.to_pure_dict(state))
    return nnx.merge(graphdef, values)


def build(*modules, **options) -> SentenceModel:
    return SentenceModel(random_model(TINY, add_pooling_layer=False), modules=modules, **options)


@pytest.fixture(scope="module")
def every_mode() -> SentenceModel:
    """The vectors of all modes side by side."""
    return build(pooling=POOLING_MODES)


@pytest.fixture(scope="module")
def without_prompt() -> SentenceModel:
    return build(pooling=POOLING_MODES, include_prompt=False)


@pytest.fixture(scope="module")
def whole() -> SentenceModel:
    """All there can be: several modes, dense layers, normalisation."""
    modules = dense(32, 8), dense(8, 8, use_residual=True, use_bias=False), Normalize()
    return build(*modules, pooling=("mean", "cls"))


def reference_pooling(hidden, mask, modes, **options) -> np.ndarray:
    require("sentence_transformers")
    torch = require("torch")
    from sentence_transformers.sentence_transformer.modules import Pooling

    prompt_length = options.pop("prompt_length", None)
    features = {"token_embeddings": torch.tensor(np.asarray(hidden)), "attention_mask": torch.tensor(mask)}
    if prompt_length is not None:
        features["prompt_length"] = prompt_length
    pooling = Pooling(hidden.shape[-1], modes if len(modes) > 1 else modes[0], **options)
    return pooling(features)["sentence_embedding"].numpy()


def assert_pooled_alike(found, expected, length):
    """Modes that pick a number agree to the bit; the others add up to `length` products in another order.

    A sum of n terms is off by at most n/2 units in the last place of the sum of their sizes, on either side. A mean
    divides both by n; mean_sqrt_len_tokens by sqrt(n) only, and its values are larger in proportion.
    """
    width = expected.shape[-1] // len(POOLING_MODES)
    for position, mode in enumerate(POOLING_MODES):
        part = np.s_[..., position * width : (position + 1) * width]
        exact = mode in ("cls", "max", "lasttoken")
        root = np.sqrt(length) if mode == "mean_sqrt_len_tokens" else 1.0
        bound = 0 if exact else length * EPSILON * root
        np.testing.assert_allclose(np.asarray(found)[part], expected[part], rtol=0, atol=bound, err_msg=mode)


_pool = jax.jit(pool, static_argnums=3)


def place_in_text(mask) -> np.ndarray:
    return np.where(mask, np.arange(mask.shape[1]) - mask.argmax(1)[:, None], 0)


def test_pooling_is_the_references():
    hidden = draw((*MASK.shape, 5))
    found = _pool(jnp.asarray(hidden), jnp.asarray(MASK[:, None] == 1), jnp.asarray(place_in_text(MASK)), POOLING_MODES)
    assert found.shape == (6, 1, 30)
    assert found.dtype == jnp.float32
    assert_pooled_alike(found[:, 0], reference_pooling(hidden, MASK, POOLING_MODES), 9)


@pytest.mark.parametrize("modes", [("mean",), ("lasttoken", "cls"), ("mean", "max", "mean"), ("weightedmean", "max")])
def test_modes_are_concatenated_in_the_given_order(modes):
    hidden = draw((*MASK.shape, 5))
    found = _pool(jnp.asarray(hidden), jnp.asarray(MASK[:, None] == 1), jnp.asarray(place_in_text(MASK)), modes)
    expected = reference_pooling(hidden, MASK, modes)
    np.testing.assert_allclose(found[:, 0], expected, rtol=0, atol=9 * EPSILON)


@pytest.mark.parametrize("positions", ["zeros", "reversed"])
def test_a_model_pools_by_place_in_the_text(every_mode, positions):
    # Position ids go to the embeddings; which token is the first or the last of a text is not theirs to say.
    ids = token_ids(MASK.shape)
    positions = np.broadcast_to(np.arange(9)[::-1] if positions == "reversed" else np.zeros(9, int), ids.shape)
    hidden = every_mode.bert(ids, MASK, position_ids=positions).last_hidden_state
    found = every_mode(ids, MASK, position_ids=positions)
    assert found.dtype == jnp.float32
    expected = reference_pooling(hidden, MASK, POOLING_MODES)
    # One is compiled together with the encoder and the other is not, so the states are not the same to the bit.
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance(expected, TINY.num_hidden_layers + 1))


def test_a_model_without_a_mask_pools_all_tokens(every_mode):
    ids = token_ids((6, 9))
    expected = np.asarray(every_mode(ids, np.ones_like(ids)))
    np.testing.assert_allclose(every_mode(ids), expected, rtol=0, atol=tolerance(expected, TINY.num_hidden_layers))


def test_a_prompt_is_left_out_of_the_pooling(without_prompt):
    mask = MASK[:5]
    ids = token_ids(mask.shape)
    hidden = without_prompt.bert(ids, mask).last_hidden_state
    for length in (0, 3):
        found = without_prompt(ids, mask, prompt_length=length)
        expected = reference_pooling(hidden, mask, POOLING_MODES, prompt_length=length, include_prompt=False)
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance(expected, TINY.num_hidden_layers + 1))


def test_a_prompt_counts_unless_it_is_left_out(every_mode):
    ids = token_ids(MASK.shape)
    np.testing.assert_array_equal(every_mode(ids, MASK, prompt_length=3), every_mode(ids, MASK))


def test_a_text_of_nothing_but_prompt_gives_zeros(without_prompt):
    # The reference gives -inf for max here, and counts the prompt for cls.
    found = np.asarray(without_prompt(token_ids(MASK.shape), MASK, prompt_length=5))
    empty = MASK.sum(1) <= 5
    empty[4] = False  # its tokens after the hole are past the prompt
    assert empty.sum() == 2
    assert not found[empty].any()
    assert (np.abs(found[~empty]).max(1) > 0).all()


def unpack(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
    """The texts of packed rows one to a row: ids, mask, and where each was (row, segment - 1)."""
    where = [(row, segment - 1) for row in range(2) for segment in range(1, SEGMENTS[row].max() + 1)]
    ids, mask = np.zeros((len(where), 9), int), np.zeros((len(where), 9), int)
    for text, (row, segment) in enumerate(where):
        tokens = packed[row, SEGMENTS[row] == segment + 1]
        ids[text, : len(tokens)] = tokens
        mask[text, : len(tokens)] = 1
    return ids, mask, where


@pytest.mark.parametrize("prompt_length", [None, 2])
def test_packed_texts_give_what_padded_ones_give(every_mode, without_prompt, prompt_length):
    model, options = (every_mode, {}) if prompt_length is None else (without_prompt, {"prompt_length": prompt_length})
    packed = token_ids(SEGMENTS.shape)
    ids, mask, where = unpack(packed)
    vectors = np.asarray(model(packed, segment_ids=SEGMENTS, max_segments=4, **options))
    assert vectors.shape == (2, 4, 6 * 16)
    expected = np.asarray(model(ids, mask, **options))
    for text, place in enumerate(where):
        atol = tolerance(expected, TINY.num_hidden_layers)
        np.testing.assert_allclose(vectors[place], expected[text], rtol=0, atol=atol)
    for place in UNUSED:
        assert not vectors[place].any()
    if prompt_length is not None:
        assert not vectors[0, 1].any()  # a single token, and that is of the prompt


def test_max_segments_says_how_many_vectors_a_row_gives(every_mode):
    packed = token_ids(SEGMENTS.shape)
    all_four = every_mode(packed, segment_ids=SEGMENTS, max_segments=4)
    first = every_mode(packed, segment_ids=SEGMENTS, max_segments=1)
    np.testing.assert_allclose(first, all_four[:, :1], rtol=0, atol=tolerance(np.asarray(all_four), 2))


def test_masked_tokens_of_a_segment_do_not_count(every_mode):
    packed, mask = token_ids(SEGMENTS.shape), np.ones_like(SEGMENTS)
    mask[0, 3] = mask[1, 0] = 0  # the end of one text, the start of another
    found = np.asarray(every_mode(packed, mask, segment_ids=SEGMENTS, max_segments=4))
    hidden = every_mode.bert(packed, mask, segment_ids=SEGMENTS).last_hidden_state
    for row, segment in [(0, 1), (1, 1), (1, 2)]:
        members = (SEGMENTS[row] == segment) & (mask[row] == 1)
        expected = reference_pooling(hidden[row : row + 1], members[None].astype(int), POOLING_MODES)[0]
        atol = tolerance(expected, TINY.num_hidden_layers + 1)
        np.testing.assert_allclose(found[row, segment - 1], expected, rtol=0, atol=atol)


def test_gradients_of_packed_texts_are_those_of_padded_ones():
    _, mask, where = unpack(SEGMENTS)
    rows, segments = np.array(where).T
    members = SEGMENTS[:, None] == np.arange(1, 5)[:, None]
    places = sum(np.where(members[:, each], place_in_text(members[:, each]), 0) for each in range(4))
    weights = jnp.asarray(draw((2, 4, 30), seed=3))  # unused segments have some as well
    hidden = jnp.asarray(draw((2, 9, 5)))

    def packed_loss(hidden):
        return (weights * Normalize()(_pool(hidden, members, places, POOLING_MODES))).sum()

    def padded_loss(hidden):
        vectors = Normalize()(_pool(hidden, mask[:, None] == 1, place_in_text(mask), POOLING_MODES))[:, 0]
        return (weights[rows, segments] * vectors).sum()

    found = np.asarray(jax.grad(packed_loss)(hidden))
    padded = np.zeros((len(where), 9, 5), np.float32)
    for text, (row, segment) in enumerate(where):
        padded[text, mask[text] == 1] = hidden[row, members[row, segment]]
    expected = np.asarray(jax.grad(padded_loss)(jnp.asarray(padded)))
    for text, (row, segment) in enumerate(where):
        # As many roundings as in the sums forward, once more backward.
        atol = 2 * 9 * EPSILON * np.abs(expected).max()
        of_text = found[row, members[row, segment]]
        np.testing.assert_allclose(of_text, expected[text, mask[text] == 1], rtol=0, atol=atol)
    assert np.isfinite(found).all()
    assert not found[SEGMENTS == 0].any()


@pytest.mark.parametrize("name", DENSE_ACTIVATIONS)
@pytest.mark.parametrize("use_bias", [True, False])
def test_dense_is_the_references(name, use_bias):
    require("sentence_transformers")
    torch = require("torch")
    from sentence_transformers.sentence_transformer.modules import Dense as Reference
    from sentence_transformers.util import fullname

    activation = getattr(torch.nn, name.rsplit(".", 1)[1])()
    assert fullname(activation) == name  # what the reference writes
    module = dense(12, 7, use_bias=use_bias, activation=name)
    reference = Reference(12, 7, bias=use_bias, activation_function=activation)
    copy_dense(module, reference)
    x = 3 * draw((5, 12), seed=1)
    expected = reference({"sentence_embedding": torch.tensor(x)})["sentence_embedding"].detach().numpy()
    found = module(jnp.asarray(x))
    assert found.dtype == jnp.float32
    # 12 products of at most 3 and a bias; no activation is steeper than 1.13.
    np.testing.assert_allclose(found, expected, rtol=0, atol=13 * EPSILON * np.abs(x).max())
    assert float(np.abs(expected).max()) > 0.5


@pytest.mark.parametrize("out_features", [12, 7])
def test_dense_with_a_residual_is_the_references(out_features):
    require("sentence_transformers")
    torch = require("torch")
    from sentence_transformers.sentence_transformer.modules import Dense as Reference

    module = dense(12, out_features, use_residual=True)
    reference = Reference(12, out_features, use_residual=True)
    copy_dense(module, reference)
    assert (module.residual is None) == (out_features == 12)
    x = 3 * draw((5, 12), seed=1)
    expected = reference({"sentence_embedding": torch.tensor(x)})["sentence_embedding"].detach().numpy()
    np.testing.assert_allclose(module(jnp.asarray(x)), expected, rtol=0, atol=26 * EPSILON * np.abs(x).max())


def copy_dense(module: Dense, reference) -> None:
    torch = require("torch")
    state = {"linear.weight": module.linear.kernel[...].T}
    if module.linear.bias is not None:
        state["linear.bias"] = module.linear.bias[...]
    if module.residual is not None:
        state["residual.weight"] = module.residual.kernel[...].T
    reference.load_state_dict({name: torch.tensor(np.asarray(value)) for name, value in state.items()})


def test_other_activations_are_refused():
    with pytest.raises(ConfigError, match=r"'os\.system' is not one of torch"):
        Dense(2, 2, activation="os.system", rngs=nnx.Rngs(0))


def test_normalize_is_the_references():
    require("sentence_transformers")
    torch = require("torch")
    from sentence_transformers.sentence_transformer.modules import Normalize as Reference

    scales = np.array([1e-20, 1e-14, 1e-6, 1.0, 1e6, 1e15], np.float32)[:, None]
    x = np.concatenate([scales * draw((6, 9)), np.zeros((1, 9), np.float32)])
    expected = Reference()({"sentence_embedding": torch.tensor(x)})["sentence_embedding"].numpy()
    found = np.asarray(Normalize()(jnp.asarray(x)))
    # A sum of 9 squares, a root and a quotient; below the floor the vectors are smaller still.
    np.testing.assert_allclose(found, expected, rtol=10 * EPSILON, atol=0)
    np.testing.assert_allclose(np.linalg.norm(found[2:6], axis=1), 1.0, rtol=10 * EPSILON)
    assert not found[6].any()


def test_the_gradient_of_normalize_at_zero_is_finite():
    gradient = jax.grad(lambda x: Normalize()(x).sum())(jnp.zeros(4))
    assert np.isfinite(gradient).all()


def test_dimension_of_the_vectors(every_mode, whole):
    assert every_mode.embedding_dimension == 96
    assert whole.embedding_dimension == 8
    assert whole(token_ids((3, 5))).shape == (3, 8)
    assert build().pooling == ("mean",)
    assert build(pooling="lasttoken").embedding_dimension == 16


@pytest.mark.parametrize("pooling", ["average", ("mean", "Mean"), (), ""])
def test_other_pooling_modes_are_refused(pooling):
    with pytest.raises(ConfigError, match=r"unknown pooling .* expected one or more of"):
        build(pooling=pooling)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment_ids": SEGMENTS}, "segment_ids and max_segments go together"),
        ({"max_segments": 2}, "segment_ids and max_segments go together"),
        ({"segment_ids": SEGMENTS, "max_segments": 0}, "max_segments is 0, expected an int32 of at least 1"),
        ({"segment_ids": SEGMENTS, "max_segments": 2.0}, "max_segments is 2.0"),
        ({"segment_ids": SEGMENTS, "max_segments": True}, "max_segments is True"),
        ({"prompt_length": -1}, "prompt_length is -1, expected an int32 of at least 0"),
        ({"prompt_length": 1.0}, "prompt_length is 1.0"),
        ({"prompt_length": "2"}, "prompt_length is '2'"),
        ({"prompt_length": 10**12}, "prompt_length is 1000000000000"),
        ({"prompt_length": np.array([1, 2])}, r"prompt_length is array\(\[1, 2\]\)"),
        ({"attention_mask": np.zeros_like(SEGMENTS)}, "attention_mask"),
    ],
)
def test_unusable_inputs_are_refused(whole, options, message):
    with pytest.raises(InputError, match=message):
        whole(token_ids(SEGMENTS.shape), **options)


def test_printing_shows_the_module_tree(whole):
    assert str(whole).splitlines()[0] == "SentenceModel"
    assert "  bert: BertModel" in str(whole)


def test_functional_composes_with_jit_vmap_and_grad(whole):
    apply, params = functional(whole)
    ids, mask = token_ids((3, *MASK.shape)), np.stack([MASK] * 3)
    expected = np.stack([whole(*each) for each in zip(ids, mask, strict=True)])
    atol = tolerance(expected, TINY.num_hidden_layers + 2)
    mapped = jax.jit(jax.vmap(apply, in_axes=(None, 0, 0)))(params, ids, mask)
    np.testing.assert_allclose(mapped, expected, rtol=0, atol=atol)
    target = jnp.asarray(draw((6, 8), seed=5))
    gradients = jax.jit(jax.grad(lambda params: (target * apply(params, ids[0], mask[0])).sum()))(params)
    assert jax.tree.structure(gradients) == jax.tree.structure(params)
    for path, leaf in jax.tree.leaves_with_path(gradients):
        assert np.isfinite(leaf).all(), path
        # A key's bias shifts all scores of a query alike, so the softmax ignores it.
        assert float(jnp.abs(leaf).max()) > 0 or "'key'" in str(path), path


def test_a_prompts_length_may_be_traced(without_prompt):
    apply, params = functional(without_prompt)
    ids = token_ids((2, 9))
    lengths = jnp.arange(3)
    mapped = jax.jit(jax.vmap(lambda length: apply(params, ids, prompt_length=length)))(lengths)
    expected = np.stack([without_prompt(ids, prompt_length=length) for length in range(3)])
    np.testing.assert_allclose(mapped, expected, rtol=0, atol=tolerance(expected, TINY.num_hidden_layers))
    assert np.abs(expected[0] - expected[1]).max() > 0.01


def test_functional_composes_with_shard_map(whole):
    devices = jax.devices()
    assert len(devices) == 8, "this test needs eight devices; see conftest.py"
    apply, params = functional(whole)
    ids, segments = np.concatenate([token_ids((2, 9), seed) for seed in range(4)]), np.concatenate([SEGMENTS] * 4)
    sharded = jax.jit(
        jax.shard_map(
            lambda params, ids, segments: apply(params, ids, segment_ids=segments, max_segments=4),
            mesh=Mesh(np.array(devices), ("data",)),
            in_specs=(PartitionSpec(), PartitionSpec("data"), PartitionSpec("data")),
            out_specs=PartitionSpec("data"),
        )
    )(params, ids, segments)
    assert len(sharded.sharding.device_set) == 8
    expected = np.asarray(whole(ids, segment_ids=segments, max_segments=4))
    np.testing.assert_allclose(sharded, expected, rtol=0, atol=tolerance(expected, TINY.num_hidden_layers + 2))
