import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertjax.convert.rules import EMBED, LINEAR, NORM, Row, by_array, expand, flatten, unflatten

TABLE = (
    Row("words", ("words",), EMBED),
    Row("layer.{layer}.dense", ("layers", "dense"), LINEAR),
    Row("layer.{layer}.norm", ("layers", "norm"), NORM),
    Row("head", ("head",), LINEAR),
)
SIZES = st.integers(1, 5)


@st.composite
def tree_shapes(draw):
    """Shapes of our arrays, as the table has them; the head may be absent, as a pooler may."""
    depth, rows, width, inner = draw(st.integers(1, 12)), draw(SIZES), draw(SIZES), draw(SIZES)
    shapes = {
        ("words", "embedding"): (rows, width),
        ("layers", "dense", "kernel"): (depth, width, inner),
        ("layers", "dense", "bias"): (depth, inner),
        ("layers", "norm", "scale"): (depth, width),
        ("layers", "norm", "bias"): (depth, width),
    }
    if draw(st.booleans()):
        shapes |= {("head", "kernel"): (width, inner), ("head", "bias"): (inner,)}
    return shapes


@settings(deadline=None)
@given(tree_shapes())
def test_what_is_written_through_slots_is_read_back_and_fills_every_array(shapes):
    slots = expand(TABLE, shapes)
    assert len({slot.name for slot in slots}) == len(slots)
    arrays = {path: np.full(shape, np.nan) for path, shape in shapes.items()}
    rng = np.random.default_rng(0)
    tensors = {slot.name: rng.normal(size=slot.shape) for slot in slots}
    for slot in slots:
        slot.view(arrays[slot.path])[...] = tensors[slot.name]
    for slot in slots:
        assert slot.view(arrays[slot.path]).tobytes() == tensors[slot.name].tobytes()
    assert all(np.isfinite(array).all() for array in arrays.values())
    assert sum(tensor.size for tensor in tensors.values()) == sum(array.size for array in arrays.values())


@settings(deadline=None)
@given(tree_shapes())
def test_slots_agree_with_the_mathematics_of_both_frameworks(shapes):
    """torch computes x @ weight.T, Flax x @ kernel; layer i of a stack is index i."""
    arrays = {path: np.random.default_rng(1).normal(size=shape) for path, shape in shapes.items()}
    slots = {slot.name: slot for slot in expand(TABLE, shapes)}
    x = np.arange(shapes["words", "embedding"][1], dtype=float)
    for layer in range(shapes["layers", "dense", "kernel"][0]):
        weight = slots[f"layer.{layer}.dense.weight"]
        assert weight.shape == shapes["layers", "dense", "kernel"][:0:-1]
        ours = x @ arrays["layers", "dense", "kernel"][layer]
        np.testing.assert_array_equal(weight.view(arrays["layers", "dense", "kernel"]) @ x, ours)


def test_order_is_plain_tensors_then_layer_by_layer():
    shapes = {
        ("words", "embedding"): (2, 3),
        ("layers", "dense", "kernel"): (2, 3, 3),
        ("layers", "dense", "bias"): (2, 3),
        ("layers", "norm", "scale"): (2, 3),
        ("layers", "norm", "bias"): (2, 3),
    }
    slots = expand(TABLE, shapes)
    leaves = ("dense.weight", "dense.bias", "norm.weight", "norm.bias")
    assert [slot.name for slot in slots] == [
        "words.weight",
        *(f"layer.{layer}.{leaf}" for layer in (0, 1) for leaf in leaves),
    ]
    assert list(map(len, by_array(slots).values())) == [1, 2, 2, 2, 2]


@pytest.mark.parametrize(
    ("table", "changed", "message"),
    [
        (TABLE[:1], {}, "kernel"),
        ((*TABLE, TABLE[0]), {}, "words"),
        (TABLE, {("odd", "kernel"): (2, 2)}, "odd"),
        (TABLE, {("layers", "norm", "bias"): (3, 3)}, "depth"),
    ],
    ids=["a row is missing", "a row is there twice", "an array without a row", "stacks of two depths"],
)
def test_a_table_that_does_not_fit_the_tree_is_refused(table, changed, message):
    shapes = {
        ("words", "embedding"): (2, 3),
        ("layers", "dense", "kernel"): (2, 3, 3),
        ("layers", "dense", "bias"): (2, 3),
        ("layers", "norm", "scale"): (2, 3),
        ("layers", "norm", "bias"): (2, 3),
    }
    assert expand(TABLE, shapes)
    with pytest.raises(ValueError, match=message):
        expand(table, shapes | changed)


KEYS = st.text("abc", min_size=1, max_size=2)
TREES = st.recursive(
    st.integers(), lambda children: st.dictionaries(KEYS, children, min_size=1, max_size=4), max_leaves=20
)


@given(st.dictionaries(KEYS, TREES, max_size=4))
def test_unflatten_is_the_inverse_of_flatten(tree):
    leaves = dict(flatten(tree))
    assert unflatten(leaves.items()) == tree
    assert dict(flatten(unflatten(leaves.items()))) == leaves
