"""A mark in a program that only a TPU can run it."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from bertjax.errors import ConfigError


def tpu_only(x: jax.Array) -> jax.Array:
    """Returns x; compiling what comes of it for anything but a TPU raises ConfigError.

    What a program is compiled for is not known while it is traced: it may be a TPU that is not there. Pallas itself
    would say no more than that it can't be done. In its interpret mode, it can.
    """
    return x if _interpreting() else _tpu_only_p.bind(x)


def _interpreting() -> bool:
    """Whether a kernel that is traced now is to be interpreted, which Pallas tells only the kernels themselves."""
    nothing = pl.pallas_call(lambda out_ref: None, out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32))
    return bool(jax.make_jaxpr(nothing)().eqns[-1].params["interpret"])


def _refuse(ctx: mlir.LoweringRuleContext, x: mlir.ir.Value) -> None:
    platforms = " and ".join(ctx.module_context.platforms)
    raise ConfigError(
        f"attention='tpu' needs a TPU, and this program is compiled for {platforms}; pass attention='auto'"
    )


_tpu_only_p = Primitive("tpu_only")
_tpu_only_p.def_impl(jax.jit(_tpu_only_p.bind))
_tpu_only_p.def_abstract_eval(lambda x: x)
batching.defvectorized(_tpu_only_p)
mlir.register_lowering(_tpu_only_p, _refuse)
mlir.register_lowering(_tpu_only_p, lambda ctx, x: [x], platform="tpu")
