"""LayerNorm in float32, by the way that suits what the program is for."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from bertjax.config import BertConfig
from bertjax.matmul import as_row
from bertjax.platforms import on_platform


class LayerNorm(nnx.LayerNorm):
    """LayerNorm over the last axis, in float32 (Ba et al. 2016, arXiv:1607.06450).

    The variance is E[(x - E[x])^2] where `use_fast_variance` is off. E[x^2] - E[x]^2 saves a pass over the activations
    and cancels badly where the mean is large. A GPU gains nothing by it: there XLA has one kernel for the two passes.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float32 [..., features] to the same shape."""
        run = functools.partial(_normalise, self.epsilon, self.use_fast_variance)
        if self.use_fast_variance:
            run = on_platform(run, cuda=functools.partial(_normalise_on_gpu, self.epsilon))
        return run(x, self.scale[...], self.bias[...])


def _normalise(epsilon: float, fast: bool, x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """(x - E[x]) / sqrt(Var[x] + epsilon) scale + bias, over the last axis."""
    mean, inverse = _moments(epsilon, fast, x)
    return (x - mean) * (inverse * as_row(scale, x)) + as_row(bias, x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _normalise_on_gpu(epsilon: float, x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """The same with a derivative that is written out: by the chain rule as it stands JAX passes over more arrays.

    Only for GPUs: on CPUs XLA of jax 0.10 takes sums in it for matrix products, and computes these wrongly.
    """
    return _normalise(epsilon, False, x, scale, bias)


@_normalise_on_gpu.defjvp
def _normalise_on_gpu_jvp(epsilon: float, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x, scale, bias), (dx, dscale, dbias) = primals, tangents
    mean, inverse = _moments(epsilon, False, x)
    standard = (x - mean) * inverse
    slope = inverse * (dx - _mean(dx) - standard * _mean(standard * dx))
    y = standard * as_row(scale, x) + as_row(bias, x)
    return y, slope * as_row(scale, x) + standard * as_row(dscale, x) + as_row(dbias, x)


def _moments(epsilon: float, fast: bool, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mean and 1 / sqrt(variance + epsilon) over the last axis, [..., 1] both."""
    mean = _mean(x)
    variance = jnp.maximum(0.0, _mean(jnp.square(x)) - jnp.square(mean)) if fast else _mean(jnp.square(x - mean))
    return mean, lax.rsqrt(variance + epsilon)


def _mean(x: jax.Array) -> jax.Array:
    return x.mean(-1, keepdims=True)


def layer_norm(
    config: BertConfig, dtype: jax.typing.DTypeLike, param_dtype: jax.typing.DTypeLike, rngs: nnx.Rngs
) -> LayerNorm:
    """A `LayerNorm` over the hidden axis.

    What the faster variance loses is far below the rounding of a compute dtype that is shorter than float32.
    """
    return LayerNorm(
        config.hidden_size,
        epsilon=config.layer_norm_eps,
        dtype=jnp.float32,
        param_dtype=param_dtype,
        use_fast_variance=jnp.dtype(dtype) != jnp.float32,
        rngs=rngs,
    )
