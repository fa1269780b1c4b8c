"""Scaled dot-product attention: one signature for every backend.

"xla" runs everywhere and can do everything. "cudnn" is cuDNN's fused attention on NVIDIA GPUs, "tpu" a Pallas kernel on
TPUs; neither writes the scores to memory, and neither has relative positions or dropout, or returns the weights.
`choose_backend` says which of them a call takes.
"""

import jax

from bertjax.attention.choice import ATTENTION_OPTIONS, check_attention, choose_backend
from bertjax.attention.relative import relative_bias
from bertjax.attention.segments import Segments
from bertjax.attention.xla import attend_xla
from bertjax.errors import InputError

__all__ = [
    "ATTENTION_OPTIONS",
    "Segments",
    "attend",
    "check_attention",
    "choose_backend",
    "prepare",
    "relative_bias",
]


def prepare(segments: Segments, backend: str) -> Segments:
    """The same segments as this backend reads them, so that what all layers need is made once, outside of them."""
    return segments if backend == "tpu" else segments.with_mask()


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: Segments,
    bias: jax.Array | None = None,
    *,
    backend: str = "xla",
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    return_weights: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Computes softmax(query key^T / sqrt(head_dim) + bias) value for every head (Vaswani et al. 2017, equation 1).

    Whatever the input dtype, products are accumulated and the softmax is taken in float32. A query that may look at
    nothing attends with "xla" to every key alike, as in the reference; with the kernels what it gets is finite and
    means nothing. Keys and values are to be finite even where no query looks: a weight of 0 does not hide a NaN.

    Args:
        query: [batch, queries, heads, head_dim], float32 or a lower precision.
        key: [batch, keys, heads, head_dim], same dtype.
        value: [batch, keys, heads, head_dim], same dtype.
        segments: which keys each query may look at; the same in every layer, so see `prepare`.
        bias: float32, broadcastable to [batch, heads, queries, keys], added to the scaled scores; see `relative_bias`.
        backend: what `choose_backend` returned. A program with "tpu" can be compiled anywhere for a TPU, and only for
            one: compiling it for anything else raises ConfigError, except in Pallas' interpret mode
            (`jax.experimental.pallas.tpu.force_tpu_interpret_mode`).
        dropout_rate: probability of dropping one attention weight; used only with `dropout_key`.
        dropout_key: a JAX random key, or None for no dropout.
        return_weights: also return the attention weights.

    Returns:
        The context [batch, queries, heads, head_dim] in the dtype of `query`, and the weights
        [batch, heads, queries, keys] in float32 or None.

    Raises:
        InputError: a bias, dropout or the weights are asked of a kernel.
    """
    if backend == "xla":
        options = {"dropout_rate": dropout_rate, "dropout_key": dropout_key, "return_weights": return_weights}
        return attend_xla(query, key, value, segments.dense_mask(), bias, **options)
    if bias is not None or return_weights or (dropout_key is not None and dropout_rate > 0.0):
        raise InputError(f"backend {backend!r} has no bias, no dropout and returns no weights; use 'xla'")
    # Imported here because Pallas takes long to import, and where plain XLA is used nobody needs it.
    if backend == "cudnn":
        from bertjax.attention.cudnn import attend_cudnn

        return attend_cudnn(query, key, value, segments.dense_mask()), None
    from bertjax.attention.tpu import attend_tpu

    return attend_tpu(query, key, value, segments), None
