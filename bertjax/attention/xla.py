"""Attention in plain XLA: runs everywhere and can do everything."""

import jax
import jax.numpy as jnp
from jax import lax

from bertjax.matmul import matmul
from bertjax.platforms import on_platform


def attend_xla(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None,
    *,
    dropout_rate: float,
    dropout_key: jax.Array | None,
    return_weights: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """See `bertjax.attention.attend`; `mask` is what `Segments.dense_mask` returns."""
    dtype = query.dtype
    # Keys are laid out [batch, heads, head_dim, keys]: XLA's fast CPU matmul wants a row-major right-hand side, and a
    # contraction over the last axis of both operands misses it.
    q = query.transpose(0, 2, 1, 3)
    k = key.transpose(0, 2, 3, 1)
    v = value.transpose(0, 2, 1, 3)
    scores = matmul(q, k, dtype) * (query.shape[-1] ** -0.5)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    returned = weights / total if return_weights else None
    if dropout_key is not None and dropout_rate > 0.0:
        keep = jax.random.bernoulli(dropout_key, 1.0 - dropout_rate, weights.shape)
        weights = jnp.where(keep, weights / (1.0 - dropout_rate), 0.0)
    context = _weighted(weights, total, v)
    return context.astype(dtype).transpose(0, 2, 1, 3), returned


def _divided_after(weights: jax.Array, total: jax.Array, value: jax.Array) -> jax.Array:
    """weights value / total: the division touches head_dim numbers per query instead of one per key."""
    return matmul(weights, value, value.dtype) / total


def _divided_before(weights: jax.Array, total: jax.Array, value: jax.Array) -> jax.Array:
    """The same with the weights divided."""
    return _divided_after(weights / total, jnp.ones((), total.dtype), value)


# As XLA fuses it with the softmax: for a TPU only where the weights are divided, and for a GPU more of it.
_weighted = on_platform(_divided_after, tpu=_divided_before, cuda=_divided_before)
