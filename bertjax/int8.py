"""Dense layers in int8 for inference: kernels quantised once, activations as they come.

Both are quantised symmetrically, a vector x to round(127 x / max|x|) and the scale max|x| / 127: a kernel for each
output, activations for each token. The product of two vectors of integers is then an exact sum of integers, and the two
scales make it a float32 (Jacob et al. 2018, arXiv:1712.05877, section 2.1; Xiao et al. 2023, arXiv:2211.10438,
section 2, for scales by token and by output channel).
"""

from collections.abc import Iterable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from bertjax.errors import InputError

# -128 is left out, so that both signs have as many levels.
_LEVELS = 127
# 127 divided by much less is more than a float32 holds. What is so small becomes zero.
_LEAST = 1e-30

_NO_TRAINING = "a model in int8 is for inference: it can't be trained and has no gradients; load it with another dtype"


def is_int8(dtype: jax.typing.DTypeLike) -> bool:
    """Whether a compute dtype is int8."""
    return jnp.dtype(dtype) == jnp.int8


def dtype_of_attention(dtype: jax.typing.DTypeLike) -> jax.typing.DTypeLike:
    """What attention's own two products are computed in, in a model of this compute dtype."""
    return jnp.dtype(jnp.bfloat16) if is_int8(dtype) else dtype


def dtype_within(dtype: jax.typing.DTypeLike) -> jax.typing.DTypeLike:
    """What everything but an int8 dense layer and attention is given, in a model of this compute dtype."""
    return jnp.dtype(jnp.float32) if is_int8(dtype) else dtype


def quantize(x: Any, axis: int, xp: ModuleType = jnp) -> tuple[Any, Any]:
    """Quantises vectors.

    Args:
        x: float32, finite.
        axis: the axis that the vectors lie along.
        xp: the library whose array it is, `jax.numpy` or `numpy`.

    Returns:
        int8 of the shape of `x`, -127 to 127, and float32 scales, in which that axis has one element. Their product is
        off by half a scale at most. A vector of zeros has zeros and the scale 0.
    """
    largest = xp.abs(x).max(axis=axis, keepdims=True)
    # A NaN has to be in the scale only.
    inverse = xp.where(largest > _LEAST, _LEVELS / xp.maximum(largest, _LEAST), 0)
    return xp.round(x * inverse).astype(xp.int8), largest / _LEVELS


@jax.custom_jvp
def int8_matmul(x: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
    """x kernel, of activations that are quantised here and a kernel that has been.

    Args:
        x: float [..., in].
        kernel: int8 [in, out].
        scale: float32 [out].

    Returns:
        float32 [..., out].

    Raises:
        InputError: a derivative is taken.
    """
    integers, steps = quantize(x.astype(jnp.float32), axis=-1)
    # XLA has its fast kernels for int8 on a CPU where the result is int32.
    sums = lax.dot_general(integers, kernel, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
    return sums.astype(jnp.float32) * steps * scale


@int8_matmul.defjvp
def _no_derivative(primals: Any, tangents: Any) -> Any:
    # What rounds has a derivative of zero wherever it has one, which would pass for a gradient.
    raise InputError(_NO_TRAINING)


def refuse_dropout(dtype: jax.typing.DTypeLike, dropout_key: jax.Array | None) -> None:
    """Refuses dropout in int8 with an `InputError`."""
    if is_int8(dtype) and dropout_key is not None:
        raise InputError(f"dropout_key: {_NO_TRAINING}")


class KernelScale(nnx.Variable):
    """What a step of an int8 kernel is worth: [out]. It belongs to the kernel, and is no parameter of its own."""


class Int8Linear(nnx.Module):
    """A dense layer with an int8 kernel [in_features, out_features], for inference.

    Attributes:
        kernel: int8 [in_features, out_features].
        scale: float32 [out_features]; kernel * scale is the dense layer's kernel, up to rounding.
        bias: float32 [out_features].
    """

    def __init__(self, in_features: int, out_features: int, *, kernel_init: nnx.Initializer, rngs: nnx.Rngs):
        drawn = kernel_init(rngs.params(), (in_features, out_features), jnp.float32)
        kernel, scale = quantize(drawn, axis=0)
        self.kernel = nnx.Param(kernel)
        self.scale = KernelScale(scale[0])
        self.bias = nnx.Param(jnp.zeros(out_features, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float32 [..., in_features] to [..., out_features]. Has no derivative: taking it is an error."""
        return int8_matmul(x, self.kernel[...], self.scale[...]) + self.bias[...]


def quantized_kernels(paths: Iterable[tuple[str, ...]]) -> frozenset[tuple[str, ...]]:
    """The kernels of a parameter tree that a model in int8 has in int8: those of the encoder's layers."""
    return frozenset(path for path in paths if "layers" in path and path[-1] == "kernel")


def quantize_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A part of a PyTorch weight, float32 [out, in], as int8 of that shape and scales float32 [out]; see `quantize`."""
    integers, scale = quantize(rows, -1, np)
    return integers, scale[:, 0]
