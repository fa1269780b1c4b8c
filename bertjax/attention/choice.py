"""Which backend computes the attention of a call."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp

from bertjax.errors import ConfigError, InputError

#: What a caller can ask for: "auto", or a backend by name.
ATTENTION_OPTIONS = ("auto", "xla", "cudnn", "tpu")


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """What a kernel runs on and can do. None has relative positions or dropout, or returns the weights."""

    platform: str
    dtypes: tuple[str, ...]


_KERNELS: Mapping[str, _Kernel] = MappingProxyType(
    {
        "cudnn": _Kernel("gpu", ("bfloat16", "float16")),
        "tpu": _Kernel("tpu", ("bfloat16", "float32")),
    }
)

# Both kernels work on vectors of 8 numbers or a multiple of it, and keep a head of more than 128 in several parts.
_HEAD_DIMS = range(8, 129, 8)

#: Where "auto" takes a kernel and not plain XLA: by platform, the kernel, and the shortest row in tokens from which on
#: it is the faster one. Only a measurement on the platform enters a line here. None has been made yet, neither on a
#: GPU nor on a TPU, so there are no lines, and "auto" is plain XLA everywhere.
FASTER_FROM: Mapping[str, tuple[str, int]] = MappingProxyType({})


def check_attention(asked: str, *, dtype: jax.typing.DTypeLike, head_dim: int, relative: bool) -> str:
    """Returns the name that a model is made with, if a model like this can have its attention computed so.

    Args:
        asked: one of `ATTENTION_OPTIONS`.
        dtype: the model's compute dtype.
        head_dim: width of one head.
        relative: whether the model's positions are relative.

    Raises:
        ConfigError: there is no such backend, or it lacks what the model needs.
    """
    if asked not in ATTENTION_OPTIONS:
        raise ConfigError(f"attention is {asked!r}, expected one of {', '.join(ATTENTION_OPTIONS)}")
    if asked in _KERNELS and (problem := _problem(asked, dtype, head_dim, relative)):
        raise ConfigError(f"attention={asked!r} {problem}; pass attention='auto', or 'xla', which can do everything")
    return asked


def choose_backend(
    asked: str,
    *,
    length: int,
    head_dim: int,
    dtype: jax.typing.DTypeLike,
    relative: bool = False,
    dropout: bool = False,
    return_weights: bool = False,
    platform: str | None = None,
) -> str:
    """The backend of a call: the one asked for or, for "auto", by `FASTER_FROM`, plain XLA where a kernel can't do it.

    Args:
        asked: one of `ATTENTION_OPTIONS`.
        length: tokens in a row.
        head_dim: width of one head.
        dtype: dtype of queries, keys and values.
        relative: whether the scores have a bias, which is what relative positions are.
        dropout: whether attention weights are dropped.
        return_weights: whether the caller wants the weights.
        platform: what the program is to run on, "cpu", "gpu" or "tpu"; default: JAX's default backend. A program that
            is compiled for another platform than that has to ask for its kernel by name.

    Raises:
        ConfigError: the backend asked for lacks what the model needs, or "cudnn" is asked for without a GPU. Whether
            there is a TPU shows only when a program is compiled, maybe on another machine; see `attend`.
        InputError: it lacks what the call needs.
    """
    platform = jax.default_backend() if platform is None else platform
    check_attention(asked, dtype=dtype, head_dim=head_dim, relative=relative)
    wants = [name for name, wanted in (("dropout", dropout), ("the weights", return_weights)) if wanted]
    if asked == "auto":
        kernel, least = FASTER_FROM.get(platform, ("xla", 0))
        unable = kernel in _KERNELS and (_problem(kernel, dtype, head_dim, relative) or wants)
        return "xla" if unable or length < least else kernel
    if asked in _KERNELS and wants:
        remedy = {"dropout": "set attention_probs_dropout_prob to 0", "the weights": "leave out output_attentions"}
        raise InputError(
            f"attention={asked!r} has no way to {'drop weights' if dropout else 'return the weights'}: "
            f"{remedy[wants[0]]}, or load the model with attention='xla'"
        )
    if asked == "cudnn" and platform != "gpu":
        raise ConfigError(f"attention='cudnn' needs a GPU, and JAX runs on {platform}; pass attention='auto'")
    return asked


def _problem(kernel: str, dtype: jax.typing.DTypeLike, head_dim: int, relative: bool) -> str | None:
    """What a model needs and this kernel lacks."""
    able = _KERNELS[kernel]
    if relative:
        return "has no relative positions"
    if jnp.dtype(dtype).name not in able.dtypes:
        return f"computes in {' or '.join(able.dtypes)}, not in {jnp.dtype(dtype).name}"
    if head_dim not in _HEAD_DIMS:
        return f"has heads of 8, 16, ... 128 numbers, not of {head_dim}"
    return None
