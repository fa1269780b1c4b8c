"""Relative positions: what the distance between two tokens adds to their attention score."""

import jax
import jax.numpy as jnp

from bertjax.matmul import matmul


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
    offsets = jnp.arange(2 * length) - length + 1
    rows = table[jnp.clip(offsets + positions - 1, 0, 2 * positions - 2)].astype(dtype)
    products = matmul(x.transpose(0, 2, 1, 3), rows.T, dtype)
    # [i, j - i + length - 1] of lines 2 length long is [i, j + length - 1] of lines one shorter.
    flat = products.reshape(batch, heads, 2 * length * length)[..., length - 1 : length - 1 + length * (2 * length - 1)]
    return flat.reshape(batch, heads, length, 2 * length - 1)[..., :length]
