"""Vectors in fewer bits, on the device: float16, int8 between two ends of a range, one bit a number.

int8 and binary are what `quantize_embeddings` of sentence-transformers computes with the precisions "int8" and
"ubinary". Ranges are laid out as its `ranges` are, so either library can use the other's.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bertjax.checks import check_choice
from bertjax.errors import InputError

#: The precisions, and the dtype of a vector in each. "binary" is packed: eight numbers a byte, the first in the
#: highest bit.
PRECISIONS = {"float32": np.float32, "float16": np.float16, "int8": np.int8, "binary": np.uint8}

# int8 has 256 levels: 255 steps from the lowest to the highest.
_STEPS = 255
_OFFSET = 128
# The bits of infinity.
_INFINITY = 0x7F800000


def quantized_width(dim: int, precision: str) -> int:
    """How many items of `PRECISIONS[precision]` a vector of `dim` numbers takes."""
    return -(-dim // 8) if precision == "binary" else dim


def calibrate(vectors: np.ndarray | jax.Array, ranges: np.ndarray | None = None) -> np.ndarray:
    """The range of each number of some vectors, for int8: call it with one batch after another for a stream.

    Args:
        vectors: float [n, dim], at least one, finite.
        ranges: what this function returned for the vectors before, or None.

    Returns:
        float32 [2, dim]: the lowest of each number, then the highest.

    Raises:
        InputError: there is no vector, a number is not finite, or the ranges are not those of such vectors.
    """
    host = np.asarray(vectors)
    if host.ndim != 2 or not host.size or not np.issubdtype(host.dtype, np.floating):
        raise InputError(f"vectors are {host.dtype} of shape {host.shape}, expected floats [n, dim] and at least one")
    if not np.isfinite(host).all():
        row = int((~np.isfinite(host)).any(1).argmax())
        raise InputError(f"vectors[{row}] has a number that is not finite, which has no place in a range")
    found = np.stack([host.min(0), host.max(0)]).astype(np.float32)
    if ranges is None:
        return found
    before = check_ranges(ranges, host.shape[1])
    return np.stack([np.minimum(before[0], found[0]), np.maximum(before[1], found[1])])


def check_ranges(ranges: Any, dim: int) -> np.ndarray:
    """Returns ranges as float32 [2, dim], if they are what `calibrate` returns for vectors of `dim` numbers.

    Raises:
        InputError: they are not.
    """
    host = np.asarray(ranges)
    if host.shape != (2, dim) or not np.issubdtype(host.dtype, np.floating):
        raise InputError(
            f"ranges are {host.dtype} of shape {host.shape}, expected floats [2, {dim}]: the lowest of each number, "
            "then the highest"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        host = host.astype(np.float32)
        bad = ~(np.isfinite(host[1] - host[0]) & (host[0] <= host[1]))
    if bad.any():
        number = int(bad.argmax())
        raise InputError(f"ranges of number {number} are {host[0, number]} to {host[1, number]}, which is no range")
    return host


def quantize(vectors: jax.Array, precision: str, ranges: np.ndarray | None = None) -> jax.Array:
    """Vectors in a precision of `PRECISIONS`; made to be called inside `jit`.

    Equal vectors give the bits that sentence-transformers gives, on every device.

    Args:
        vectors: float32 [..., dim].
        precision: a key of `PRECISIONS`. In float16, what is beyond its 65504 becomes infinite.
        ranges: for "int8", and only there: host array [2, dim], what `calibrate` returns. What lies outside gets the
            nearest level.

    Returns:
        [..., quantized_width(dim, precision)] of dtype `PRECISIONS[precision]`.

    Raises:
        InputError: there is no such precision, or ranges are missing, superfluous or malformed.
    """
    check_choice("precision", precision, tuple(PRECISIONS))
    if (ranges is not None) != (precision == "int8"):
        wanted = "needs ranges, see calibrate" if precision == "int8" else "has no ranges"
        raise InputError(f"precision {precision!r} {wanted}")
    if precision == "binary":
        return jnp.packbits(vectors > 0, axis=-1)
    if precision == "int8":
        return _to_int8(vectors, check_ranges(ranges, vectors.shape[-1]))
    return vectors.astype(PRECISIONS[precision])


def _to_int8(vectors: jax.Array, ranges: np.ndarray) -> jax.Array:
    # No program divides as the reference does: XLA multiplies by the reciprocal of a constant, and an accelerator's
    # division is not exact to begin with. So the quotient is but a guess, one level off at most, and comparing decides.
    steps = _steps(ranges)
    guess = jnp.clip((vectors - ranges[0]) / steps, 0, _STEPS).astype(jnp.int32)
    numbers = jnp.arange(steps.size)
    borders = jnp.asarray(_borders(ranges))

    def border(level: jax.Array) -> jax.Array:
        return borders[level * steps.size + numbers]

    levels = guess + (vectors >= border(guess + 1)) - (vectors < border(guess))
    return (levels - _OFFSET).astype(jnp.int8)


def _steps(ranges: np.ndarray) -> np.ndarray:
    """The distance between two levels of each number: float32 [dim]."""
    steps = (ranges[1] - ranges[0]) / np.float32(_STEPS)
    return np.where(steps == 0, np.float32(1), steps)


def _level(numbers: np.ndarray, ranges: np.ndarray) -> np.ndarray:
    """The level, 0 to 255, that sentence-transformers gives to each number: float32 [..., dim] to the same shape."""
    return np.clip(np.floor((numbers - ranges[0]) / _steps(ranges)), 0, _STEPS)


def _borders(ranges: np.ndarray) -> np.ndarray:
    """The smallest float32 that `_level` gives each level: [256 + 1, dim], flat; the first and the last are infinite.

    It is found by bisection, so that whatever `_level` rounds is rounded here, too.
    """
    wanted = np.arange(1, _STEPS + 1)[:, None]
    low, high = (np.full((_STEPS, ranges.shape[1]), bound, np.int64) for bound in (-_INFINITY, _INFINITY))
    with np.errstate(over="ignore"):
        while (high - low > 1).any():
            middle = (low + high) // 2
            reached = _level(_float32(middle), ranges) >= wanted
            low, high = np.where(reached, low, middle), np.where(reached, middle, high)
    return np.pad(_float32(high), ((1, 1), (0, 0)), constant_values=((-np.inf, np.inf), (0, 0))).ravel()


def _float32(order: np.ndarray) -> np.ndarray:
    """The float32 of this place in the order of all of them, in which 0 has place 0."""
    magnitude = np.abs(order).astype(np.int32).view(np.float32)
    return np.where(order < 0, -magnitude, magnitude)
