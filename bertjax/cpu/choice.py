"""The choice between the native encoder and XLA's, made when a program is compiled."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from bertjax.platforms import jvp_of_moving


def encoder_or(native: Callable[..., jax.Array], default: Callable[..., jax.Array], *args: Any) -> jax.Array:
    """Returns default(*args), computed by native(*args) in an inference program for one CPU device.

    Derivatives are those of `default`. An exported program has it too, because it is to run where bertjax is not, and
    so has a program over several devices, because XLA can't partition a call whose inside it does not see. On a mesh
    whose axes are in the types of arrays (explicit axes, and `shard_map`) `default` is simply called.

    Args:
        native: a function of the same arguments, with a result of the same shape and dtype. It may differ in rounding.
        default: what defines the result: an array.
        *args: pytrees of arrays.
    """
    leaves, tree = jax.tree.flatten(args)
    if not all(jax.typeof(leaf).sharding.mesh.empty for leaf in leaves):
        return default(*args)

    def flat(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return lambda *leaves: function(*jax.tree.unflatten(tree, leaves))

    return _encoder_p.bind(*leaves, native=flat(native), default=flat(default))


def _shape_of(*args: Any, native: Callable, default: Callable) -> jax.core.ShapedArray:
    # Of the two, the native one is traced in no time.
    out = jax.eval_shape(native, *(jax.ShapeDtypeStruct(arg.shape, arg.dtype) for arg in args))
    return jax.core.ShapedArray(out.shape, out.dtype)


def _differentiate(primals: Any, tangents: Any, *, native: Callable, default: Callable) -> tuple[jax.Array, jax.Array]:
    return jvp_of_moving(default, primals, tangents)


def _batch(args: Any, axes: Any, *, native: Callable, default: Callable) -> tuple[jax.Array, int]:
    mapped = {"native": jax.vmap(native, axes), "default": jax.vmap(default, axes)}
    return _encoder_p.bind(*args, **mapped), 0


def _lower(ctx: mlir.LoweringRuleContext, *args: Any, native: Callable, default: Callable) -> Any:
    module = ctx.module_context
    on_cpu = tuple(ctx.platforms or module.platforms) == ("cpu",)
    # In a shard_map the context has a mesh and no number of devices.
    alone = getattr(module.axis_context, "num_devices", None) == 1
    chosen = native if on_cpu and alone and not module.lowering_parameters.for_export else default
    return mlir.lower_fun(chosen, multiple_results=False)(ctx, *args)


_encoder_p = Primitive("bertjax_encoder")
# Outside of jit nothing is compiled as a whole, and nothing can be chosen.
_encoder_p.def_impl(lambda *args, native, default: default(*args))
_encoder_p.def_abstract_eval(_shape_of)
ad.primitive_jvps[_encoder_p] = _differentiate
batching.primitive_batchers[_encoder_p] = _batch
mlir.register_lowering(_encoder_p, _lower)
