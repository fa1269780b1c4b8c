"""Scaled dot-product attention: one signature for every backend.

There is one backend so far, plain XLA, which runs everywhere.
"""

import jax
import jax.numpy as jnp
from jax import lax


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    *,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    return_weights: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Computes softmax(query key^T / sqrt(head_dim)) value for every head (Vaswani et al. 2017, equation 1).

    Args:
        query: [batch, queries, heads, head_dim], float32 or a lower precision.
        key: [batch, keys, heads, head_dim], same dtype.
        value: [batch, keys, heads, head_dim], same dtype.
        mask: bool, broadcastable to [batch, heads, queries, keys]; True where a query may look at a key. A query that
            may look at nothing attends to every key alike, as in the reference.
        dropout_rate: probability of dropping one attention weight; used only with `dropout_key`.
        dropout_key: a JAX random key, or None for no dropout.
        return_weights: also return the attention weights.

    Returns:
        The context [batch, queries, heads, head_dim] in the dtype of `query`, and the weights
        [batch, heads, queries, keys] in float32 or None. Whatever the input dtype, products are accumulated and the
        softmax is taken in float32.
    """
    dtype = query.dtype
    precision = matmul_precision(dtype)
    # Keys are laid out [batch, heads, head_dim, keys]: XLA's fast CPU matmul wants a row-major right-hand side, and a
    # contraction over the last axis of both operands misses it.
    q = query.transpose(0, 2, 1, 3)
    k = key.transpose(0, 2, 3, 1)
    v = value.transpose(0, 2, 1, 3)
    scores = jnp.matmul(q, k, precision=precision, preferred_element_type=jnp.float32)
    scores = scores * (query.shape[-1] ** -0.5)
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    returned = weights / total if return_weights else None
    if dropout_key is not None and dropout_rate > 0.0:
        keep = jax.random.bernoulli(dropout_key, 1.0 - dropout_rate, weights.shape)
        weights = jnp.where(keep, weights / (1.0 - dropout_rate), 0.0)
    # The division comes after the product with the values: it then touches head_dim numbers per query instead of one
    # per key, and XLA fuses the whole of it.
    context = jnp.matmul(weights.astype(dtype), v, precision=precision, preferred_element_type=jnp.float32) / total
    return context.astype(dtype).transpose(0, 2, 1, 3), returned


def matmul_precision(dtype: jax.typing.DTypeLike) -> lax.Precision | None:
    """Precision to ask of a matmul whose inputs have this dtype.

    GPUs and TPUs multiply float32 in a shorter format by default; float32 here means float32, so the highest is asked
    for. Shorter dtypes have one way to be multiplied, and None leaves it to the backend.
    """
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None
