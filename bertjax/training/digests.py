"""The arrays of a state by name, what they look like, and digests of them that tell whether they came back bit for bit.

A digest is computed where the array lies, by integer arithmetic whose result does not depend on the order: it is the
same over any number of devices, and costs one reading of the memory.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import SingleDeviceSharding

from bertjax.errors import CheckpointError

#: What an array looks like: its dtype's name and its shape, as JSON has them.
Form = tuple[str, list[int]]

# Of MurmurHash3's 32-bit finaliser (Appleby 2011), and Knuth's multiplier: all are odd, so that no bit is lost.
_MIX = (np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35))
_PLACE = np.uint32(0x9E3779B1)


class DamagedError(CheckpointError):
    """A checkpoint is not as it was written."""


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths, as in `learnt.classifier.bias`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree.leaves_with_path(tree)
    }


def forms(arrays: Mapping[str, Any]) -> dict[str, Form]:
    """What arrays look like; the dtype of a random key names its kind."""
    return {name: (str(array.dtype), list(array.shape)) for name, array in arrays.items()}


def difference(there: Mapping[str, Form], here: Mapping[str, Form]) -> str | None:
    """The first difference between the arrays of a checkpoint and those of a state, in words; None if there is none."""
    for name in (*here, *there):
        if name not in there:
            return f"{name!r} is not in it"
        if name not in here:
            return f"it has {name!r}, which this run has not"
        if tuple(there[name]) != tuple(here[name]):
            (dtype, shape), (our_dtype, our_shape) = there[name], here[name]
            return f"{name!r} is {dtype}{shape} in it, {our_dtype}{our_shape} in this run"
    return None


def is_key(leaf: Any) -> bool:
    """Whether an array is one of typed random keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def plain(leaf: Any) -> Any:
    """An array as numbers: random keys as their data."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """What `plain` gives of an array, and where it is to lie; default: on the first device."""
    struct = jax.eval_shape(plain, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=sharding)


def as_leaf(like: Any, array: jax.Array) -> jax.Array:
    """Numbers as a leaf like another: the inverse of `plain`."""
    if not is_key(like):
        return array
    kinds: list[Any] = []
    jax.eval_shape(lambda key: kinds.append(jax.random.key_impl(key)), jax.ShapeDtypeStruct(like.shape, like.dtype))
    return jax.random.wrap_key_data(array, impl=kinds[0])


def digest(array: jax.Array) -> int:
    """A number of 32 bits that is another one if any element changes, and nearly always if several do."""
    return int(_digest(array))


@jax.jit
def _digest(array: jax.Array) -> jax.Array:
    bits = _bits(array)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        place = place * np.uint32(size) + lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    # Each step can be undone, so different bits in a place give different summands.
    mixed = bits ^ (place * _PLACE)
    mixed = (mixed ^ (mixed >> np.uint32(16))) * _MIX[0]
    mixed = (mixed ^ (mixed >> np.uint32(13))) * _MIX[1]
    return (mixed ^ (mixed >> np.uint32(16))).sum(dtype=jnp.uint32)


def _bits(array: jax.Array) -> jax.Array:
    """An array's bits: uint32 [shape], or [shape, 2] if an element has 64."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    width = min(32, 8 * array.dtype.itemsize)
    return lax.bitcast_convert_type(array, jnp.dtype(f"uint{width}")).astype(jnp.uint32)
