"""Products in bfloat16 whose derivatives are such products, too: a bilinear primitive of JAX.

The derivative of JAX's own product multiplies in the dtype of the result, which is float32 where that is what was
summed up, and takes several times as long. A function that brings its own by `jax.custom_vjp` has no derivative
forwards, and so none at all inside of one that is mapped and brings its own by `jax.custom_jvp`. To a policy of
`jax.checkpoint` it is known by its name, "short_product"; JAX's own policies for products do not know it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def short_product(
    x: jax.Array, y: jax.Array, *, batch: int = 0, turned: bool = False, result: jax.typing.DTypeLike = jnp.float32
) -> jax.Array:
    """x y, or x y^T where y is `turned`, with both rounded to bfloat16, summed in float32.

    Derivatives are made of products of rounded numbers. What comes back for x is rounded to `result`, what comes back
    for y is not, since it may yet have to be summed over devices; and then each has the dtype of what it is for.

    Args:
        x: [*batch axes, *rows, k], of any float dtype.
        y: [*batch axes, k, n], or [*batch axes, n, k], of any float dtype.
        batch: how many axes x, y and the result have in common.
        turned: whether the last axis of y is k.
        result: what the sums are rounded to.

    Returns:
        `result` [*batch axes, *rows, n].
    """
    params = {"batch": batch, "summed": 1, "turned": turned, "result": jnp.dtype(result), "out_sharding": None}
    return _product_p.bind(*alike(x, y), **params)


def alike(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both, different along the same axes of a `shard_map`'s mesh: there a gradient is summed by what made them so."""
    varying = [jax.typeof(each).manual_axis_type.varying for each in (x, y)]
    return tuple(
        lax.pcast(each, tuple(missing), to="varying") if (missing := frozenset().union(*varying) - axes) else each
        for each, axes in zip((x, y), varying, strict=True)
    )


def _options(x: Any, y: Any, batch: int, summed: int, turned: bool, result: Any, out_sharding: Any) -> dict[str, Any]:
    """What `lax.dot_general` is given: axes are in the order batch, rows, summed in x, and batch, summed, rest in y."""
    common = tuple(range(batch))
    inner = tuple(range(y.ndim - summed, y.ndim) if turned else range(batch, batch + summed))
    numbers = {"dimension_numbers": ((tuple(range(x.ndim - summed, x.ndim)), inner), (common, common))}
    return numbers | {"out_sharding": out_sharding, "precision": None, "preferred_element_type": result}


def _compute(x: jax.Array, y: jax.Array, **params: Any) -> jax.Array:
    return lax.dot_general(x.astype(jnp.bfloat16), y.astype(jnp.bfloat16), **_options(x, y, **params))


def _compute_on_cpu(x: jax.Array, y: jax.Array, **params: Any) -> jax.Array:
    # Without a barrier XLA (of jax 0.10 and 0.12) merges the product with a transpose of the result, after it was
    # settled what is to multiply bfloat16, and ends in "Unsupported element type for DotThunk".
    return lax.optimization_barrier(_compute(x, y, **params))


def _shape_of(x: Any, y: Any, **params: Any) -> Any:
    short = (each.update(dtype=jnp.dtype(jnp.bfloat16), weak_type=False) for each in (x, y))
    return lax.dot_general_p.abstract_eval(*short, **_options(x, y, **params))[0]


def _differentiate(primals: Any, tangents: Any, **params: Any) -> tuple[jax.Array, jax.Array]:
    # Rounded before they are kept for the backward pass.
    x, y = (each.astype(jnp.bfloat16) for each in primals)
    dx, dy = tangents
    slopes = [] if type(dx) is ad.Zero else [_product_p.bind(dx, y, **params)]
    slopes += [] if type(dy) is ad.Zero else [_product_p.bind(x, dy, **params)]
    return _product_p.bind(x, y, **params), sum(slopes[1:], slopes[0])


def _back_to_x(
    gradient: jax.Array, x: Any, y: jax.Array, *, batch: int, summed: int, turned: bool, result: Any, **_: Any
) -> jax.Array:
    """gradient y^T."""
    params = {"batch": batch, "summed": y.ndim - batch - summed, "turned": not turned, "result": result}
    return _product_p.bind(gradient, y, out_sharding=_laid_out(x.aval), **params).astype(x.aval.dtype)


def _back_to_y(
    gradient: jax.Array, x: jax.Array, y: Any, *, batch: int, summed: int, turned: bool, **_: Any
) -> jax.Array:
    """x^T gradient, or gradient^T x."""
    rows, rest = x.ndim - batch - summed, y.aval.ndim - batch - summed
    params = {"batch": batch, "summed": rows, "turned": False, "result": jnp.dtype(jnp.float32)}
    params["out_sharding"] = _laid_out(y.aval)
    # A y that is not turned can be had from either. XLA for CPUs also computes what is turned over in that order, which
    # is slow, so it is the smaller one; but not where the layout of the result would have to be turned over, too.
    if turned or (gradient.size < x.size and params["out_sharding"] is None):
        back = _product_p.bind(_swapped(gradient, batch, rows), x, **params)
        back = back if turned else _swapped(back, batch, rest)
    else:
        back = _product_p.bind(_swapped(x, batch, rows), gradient, **params)
    return back.astype(y.aval.dtype)


def _swapped(x: jax.Array, batch: int, rows: int) -> jax.Array:
    """[*batch axes, *rest, *rows] of [*batch axes, *rows, *rest]."""
    axes = range(x.ndim)
    return x.transpose(*axes[:batch], *axes[batch + rows :], *axes[batch : batch + rows])


def _laid_out(aval: Any) -> NamedSharding | None:
    """How to lay out a gradient over a mesh whose axes are explicit, where JAX wants to be told."""
    sharding = aval.sharding
    if sharding.mesh.empty:
        # What is on no mesh is everywhere on that of the others.
        sharding = NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec(*[None] * aval.ndim))
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def _batch(mapped: Any, args: Any, axes: Any, **params: Any) -> tuple[jax.Array, int | None]:
    """An axis of both is one more batch axis, one of x is the first of rows, and one of y is the first of the rest."""
    (x, y), (of_x, of_y) = args, axes
    batch, summed, out_sharding = params["batch"], params["summed"], params["out_sharding"]
    if of_x is None and of_y is None:
        return _product_p.bind(x, y, **params), None
    if of_y is None:
        x, axis = jnp.moveaxis(x, of_x, batch), batch
    elif of_x is None:
        y, axis = jnp.moveaxis(y, of_y, batch if params["turned"] else batch + summed), x.ndim - summed
    else:
        x, y, axis = jnp.moveaxis(x, of_x, 0), jnp.moveaxis(y, of_y, 0), 0
        params["batch"] = batch + 1
    if out_sharding is not None:
        parts = list(out_sharding.spec.partitions)
        parts.insert(axis, mapped.explicit_mesh_axis)
        params["out_sharding"] = out_sharding.update(spec=out_sharding.spec.update(partitions=tuple(parts)))
    return _product_p.bind(x, y, **params), axis


_product_p = Primitive("short_product")
_product_p.def_impl(_compute)
_product_p.def_abstract_eval(_shape_of)
ad.defbilinear(_product_p, _back_to_x, _back_to_y)
ad.primitive_jvps[_product_p] = _differentiate
batching.fancy_primitive_batchers[_product_p] = _batch
mlir.register_lowering(_product_p, mlir.lower_fun(_compute, multiple_results=False))
mlir.register_lowering(_product_p, mlir.lower_fun(_compute_on_cpu, multiple_results=False), platform="cpu")
