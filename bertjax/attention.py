"""Scaled dot-product attention: one signature for every backend.

There is one backend so far, plain XLA, which runs everywhere.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    bias: jax.Array | None = None,
    *,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    return_weights: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Computes softmax(query key^T / sqrt(head_dim) + bias) value for every head (Vaswani et al. 2017, equation 1).

    Args:
        query: [batch, queries, heads, head_dim], float32 or a lower precision.
        key: [batch, keys, heads, head_dim], same dtype.
        value: [batch, keys, heads, head_dim], same dtype.
        mask: bool, broadcastable to [batch, heads, queries, keys]; True where a query may look at a key. A query that
            may look at nothing attends to every key alike, as in the reference.
        bias: float32, broadcastable to [batch, heads, queries, keys], added to the scaled scores; see `relative_bias`.
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
    if bias is not None:
        scores = scores + bias
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


def relative_bias(query: jax.Array, key: jax.Array, table: jax.Array, *, with_keys: bool) -> jax.Array:
    """The part of the attention scores that depends on how far a query is from a key.

    With the embedding e of a distance it is query e^T / sqrt(head_dim) (Shaw et al. 2018, arXiv:1803.02155, equation
    5) or, `with_keys`, (query + key) e^T / sqrt(head_dim) (Huang et al. 2020, arXiv:2009.13658, method 4).

    Distances are counted between places in the row, query minus key. Those that the table does not reach take its last
    entry; they occur only between texts that share a row, where the mask hides them.

    Args:
        query: [batch, length, heads, head_dim], float32 or a lower precision.
        key: same shape and dtype.
        table: [2 positions - 1, head_dim]; row `positions - 1 + distance` is the embedding of a distance.
        with_keys: whether keys take part.

    Returns:
        float32 [batch, heads, length, length], to be added to the scaled scores.
    """
    bias = _by_distance(query, table[::-1])  # along the keys the distance falls
    if with_keys:
        bias = bias + _by_distance(key, table).swapaxes(-1, -2)
    return bias * (query.shape[-1] ** -0.5)


def _by_distance(x: jax.Array, table: jax.Array) -> jax.Array:
    """Products with the embeddings of distances: entry [i, j] is x_i table[j - i + positions - 1].

    Every x is multiplied with every distance that the row has, and each line of the result is then shifted into
    place. That takes twice the products that are kept, but neither an embedding for every pair of tokens nor a gather
    of scores.

    Args:
        x: [batch, length, heads, head_dim].
        table: [2 positions - 1, head_dim].

    Returns:
        float32 [batch, heads, length, length].
    """
    dtype = x.dtype
    batch, length, heads, _ = x.shape
    positions = (table.shape[0] + 1) // 2
    # One column more than there are distances, which makes the shift below a change of the row length alone.
    offsets = np.arange(2 * length) - length + 1
    rows = table[np.clip(offsets + positions - 1, 0, 2 * positions - 2)].astype(dtype)
    products = jnp.matmul(
        x.transpose(0, 2, 1, 3), rows.T, precision=matmul_precision(dtype), preferred_element_type=jnp.float32
    )
    # [i, j - i + length - 1] of lines 2 length long is [i, j + length - 1] of lines one shorter.
    flat = products.reshape(batch, heads, 2 * length * length)[..., length - 1 : length - 1 + length * (2 * length - 1)]
    return flat.reshape(batch, heads, length, 2 * length - 1)[..., :length]


def matmul_precision(dtype: jax.typing.DTypeLike) -> lax.Precision | None:
    """Precision to ask of a matmul whose inputs have this dtype.

    GPUs and TPUs multiply float32 in a shorter format by default; float32 here means float32, so the highest is asked
    for. Shorter dtypes have one way to be multiplied, and None leaves it to the backend.
    """
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None
