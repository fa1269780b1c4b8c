"""Products of matrices in a short dtype: accumulated in float32, forwards and backwards."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def matmul_precision(dtype: jax.typing.DTypeLike) -> lax.Precision | None:
    """Precision to ask of a matmul whose inputs have this dtype.

    GPUs and TPUs multiply float32 in a shorter format by default; float32 here means float32, so the highest is asked
    for. Shorter dtypes have one way to be multiplied, and None leaves it to the backend.
    """
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def matmul(x: jax.Array, y: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """x y with both cast to `dtype`, and the result in float32.

    In bfloat16 its derivatives are such products, too: what comes back is cast before it is multiplied, as in other
    frameworks. By itself JAX would multiply it in float32, which takes several times as long. float16 has too short a
    range for gradients, so there they are left in float32.

    Args:
        x: [..., m, k].
        y: [k, n], or [..., k, n] with the same leading axes.
        dtype: what is multiplied.

    Returns:
        float32 [..., m, n].
    """
    if jnp.dtype(dtype) == jnp.bfloat16:
        return _short(*_alike(x, y), jnp.float32)
    return _product(x.astype(dtype), y.astype(dtype), precision=matmul_precision(dtype))


def dense(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, dtype: jax.typing.DTypeLike) -> jax.Array:
    """x kernel + bias, both multiplied in `dtype` and accumulated in float32.

    Args:
        x: [..., in], float32 or `dtype`.
        kernel: [in, out].
        bias: [out], or None.
        dtype: what is multiplied.

    Returns:
        [..., out] in the dtype of `x`. What is not float32 is rounded once, from the sum with the bias.
    """
    if x.dtype == jnp.float32:
        y = matmul(x, kernel, dtype)
        return y if bias is None else y + _as_row(bias, y)
    y = _short(*_alike(x, kernel), x.dtype)
    return y if bias is None else _add_bias(*_alike(y, bias))


def dense_columns(x: jax.Array, kernel: jax.Array, bias: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """(x kernel + bias)^T, float32 [out, batch, length], of x [batch, length, in]; see `dense`."""
    options = {"precision": matmul_precision(dtype), "preferred_element_type": jnp.float32}
    y = lax.dot_general(kernel.astype(dtype), x.astype(dtype), (((0,), (2,)), ((), ())), **options)
    return y + jnp.expand_dims(bias.astype(jnp.float32), (1, 2))


def _product(
    x: jax.Array, y: jax.Array, result: jax.typing.DTypeLike = jnp.float32, precision: lax.Precision | None = None
) -> jax.Array:
    options = {"precision": precision, "preferred_element_type": result}
    if y.ndim == 2:
        return lax.dot_general(x, y, (((x.ndim - 1,), (0,)), ((), ())), **options)
    return jnp.matmul(x, y, **options)


def _alike(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both, different along the same axes of a `shard_map`'s mesh: there a gradient is summed by what made them so."""
    varying = [jax.typeof(each).manual_axis_type.varying for each in (x, y)]
    return tuple(
        lax.pcast(each, tuple(missing), to="varying") if (missing := frozenset().union(*varying) - axes) else each
        for each, axes in zip((x, y), varying, strict=True)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _short(x: jax.Array, y: jax.Array, result: jax.typing.DTypeLike) -> jax.Array:
    return _product(x.astype(jnp.bfloat16), y.astype(jnp.bfloat16), result)


def _forward(x: jax.Array, y: jax.Array, result: jax.typing.DTypeLike) -> tuple[jax.Array, Any]:
    short = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
    # An array of no size says what dtype the gradient has.
    return _product(*short, result), (*short, jnp.zeros(0, x.dtype), jnp.zeros(0, y.dtype))


def _backward(result: jax.typing.DTypeLike, kept: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, y, of_x, of_y = kept
    gradient = gradient.astype(jnp.bfloat16)
    if y.ndim == 2:
        # One product over all rows, whatever axes they are in.
        rows = (tuple(range(x.ndim - 1)),) * 2
        by_y = lax.dot_general(x, gradient, (rows, ((), ())), preferred_element_type=jnp.float32)
    else:
        by_y = _product(x.swapaxes(-1, -2), gradient)
    return _product(gradient, y.swapaxes(-1, -2), result).astype(of_x.dtype), by_y.astype(of_y.dtype)


_short.defvjp(_forward, _backward)


def _as_row(bias: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.expand_dims(bias.astype(y.dtype), range(y.ndim - 1))


@jax.custom_vjp
def _add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """y + bias in the dtype of y; the bias' gradient is summed in float32, whatever that is."""
    return y + _as_row(bias, y)


def _add_bias_forward(y: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _add_bias(y, bias), jnp.zeros(0, bias.dtype)


def _add_bias_backward(of_bias: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Without the barrier XLA has the gradient in float32, too, for the sum, and writes both to memory.
    gradient = lax.optimization_barrier(gradient)
    return gradient, gradient.sum(range(gradient.ndim - 1), dtype=jnp.float32).astype(of_bias.dtype)


_add_bias.defvjp(_add_bias_forward, _add_bias_backward)
