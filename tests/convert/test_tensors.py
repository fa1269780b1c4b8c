"""Reading and copying tensors, whatever the layout."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertjax.convert.tensors import TensorInfo, assign, contiguous, span

DTYPES = [np.float16, np.float32, np.float64, ml_dtypes.bfloat16, np.int64]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 700), st.integers(1, 700), st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.integers(0, 3))
def test_a_matrix_is_assigned_whatever_the_two_layouts(rows, columns, dtype, target_dtype, layouts):
    source = np.random.default_rng(0).integers(-9, 9, (rows, columns)).astype(dtype)
    source = np.asfortranarray(source) if layouts & 1 else source
    target = np.zeros((rows, columns), target_dtype, order="F" if layouts & 2 else "C")
    assign(target, source)
    np.testing.assert_array_equal(target, source.astype(target_dtype))
    copied = contiguous(source)
    assert copied.flags.c_contiguous
    assert copied.tobytes() == source.tobytes()


def test_what_is_contiguous_is_not_copied():
    for shape in ((), (0,), (3,), (2, 3), (300, 300)):
        array = np.zeros(shape)
        assert contiguous(array) is array


@settings(deadline=None)
@given(st.data())
def test_any_strides_are_read(tmp_path_factory, data):
    """Against numpy's own views of a buffer: slices, transposes, broadcasts."""
    shape = tuple(data.draw(st.lists(st.integers(0, 4), max_size=4)))
    strides = tuple(data.draw(st.integers(0, 6)) for _ in shape)
    offset, big_endian = data.draw(st.integers(0, 5)), data.draw(st.booleans())
    buffer = np.arange(offset + max(span(shape, strides), 1), dtype=">i4" if big_endian else "<i4")
    file = tmp_path_factory.mktemp("strides") / "file"
    file.write_bytes(buffer.tobytes())
    info = TensorInfo("x", file, np.dtype("<i4"), shape, 4 * offset, strides, big_endian)
    expected = np.lib.stride_tricks.as_strided(buffer[offset:], shape, [4 * stride for stride in strides])
    np.testing.assert_array_equal(info.read(), expected)


@pytest.mark.parametrize(("shape", "strides", "expected"), [((), (), 1), ((2, 3), (1, 2), 6), ((2, 0), (9, 9), 0)])
def test_a_span_reaches_from_the_first_element_to_the_last(shape, strides, expected):
    assert span(shape, strides) == expected
