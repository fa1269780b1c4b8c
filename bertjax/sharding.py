"""Where arrays lie on several devices: what the axes of parameters are called, and one table from names to the mesh.

As in other JAX projects, an array's axes have logical names, and rules say along which axis of the mesh each is divided
(t5x, Roberts et al. 2022, arXiv:2203.17189, section 2.2). With the rules here, a mesh of one axis, "data", divides the
batch; fully sharded (Rajbhandari et al. 2020, arXiv:1910.02054, stage 3), it also divides every parameter and what the
optimiser keeps of it, and each layer's are gathered when it is computed. A second axis, "model", divides heads, the
feed-forward layer and the vocabulary (Shoeybi et al. 2019, arXiv:1909.08053).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

#: Along which axis of the mesh an axis is divided; those that are not here are on every device.
RULES = {"batch": "data", "heads": "model", "mlp": "model", "vocab": "model"}
#: The same, with parameters divided over the devices that divide the batch.
FULLY_SHARDED = RULES | {"embed": "data"}

_DENSE = {
    "query": ("embed", "heads"),
    "key": ("embed", "heads"),
    "value": ("embed", "heads"),
    "intermediate": ("embed", "mlp"),
    "decoder": ("embed", "vocab"),
}
# Both are called `output`: their places tell them apart.
_OUTPUTS = {"attention": ("heads", "embed"), "feed_forward": ("mlp", "embed")}


def axes_of(names: Sequence[str], ndim: int) -> tuple[str | None, ...]:
    """The logical axes of a parameter, or of what an optimiser keeps of it.

    Args:
        names: its path in the parameter tree; what is in front of it does not matter.
        ndim: how many axes it has; one more than its kind is the layers' in front.
    """
    parent, leaf = (names[-2] if len(names) > 1 else ""), names[-1] if names else ""
    kernel = _OUTPUTS.get(names[-3]) if parent == "output" and len(names) > 2 else _DENSE.get(parent)
    into, out = kernel or ("embed", None)
    axes: tuple[str | None, ...] = {
        "kernel": (into, out),
        "lora_a": (into, None),
        "lora_b": (None, out),
        "bias": (kernel[-1],) if kernel else ("vocab" if parent == "predictions" else "embed",),
        "scale": ("embed",),
        "embedding": ("vocab", "embed"),
    }.get(leaf, ())
    if parent == "distance_embedding":
        axes = (None, None)
    if ndim < len(axes) or not axes:
        return (None,) * ndim
    return (*[None] * (ndim - len(axes)), *axes)


def spec_of(names: Sequence[str], shape: Sequence[int], mesh: Mesh, rules: Mapping[str, str]) -> PartitionSpec:
    """How a parameter is divided over a mesh; an axis that can't be divided evenly is on every device."""
    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))

    def divided(axis: str | None, size: int) -> str | None:
        target = rules.get(axis)
        return target if target in sizes and size % sizes[target] == 0 else None

    return PartitionSpec(*map(divided, axes_of(names, len(shape)), shape))


def shardings_of(tree: Any, mesh: Mesh, rules: Mapping[str, str]) -> Any:
    """A `NamedSharding` for each array of parameters, or of a state that holds some; a tree of the same structure."""

    def sharding(path: Any, array: Any) -> NamedSharding:
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        return NamedSharding(mesh, spec_of(list(map(str, names)), array.shape, mesh, rules))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def bytes_per_device(tree: Any) -> int:
    """How many bytes of a tree's arrays a device holds; their shards have the same shape everywhere."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of one axis, "data", of these devices; default: all there are."""
    devices = jax.devices() if devices is None else devices
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def batch_sharding(mesh: Mesh, *, parts: bool = False) -> NamedSharding:
    """How batches are divided over a mesh: along their first axis, or their second, behind that of their parts."""
    return NamedSharding(mesh, PartitionSpec(*[None] * parts, RULES["batch"]))
