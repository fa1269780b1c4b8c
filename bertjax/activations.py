"""Activation functions, as the names in a configuration have them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bertjax.platforms import on_platform


def _gelu_erf(x: jax.Array) -> jax.Array:
    """x Phi(x), the exact GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415).

    By erf, as in the reference: `jax.nn.gelu` takes erfc, for which XLA computes three approximations and chooses.
    """
    return 0.5 * x * (1.0 + lax.erf(x * np.float32(np.sqrt(0.5))))


def _gelu_tanh(x: jax.Array) -> jax.Array:
    """The tanh approximation of GELU (same paper, section 2)."""
    return jax.nn.gelu(x, approximate=True)


def _quick_gelu(x: jax.Array) -> jax.Array:
    """The sigmoid approximation of GELU (same paper, section 2)."""
    return x * jax.nn.sigmoid(1.702 * x)


#: What each name of `config.ACTIVATIONS` computes; on float32.
ACTIVATION_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": _gelu_erf,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}

#: Of the GELU, 2 atanh(2 Phi(x) - 1) / x by powers of x^2: fitted by least squares, with weights that even out the
#: error of the result, which is below 3.1e-6 everywhere.
_FITTED = (0.79782814, 0.036468791, -1.2486159e-4, -3.0581016e-5, 1.1190828e-6)


def _gelu_fitted(x: jax.Array) -> jax.Array:
    """The GELU by one tanh, which a TPU has an instruction for: it takes a third of erf's operations."""
    square, factor = x * x, np.float32(_FITTED[-1])
    for coefficient in _FITTED[-2::-1]:
        factor = factor * square + np.float32(coefficient)
    half = 0.5 * x
    return half + half * jnp.tanh(x * factor)


_gelu_short = on_platform(_gelu_erf, tpu=_gelu_fitted)


def activation(name: str, dtype: jax.typing.DTypeLike) -> Callable[[jax.Array], jax.Array]:
    """An activation whose result is to be rounded to this dtype.

    In a shorter one than float32 an error of 3e-6 is small beside the rounding of what the result is added to.
    """
    return _gelu_short if name == "gelu" and jnp.dtype(dtype) != jnp.float32 else ACTIVATION_FUNCTIONS[name]
