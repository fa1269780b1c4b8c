import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bertjax import BertConfig, InputError
from bertjax.inputs import check_inputs

CONFIG = BertConfig(vocab_size=50, type_vocab_size=2, max_position_embeddings=12)
IDS = np.arange(8).reshape(2, 4)


def changed(array, where, value):
    array = np.array(array)
    array[where] = value
    return array


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((np.arange(4),), r"shape \(4,\), expected \[batch, length\]; add the batch axis with input_ids\[None\]"),
        ((np.zeros((1, 2, 3), int),), r"shape \(1, 2, 3\), expected \[batch, length\]"),
        ((np.zeros((2, 0), int),), "there are no tokens"),
        (([[1, 2], [3]],), "input_ids is ragged; pad its rows"),
        ((IDS.astype(np.float32),), "input_ids has dtype float32, expected integers"),
        ((changed(IDS, (1, 2), 50),), r"input_ids\[1, 2\] is 50, outside 0..49"),
        ((changed(IDS, (0, 3), -1),), r"input_ids\[0, 3\] is -1, outside 0..49"),
        ((changed(IDS, (0, 3), 2**40),), r"input_ids\[0, 3\] is 1099511627776, outside"),
        ((np.zeros((1, 13), int),), "13 tokens long, the model has 12 positions; truncate"),
        ((IDS, np.ones((2, 5))), r"attention_mask has shape \(2, 5\), input_ids has \(2, 4\)"),
        ((IDS, changed(np.ones((2, 4)), (1, 1), -1e9)), r"attention_mask\[1, 1\] is -1000000000.0, neither 0 nor 1"),
        ((IDS, changed(np.ones((2, 4)), (1, 1), np.nan)), r"attention_mask\[1, 1\] is nan, neither 0 nor 1"),
        ((IDS, changed(np.ones((2, 4)), 1, 0)), "attention_mask row 1 is all padding"),
        ((IDS, None, np.full((2, 4), 2)), r"token_type_ids\[0, 0\] is 2, outside 0..1"),
        ((IDS, None, None, np.full((2, 4), 12)), r"position_ids\[0, 0\] is 12, outside 0..11"),
        ((IDS, None, None, np.zeros((4,), int)), r"position_ids has shape \(4,\)"),
        ((IDS, None, None, None, np.full((2, 4), -1)), r"segment_ids\[0, 0\] is -1, outside"),
        (
            (np.zeros((2, 20), int), None, None, None, np.repeat([[1, 2, 0], [1, 3, 4]], [5, 13, 2], axis=1)),
            r"the segment at \[0, 5\] is longer than the model's 12 positions",
        ),
        (
            (IDS, None, None, None, [[1, 1, 2, 2], [2, 0, 1, 2]]),
            r"segment_ids\[1, 3\] is 2 again, after another segment",
        ),
    ],
)
def test_unusable_inputs_are_refused_with_the_position(inputs, message):
    with pytest.raises(InputError, match=message):
        check_inputs(CONFIG, *inputs)
    on_device = [jnp.asarray(each) if isinstance(each, np.ndarray) and each.size else each for each in inputs]
    if not any("is 1099511627776" in part for part in [message]):  # what int32 can't hold never reaches a device
        with pytest.raises(InputError, match=message):
            check_inputs(CONFIG, *on_device)


EMBEDS = np.ones((2, 4, 768), np.float32)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "pass either input_ids or inputs_embeds, one of the two"),
        ({"input_ids": IDS, "inputs_embeds": EMBEDS}, "pass either input_ids or inputs_embeds"),
        (
            {"inputs_embeds": EMBEDS[0]},
            r"shape \(4, 768\), expected \[batch, length, hidden\]; .* inputs_embeds\[None\]",
        ),
        ({"inputs_embeds": EMBEDS[:, :0]}, "there are no tokens"),
        ({"inputs_embeds": EMBEDS[..., :9]}, r"shape \(2, 4, 9\), the model's hidden size is 768"),
        ({"inputs_embeds": EMBEDS.astype(int)}, "inputs_embeds has dtype int64, expected floats"),
        ({"inputs_embeds": np.ones((1, 13, 768))}, "inputs_embeds is 13 tokens long, the model has 12"),
        (
            {"inputs_embeds": EMBEDS, "attention_mask": np.ones((2, 5))},
            r"inputs_embeds without its last axis has \(2, 4\)",
        ),
        ({"input_ids": IDS, "head_mask": np.ones(4)}, r"head_mask has shape \(4,\), expected \(12,\) or \(12, 12\)"),
        ({"input_ids": IDS, "head_mask": changed(np.ones(12), 3, np.nan)}, r"head_mask\[3\] is nan, not finite"),
        ({"input_ids": IDS, "head_mask": ["a"] * 12}, "head_mask has dtype <U1, expected numbers"),
        ({"input_ids": IDS, "head_mask": np.ones(12, complex)}, "head_mask has dtype complex128, expected numbers"),
    ],
)
def test_unusable_embeddings_and_head_masks_are_refused(inputs, message):
    with pytest.raises(InputError, match=message):
        check_inputs(CONFIG, **{"input_ids": None, **inputs})


@pytest.mark.parametrize("dtype", [bool, np.int8, np.int64, np.float16, np.float64, jnp.bfloat16])
def test_head_masks_of_any_dtype_become_float32_for_every_layer(dtype):
    mask = changed(np.ones(12), 5, 0).astype(dtype)
    found = check_inputs(CONFIG, IDS, head_mask=mask)["head_mask"]
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, np.tile(mask.astype(np.float32), (12, 1)))
    rows = changed(np.ones((12, 12)), (3, 4), 0.25)
    np.testing.assert_array_equal(check_inputs(CONFIG, IDS, head_mask=rows)["head_mask"], rows)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, jnp.bfloat16])
def test_embeddings_of_any_precision_become_float32(dtype):
    found = check_inputs(CONFIG, None, inputs_embeds=EMBEDS.astype(dtype))
    assert found["inputs_embeds"].dtype == jnp.float32
    assert found["input_ids"] is None


@pytest.mark.parametrize("mask", [np.ones((2, 4), bool), np.ones((2, 4), np.float32), [[1, 1, 1, 0], [1, 0, 0, 0]]])
def test_masks_of_any_dtype_become_bool(mask):
    found = check_inputs(CONFIG, IDS, mask)["attention_mask"]
    assert found.dtype == bool
    np.testing.assert_array_equal(found, np.asarray(mask) != 0)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64])
def test_ids_of_any_integer_dtype_become_int32(dtype):
    found = check_inputs(CONFIG, IDS.astype(dtype))["input_ids"]
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, IDS)


def test_packed_rows_may_be_longer_than_the_positions():
    segments = np.repeat([[1, 2, 0]], [8, 12, 0], axis=1)
    assert check_inputs(CONFIG, np.zeros((1, 20), int), segment_ids=segments)["segment_ids"].shape == (1, 20)
    segments = np.repeat([[1, 0]], [3, 17], axis=1)
    assert check_inputs(CONFIG, np.zeros((1, 20), int), segment_ids=segments)["segment_ids"].shape == (1, 20)


def test_an_empty_batch_is_a_batch():
    assert check_inputs(CONFIG, np.zeros((0, 4), int))["input_ids"].shape == (0, 4)


def test_inside_jit_a_mask_to_be_added_is_not_mistaken_for_one_to_be_looked_at():
    additive = np.where(np.arange(8).reshape(2, 4) % 4 < 2, 0.0, -1e9).astype(np.float32)
    with pytest.raises(InputError, match="attention_mask has dtype float32; inside jit pass 0/1 as bool"):
        jax.jit(lambda mask: check_inputs(CONFIG, IDS, mask)["attention_mask"])(additive)


def test_inside_jit_shapes_are_checked_and_values_are_not():
    with pytest.raises(InputError, match="expected \\[batch, length\\]"):
        jax.jit(lambda ids: check_inputs(CONFIG, ids)["input_ids"])(np.arange(4))
    assert jax.jit(lambda ids: check_inputs(CONFIG, ids)["input_ids"])(np.full((1, 4), 99)).shape == (1, 4)
