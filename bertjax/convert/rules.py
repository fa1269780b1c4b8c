"""The mapping between a PyTorch state dict and a parameter tree, as data.

A row of a table is a module: a PyTorch name template, a path in our tree, and a kind. The kind owns the leaf names and
says which leaves are transposed; `{layer}` in a template means that our array stacks one tensor per layer. From the
rows follow, by expansion, one `Slot` per PyTorch tensor; a slot reads and writes alike, so the inverse mapping is the
same data and can't drift from it. The only operations are transpose and stack. Casting is a separate step.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

Path = tuple[str, ...]
Shape = tuple[int, ...]


class Leaf(NamedTuple):
    """One tensor of a kind of module: its PyTorch name, our name, and whether the two are transposed."""

    torch: str
    ours: str
    transpose: bool


#: PyTorch keeps a dense layer's weight [out, in], Flax keeps it [in, out].
LINEAR = (Leaf("weight", "kernel", True), Leaf("bias", "bias", False))
NORM = (Leaf("weight", "scale", False), Leaf("bias", "bias", False))
EMBED = (Leaf("weight", "embedding", False),)
BIAS = (Leaf("bias", "bias", False),)
KERNEL = (Leaf("weight", "kernel", True),)


class Row(NamedTuple):
    """A module in both worlds."""

    torch: str
    path: Path
    kind: tuple[Leaf, ...]


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one PyTorch tensor lives in the parameter tree.

    Attributes:
        name: the tensor's PyTorch name.
        path: the array's path in the tree.
        layer: index on the array's leading axis, or None for an array that is not stacked.
        transpose: whether PyTorch's tensor is the transpose of ours.
        shape: the tensor's shape in PyTorch.
    """

    name: str
    path: Path
    layer: int | None
    transpose: bool
    shape: Shape

    def view(self, array: np.ndarray) -> np.ndarray:
        """This tensor inside the stacked array at `path`, in PyTorch's shape; a view, for reading or writing."""
        part = array if self.layer is None else array[self.layer]
        return part.T if self.transpose else part


def expand(table: Iterable[Row], shapes: Mapping[Path, Shape]) -> list[Slot]:
    """Expands a table into one slot per PyTorch tensor, in the table's order, layer by layer.

    Args:
        table: the rows. A row that has no array in the tree (a model without a pooler) is left out.
        shapes: the shape of every array of the parameter tree.

    Raises:
        ValueError: the tree has an array that no row describes, or two rows describe one, or stacks differ in depth.
            This is a mistake in the table, never in a checkpoint.
    """
    plain, stacked, seen = [], [], []
    for row in table:
        for leaf in row.kind:
            path = (*row.path, leaf.ours)
            if path in shapes:
                seen.append(path)
                (stacked if "{layer}" in row.torch else plain).append((f"{row.torch}.{leaf.torch}", path, leaf))
    if sorted(seen) != sorted(shapes):
        odd = sorted(set(shapes) ^ set(seen)) or sorted(path for path in set(seen) if seen.count(path) > 1)
        raise ValueError(f"the table does not describe the tree's arrays one to one: {odd}")
    slots = [_slot(name, path, None, leaf, shapes) for name, path, leaf in plain]
    depths = {shapes[path][0] for _, path, _ in stacked}
    if len(depths) > 1:
        raise ValueError(f"the stacked arrays differ in depth: {sorted(depths)}")
    return slots + [
        _slot(name.format(layer=layer), path, layer, leaf, shapes)
        for layer in range(max(depths, default=0))
        for name, path, leaf in stacked
    ]


def _slot(name: str, path: Path, layer: int | None, leaf: Leaf, shapes: Mapping[Path, Shape]) -> Slot:
    shape = shapes[path] if layer is None else shapes[path][1:]
    return Slot(name, path, layer, leaf.transpose, shape[::-1] if leaf.transpose else shape)


def by_array(slots: Iterable[Slot]) -> dict[Path, list[Slot]]:
    """Groups slots by the array they are part of, in order."""
    groups: dict[Path, list[Slot]] = {}
    for slot in slots:
        groups.setdefault(slot.path, []).append(slot)
    return groups


def flatten(tree: Mapping, prefix: Path = ()) -> Iterator[tuple[Path, object]]:
    """Walks a nested dict; yields the path and value of every leaf."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, (*prefix, str(key)))
        else:
            yield (*prefix, str(key)), value


def unflatten(leaves: Iterable[tuple[Path, object]]) -> dict:
    """The inverse of `flatten`."""
    tree: dict = {}
    for path, value in leaves:
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree
