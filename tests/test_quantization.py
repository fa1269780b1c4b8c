import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import require

from bertjax import InputError
from bertjax.quantization import PRECISIONS, calibrate, check_ranges, quantize, quantized_width

DIM = 21  # no multiple of eight, so that packed bits end in padding


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """Vectors with a number that is always the same, numbers that are exactly zero, and numbers outside any range."""
    found = np.random.default_rng(0).normal(0.0, 0.1, (4000, DIM)).astype(np.float32)
    found[:, 3] = 0.25
    found[::5, 7] = 0.0
    found[1::5, 7] = -0.0
    return found


def reference(vectors, precision, **options):
    return require("sentence_transformers.util.quantization").quantize_embeddings(vectors, precision, **options)


def compiled(vectors, precision, ranges=None):
    return np.asarray(jax.jit(lambda vectors: quantize(vectors, precision, ranges))(vectors))


@pytest.mark.parametrize("calibrating", [slice(None), slice(0, 2), slice(100, 1100)])
def test_int8_is_sentence_transformers(vectors, calibrating):
    expected = reference(vectors, "int8", calibration_embeddings=vectors[calibrating])
    found = compiled(vectors, "int8", calibrate(vectors[calibrating]))
    assert found.dtype == np.int8
    np.testing.assert_array_equal(found, expected)
    assert found[:, 0].min() == -128
    assert found[:, 0].max() == 127


def test_int8_takes_ranges_as_sentence_transformers_does(vectors):
    ranges = np.stack([np.full(DIM, -0.2), np.linspace(0.01, 0.3, DIM)])
    np.testing.assert_array_equal(
        compiled(vectors, "int8", ranges), reference(vectors, "int8", ranges=ranges.astype(np.float32))
    )


@pytest.mark.parametrize("dim", [DIM, 16, 8, 3, 1])
def test_binary_is_sentence_transformers(vectors, dim):
    expected = reference(vectors[:, :dim], "ubinary")
    found = compiled(vectors[:, :dim], "binary")
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


def test_float16_rounds_to_nearest(vectors):
    np.testing.assert_array_equal(compiled(vectors, "float16"), vectors.astype(np.float16))
    np.testing.assert_array_equal(compiled(vectors, "float32"), vectors)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_leading_axes_stay_and_the_shape_is_announced(vectors, precision):
    ranges = calibrate(vectors) if precision == "int8" else None
    found = quantize(jnp.asarray(vectors[:6].reshape(2, 3, DIM)), precision, ranges)
    assert found.shape == (2, 3, quantized_width(DIM, precision))
    assert found.dtype == PRECISIONS[precision]
    np.testing.assert_array_equal(np.asarray(found).reshape(6, -1), compiled(vectors[:6], precision, ranges))


def test_what_made_the_vectors_does_not_change_their_levels(vectors):
    """A product before and a subtraction after it would be one rounding less, if they were compiled into one."""
    factor = np.float32(1.7320508)
    scale = jax.jit(lambda vectors: vectors * factor)
    ranges = calibrate(scale(vectors))
    together = jax.jit(lambda vectors: quantize(vectors * factor, "int8", ranges))(vectors)
    np.testing.assert_array_equal(together, reference(np.asarray(scale(vectors)), "int8", ranges=ranges))


def test_ranges_of_a_stream_are_those_of_the_whole(vectors):
    ranges = None
    for begin in range(0, len(vectors), 700):
        ranges = calibrate(vectors[begin : begin + 700], ranges)
    np.testing.assert_array_equal(ranges, np.stack([vectors.min(0), vectors.max(0)]))
    assert ranges.dtype == np.float32
    np.testing.assert_array_equal(calibrate(jnp.asarray(vectors)), ranges)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((0, 4), np.float32), r"float32 of shape \(0, 4\), expected floats \[n, dim\] and at least one"),
        (np.zeros(4, np.float32), r"float32 of shape \(4,\), expected floats"),
        (np.zeros((1, 4), np.int8), r"int8 of shape \(1, 4\), expected floats"),
        (np.array([[0.0, 1.0], [np.nan, 0.0]]), r"vectors\[1\] has a number that is not finite"),
    ],
)
def test_what_has_no_range_is_refused(bad, message):
    with pytest.raises(InputError, match=message):
        calibrate(bad)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((2, 3)), r"float64 of shape \(2, 3\), expected floats \[2, 2\]"),
        (np.zeros((2, 2), int), r"int64 of shape \(2, 2\), expected floats"),
        ([[0.0, 1.0], [1.0, 0.0]], "ranges of number 1 are 1.0 to 0.0, which is no range"),
        ([[0.0, 0.0], [1.0, np.inf]], "ranges of number 1 are 0.0 to inf, which is no range"),
        ([[0.0, -3e38], [1.0, 3e38]], "ranges of number 1 are .* to .*, which is no range"),
    ],
)
def test_what_is_no_range_is_refused(bad, message):
    with pytest.raises(InputError, match=message):
        check_ranges(bad, 2)
    with pytest.raises(InputError, match=message):
        calibrate(np.zeros((1, 2)), bad)
    with pytest.raises(InputError, match=message):
        quantize(jnp.zeros((1, 2)), "int8", bad)


@pytest.mark.parametrize(
    ("precision", "ranges", "message"),
    [
        ("uint8", None, "precision is 'uint8', expected one of 'float32', 'float16', 'int8', 'binary'"),
        ("int8", None, "precision 'int8' needs ranges"),
        ("binary", np.zeros((2, 2)), "precision 'binary' has no ranges"),
    ],
)
def test_precisions_and_ranges_go_together(precision, ranges, message):
    with pytest.raises(InputError, match=message):
        quantize(jnp.zeros((1, 2)), precision, ranges)
