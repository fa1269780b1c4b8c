"""One result, computed in another way where the program runs: what it is compiled for is known only then."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.interpreters import ad


def on_platform(default: Callable[..., Any], **others: Callable[..., Any]) -> Callable[..., Any]:
    """A function that computes what `default` does, in programs for other platforms by one of `others`.

    What a program is compiled for is known only then, so all ways are traced. Derivatives are of one of them, or
    whatever each needs for the backward pass would be kept: of "cuda" where JAX's default backend is a GPU, else of
    `default`. (By the compiler's estimates for TPUs a training step takes 3 % more by "tpu".)

    Args:
        default: what defines the result; a function of pytrees of arrays.
        **others: by platform ("tpu", "cuda"), functions of the same arguments, with results of the same shapes and
            dtypes, that may differ in rounding.
    """

    @jax.custom_jvp
    def chosen(*args: Any) -> Any:
        return lax.platform_dependent(*args, default=default, **others)

    def differentiate(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
        here = others.get("cuda", default) if jax.default_backend() == "gpu" else default
        leaves, tree = jax.tree.flatten(primals)
        return jvp_of_moving(lambda *leaves: here(*jax.tree.unflatten(tree, leaves)), leaves, jax.tree.leaves(tangents))

    chosen.defjvp(differentiate, symbolic_zeros=True)
    return chosen


def jvp_of_moving(function: Callable[..., Any], primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
    """`jax.jvp` of a function of arrays, where a tangent may be one of JAX's symbols for zero.

    Of what does not move no derivative is to be computed: kernels that are frozen, and segments.
    """
    moving = [place for place, tangent in enumerate(tangents) if not isinstance(tangent, (ad.Zero, SymbolicZero))]

    def of_moving(*moved: jax.Array) -> Any:
        args = dict(enumerate(primals)) | dict(zip(moving, moved, strict=True))
        return function(*args.values())

    return jax.jvp(of_moving, [primals[place] for place in moving], [tangents[place] for place in moving])
