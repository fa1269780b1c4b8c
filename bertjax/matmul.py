"""Products of matrices in the dtypes of matmuls: accumulated in float32, forwards and backwards."""

import jax
import jax.numpy as jnp
from jax import lax

from bertjax.short_product import alike, short_product


def matmul_precision(dtype: jax.typing.DTypeLike) -> lax.Precision | None:
    """Precision to ask of a matmul whose inputs have this dtype.

    GPUs and TPUs multiply float32 in a shorter format by default; float32 here means float32, so the highest is asked
    for. Shorter dtypes have one way to be multiplied, and None leaves it to the backend.
    """
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def matmul(x: jax.Array, y: jax.Array, dtype: jax.typing.DTypeLike, *, turned: bool = False) -> jax.Array:
    """x y, or x y^T where y is `turned`, with both cast to `dtype`, and the result in float32.

    In bfloat16 its derivatives are such products, too: what comes back is cast before it is multiplied, as in other
    frameworks. float16 has too short a range for gradients, so there they are left in float32.

    Args:
        x: [..., m, k].
        y: [k, n], or [..., k, n] with the same leading axes; turned, the last two the other way round.
        dtype: what is multiplied.
        turned: whether the last axis of y is k.

    Returns:
        float32 [..., m, n].
    """
    if jnp.dtype(dtype) == jnp.bfloat16:
        return short_product(x, y, batch=y.ndim - 2, turned=turned)
    options = {"precision": matmul_precision(dtype), "preferred_element_type": jnp.float32}
    x, y = x.astype(dtype), (y.swapaxes(-1, -2) if turned else y).astype(dtype)
    if y.ndim == 2:
        return lax.dot_general(x, y, (((x.ndim - 1,), (0,)), ((), ())), **options)
    return jnp.matmul(x, y, **options)


def dense(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, dtype: jax.typing.DTypeLike) -> jax.Array:
    """x kernel + bias, both multiplied in `dtype` and accumulated in float32.

    Args:
        x: [..., in]; bfloat16 to have a result in bfloat16, or else of any float dtype.
        kernel: [in, out].
        bias: [out], or None.
        dtype: what is multiplied; bfloat16 where x is.

    Returns:
        [..., out]: float32, or for an x in bfloat16 in bfloat16, to which then the product is rounded and its sum with
        the bias, too. The gradient of the bias is summed in float32 in any case.
    """
    if x.dtype != jnp.bfloat16:
        y = matmul(x, kernel, dtype)
        return y if bias is None else y + as_row(bias, y)
    y = short_product(x, kernel, result=jnp.bfloat16)
    if bias is None:
        return y
    y, bias = alike(y, bias)
    row = jnp.broadcast_to(bias.astype(jnp.float32), y.shape)  # in float32, as its gradient is summed
    return _barrier_backwards(y + row.astype(y.dtype))


@jax.custom_jvp
def _barrier_backwards(y: jax.Array) -> jax.Array:
    """y. Its gradient meets a barrier: XLA would have it in float32, too, for a bias, and write both to memory."""
    return y


@_barrier_backwards.defjvp
def _barrier_backwards_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return primals[0], lax.optimization_barrier(tangents[0])


def dense_columns(x: jax.Array, kernel: jax.Array, bias: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """(x kernel + bias)^T, float32 [out, batch, length], of x [batch, length, in]; see `dense`."""
    options = {"precision": matmul_precision(dtype), "preferred_element_type": jnp.float32}
    y = lax.dot_general(kernel.astype(dtype), x.astype(dtype), (((0,), (2,)), ((), ())), **options)
    return y + jnp.expand_dims(bias.astype(jnp.float32), (1, 2))


def as_row(vector: jax.Array, x: jax.Array) -> jax.Array:
    """A vector over the last axis of x, in the dtype of x."""
    return jnp.expand_dims(vector.astype(x.dtype), range(x.ndim - 1))
