"""Attention by cuDNN's fused kernel, on NVIDIA GPUs."""

import jax
import jax.numpy as jnp


def attend_cudnn(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    """See `bertjax.attention.attend`; `mask` is what `Segments.dense_mask` returns.

    cuDNN's own forms for texts of different length are lengths, which can't say that a row holds several texts, and
    offsets, which JAX does not offer in public. So the segments go in as a dense mask, which JAX adds to the scores as
    a negative number so large that exp() of it is 0.
    """
    queries, keys = query.shape[1], key.shape[1]
    odd = queries % 2 or keys % 2
    if odd and mask is None:
        mask = jnp.ones((1, 1, 1, 1), bool)
    if mask is not None:
        mask = jnp.broadcast_to(mask, (mask.shape[0], 1, queries, keys))
    if odd:
        # The backward pass takes a mask only of even sizes.
        query = _padded(query, (0, queries % 2, 0, 0))
        key, value = (_padded(x, (0, keys % 2, 0, 0)) for x in (key, value))
        mask = _padded(mask, (0, 0, queries % 2, keys % 2))
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")[:, :queries]


def _padded(x: jax.Array, extra: tuple[int, ...]) -> jax.Array:
    """x with so many zeros after the end of each axis."""
    return jnp.pad(x, [(0, count) for count in extra])
