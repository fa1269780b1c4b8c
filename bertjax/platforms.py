"""One result, computed in another way where the program runs: what it is compiled for is known only then."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.custom_derivatives import SymbolicZero


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
        # Of what does not move there is no derivative to be computed: kernels that are frozen, and segments.
        leaves, tree = jax.tree.flatten(primals)
        slopes = jax.tree.leaves(tangents)
        moving = [place for place, slope in enumerate(slopes) if type(slope) is not SymbolicZero]

        def of_moving(*moved: jax.Array) -> Any:
            together = dict(enumerate(leaves)) | dict(zip(moving, moved, strict=True))
            return here(*jax.tree.unflatten(tree, together.values()))

        return jax.jvp(of_moving, [leaves[place] for place in moving], [slopes[place] for place in moving])

    chosen.defjvp(differentiate, symbolic_zeros=True)
    return chosen
