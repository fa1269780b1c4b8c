"""The native encoder's inputs, as JAX arrays."""

import jax
import jax.numpy as jnp
import numpy as np

from bertjax.attention import Segments
from bertjax.config import BertConfig
from bertjax.cpu.library import TARGET, library_problem, ways
from bertjax.int8 import Int8Linear, is_int8
from bertjax.layer_norm import LayerNorm
from bertjax.layers import BertLayer, Linear

# The library works on blocks of columns and has no code for what is left over; in int8 those of a product are wider.
_BLOCK, _INT8_BLOCK = 32, 64


def problem(config: BertConfig, dtype: jax.typing.DTypeLike) -> str | None:
    """What keeps an encoder of this configuration from running natively on this machine, or None if nothing does.

    Args:
        config: sizes and constants.
        dtype: the compute dtype.
    """
    if config.hidden_act != "gelu":
        return f"it has the activation gelu only, not {config.hidden_act}"
    if config.position_embedding_type != "absolute":
        return "it has no relative positions"
    blocks = [(_BLOCK, ("hidden_size", "intermediate_size", "head_dim"))]
    if is_int8(dtype):
        blocks.append((_INT8_BLOCK, ("hidden_size", "intermediate_size")))
    for block, names in blocks:
        odd = [f"{name}={getattr(config, name)}" for name in names if getattr(config, name) % block]
        if odd:
            return f"it needs sizes that are multiples of {block}, not {', '.join(odd)}"
    return library_problem(jnp.dtype(dtype).name)


def encode(
    x: jax.Array, segments: Segments, layers: BertLayer, config: BertConfig, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Runs every layer of an encoder, in a program for one CPU device; where `problem` names one, what it does is open.

    Products are accumulated and everything between them is computed in float32, as in the scan over layers; with
    bfloat16 and int8 the attention weights are rounded to bfloat16 before their sum divides them.

    Args:
        x: float32 [batch, length, hidden], the embeddings.
        segments: which keys each query may look at; a query without any attends to every key alike.
        layers: the stacked layers, for which `is_plain` holds; every parameter has a leading axis of layers.
        config: sizes and constants.
        dtype: float32 or bfloat16, what inputs of matrix products are rounded to, or int8; see `bertjax.int8`.

    Returns:
        The last hidden state, float32 [batch, length, hidden].
    """
    dense, norms = _parts(layers)
    kernels = [part.kernel[...] for part in dense]
    # Rounding float32 kernels is part of what the library does anyway; copies of any other kind have to be made here.
    kept = jnp.float32 if all(kernel.dtype == jnp.float32 for kernel in kernels) else dtype
    scales = [part.scale[...] for part in dense] if is_int8(dtype) else []
    vectors = [part.bias for part in dense]
    vectors += [vector for norm in norms for vector in (norm.scale, norm.bias)]
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(x.shape, jnp.float32), vmap_method="sequential")
    return call(
        x,
        *_numbers(segments, x.shape[:2]),
        *(kernel.astype(kept) for kernel in kernels),
        *(vector[...].astype(jnp.float32) for vector in vectors),
        *scales,
        heads=np.int64(config.num_attention_heads),
        eps=np.float32(config.layer_norm_eps),
        way=np.int64(ways(jnp.dtype(dtype).name)[0]),
    )


def is_plain(layers: BertLayer) -> bool:
    """Whether the layers are made of nothing but dense layers and LayerNorms, with no adapter in the place of one."""
    dense, norms = _parts(layers)
    alike = {type(part) for part in dense} in ({Linear}, {Int8Linear})
    return alike and all(type(part) is LayerNorm for part in norms)


def _parts(layers: BertLayer) -> tuple[list[Linear | Int8Linear], list[LayerNorm]]:
    """The dense layers and the LayerNorms, in the order of the library's arguments."""
    attention, feed_forward = layers.attention, layers.feed_forward
    dense = [attention.query, attention.key, attention.value, attention.output]
    dense += [feed_forward.intermediate, feed_forward.output]
    return dense, [layers.attention_norm, layers.feed_forward_norm]


def _numbers(segments: Segments, shape: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """The queries' and the keys' numbers, int32 [batch, length], or two empty arrays if everybody sees everything."""
    if segments.query is None and segments.key is None:
        return (jnp.zeros((0, 0), jnp.int32),) * 2
    query, key = (
        jnp.ones(shape, jnp.int32) if numbers is None else jnp.broadcast_to(numbers, shape)
        for numbers in (segments.query, segments.key)
    )
    return query, key
