import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import require

from bertjax import BertConfig
from bertjax.errors import ConfigError
from bertjax.losses import binary_cross_entropy, cross_entropy, mean_squared_error, problem_type, span_loss


def normal(*shape, seed=0, scale=3.0):
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def labels(*shape, classes=5):
    """Labels of which every third is ignored."""
    drawn = np.random.default_rng(1).integers(0, classes, shape)
    drawn.flat[::3] = -100
    return drawn


def torchs(function, *arrays):
    """The value of a PyTorch loss and its gradients by the floating arrays."""
    torch = require("torch")
    tensors = [torch.tensor(array, requires_grad=array.dtype == np.float32) for array in arrays]
    loss = function(torch.nn.functional, *tensors)
    loss.backward()
    return loss.item(), [tensor.grad.numpy() for tensor in tensors if tensor.requires_grad]


def torchs_span(functional, start, end, starts, ends):
    length = start.shape[-1]
    parts = [
        functional.cross_entropy(logits, positions.clamp(0, length), ignore_index=length)
        for logits, positions in ((start, starts), (end, ends))
    ]
    return (parts[0] + parts[1]) / 2


CASES = {
    "cross entropy": (
        cross_entropy,
        lambda functional, x, y: functional.cross_entropy(x.reshape(-1, x.shape[-1]), y.reshape(-1)),
        (normal(2, 3, 4, 5), labels(2, 3, 4)),
    ),
    "cross entropy of extremes": (
        cross_entropy,
        lambda functional, x, y: functional.cross_entropy(x, y),
        (np.array([[1e4, -1e4, 0], [-3e38, 3e38, 1], [80, 81, 82]], np.float32), np.array([0, 1, 2])),
    ),
    "binary cross entropy": (
        binary_cross_entropy,
        lambda functional, x, y: functional.binary_cross_entropy_with_logits(x, y.float()),
        (np.append(normal(4, 3), [[200, -200, 0]], 0).astype(np.float32), labels(5, 3, classes=1) == 0),
    ),
    "mean squared error": (
        mean_squared_error,
        lambda functional, x, y: functional.mse_loss(x, y.float()),
        (normal(4, 3), normal(4, 3, seed=1).astype(np.float64)),
    ),
    "span": (
        span_loss,
        torchs_span,
        (normal(5, 7), normal(5, 7, seed=1), np.array([0, 6, 7, -3, 99]), np.array([1, 6, 3, 7, 2])),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_torchs(case):
    """Both of a batch and of it in reverse, which is one program: jit, vmap and grad, and no promotion in it."""
    ours, theirs, arrays = CASES[case]
    batches = [arrays, [np.ascontiguousarray(array[::-1]) for array in arrays]]
    floating = tuple(index for index, array in enumerate(arrays) if array.dtype == np.float32)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        stacked = [jnp.asarray(np.stack(pair)) for pair in zip(*batches, strict=True)]
        values, gradients = jax.jit(jax.vmap(jax.value_and_grad(ours, floating)))(*stacked)
    assert values.dtype == jnp.float32
    for index, batch in enumerate(batches):
        expected, slopes = torchs(theirs, *batch)
        np.testing.assert_allclose(values[index], expected, rtol=1e-6, atol=1e-6)
        for found, slope in zip(gradients, slopes, strict=True):
            np.testing.assert_allclose(found[index], slope, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def value_and_gradient():
    """Cross entropy and its gradient, compiled once: call it with [3, 5] and int32 [3]."""
    compiled = jax.jit(jax.value_and_grad(cross_entropy))
    return lambda logits, labels: compiled(logits, np.asarray(labels, np.int32))


def test_cross_entropy_is_minus_the_log_of_the_share(value_and_gradient):
    shares = np.array([[0.5, 0.25, 0.125, 0.0625, 0.0625], [0.1, 0.1, 0.6, 0.1, 0.1], [0.2] * 5], np.float32)
    found, _ = value_and_gradient(np.log(shares) + 7, [1, 2, -100])
    np.testing.assert_allclose(found, -(np.log(0.25) + np.log(0.6)) / 2, rtol=1e-6)


def test_labels_may_have_a_dtype_that_cannot_say_minus_100(value_and_gradient):
    x = normal(3, 5)
    found = jax.jit(cross_entropy)(x, np.array([0, 3, 4], np.uint8))
    np.testing.assert_allclose(found, value_and_gradient(x, [0, 3, 4])[0], rtol=1e-6)


@pytest.mark.parametrize("wrong", [[-100] * 3, [1, 5, -100], [1, -1, 2], [0, -101, 2], [2**31 - 1, 0, 0]])
def test_nothing_to_score_and_labels_without_a_class_are_nan_without_a_gradient(value_and_gradient, wrong):
    value, gradient = value_and_gradient(normal(3, 5), wrong)
    assert np.isnan(value)
    np.testing.assert_array_equal(gradient, np.zeros((3, 5)))


def test_a_span_without_a_start_in_the_row_is_nan_as_torchs():
    arrays = normal(2, 4), normal(2, 4, seed=1), np.array([4, 9]), np.array([1, 2])
    assert np.isnan(torchs(torchs_span, *arrays)[0])
    value, gradients = jax.jit(jax.value_and_grad(span_loss, (0, 1)))(*arrays)
    assert np.isnan(value)
    np.testing.assert_array_equal(gradients[0], np.zeros((2, 4)))
    assert np.isfinite(gradients[1]).all()


def test_what_is_ignored_may_be_anything_and_what_is_scored_may_not(value_and_gradient):
    x, y = normal(3, 5), [1, -100, 3]
    value, gradient = value_and_gradient(x, y)
    for broken in (np.nan, np.inf, -np.inf):
        x[1, 2] = broken
        found, slope = value_and_gradient(x, y)
        np.testing.assert_array_equal(found, value)
        np.testing.assert_array_equal(slope, gradient)
    x[0, 1] = np.nan
    assert np.isnan(value_and_gradient(x, y)[0])


@pytest.mark.parametrize(
    ("configured", "num_labels", "integers", "expected"),
    [
        (None, 1, True, "regression"),
        (None, 1, False, "regression"),
        (None, 3, True, "single_label_classification"),
        (None, 3, False, "multi_label_classification"),
        ("regression", 3, True, "regression"),
        ("multi_label_classification", 1, True, "multi_label_classification"),
        ("single_label_classification", 2, False, "single_label_classification"),
    ],
)
def test_problem_type_is_transformers_rule(configured, num_labels, integers, expected):
    config = BertConfig(extra={"problem_type": configured})
    assert problem_type(config, num_labels, integers) == expected
    if configured is None:
        assert problem_type(BertConfig(), num_labels, integers) == expected


@pytest.mark.parametrize("wrong", ["regresion", 1, ["regression"]])
def test_other_problem_types_are_refused(wrong):
    with pytest.raises(ConfigError, match=r"problem_type=.*: expected null or one of regression, single_label"):
        problem_type(BertConfig(extra={"problem_type": wrong}), 2, True)
