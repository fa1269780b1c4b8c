"""Writes a checkpoint's weights into a folder, in each of the formats that bertjax writes."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bertjax.convert import bert, msgpack
from bertjax.convert.files import INDEX_FILE, SINGLE_FILE, write_safetensors
from bertjax.convert.layout import LAYOUT_FILE, Layout, standard_layout, write_layout
from bertjax.convert.tensors import TensorToWrite
from bertjax.errors import CheckpointError, InputError

#: The formats that are written.
TARGETS = ("safetensors", "msgpack", "orbax")

ORBAX_FOLDER = "params"


def write_torch(
    folder: Path, tensors: Mapping[str, TensorToWrite], layout: Layout, max_shard_size: int | str | None = None
) -> None:
    """Writes safetensors as transformers reads them: one file, or shards and their index.

    Args:
        folder: where to write.
        tensors: by bertjax's names.
        layout: the names to write, and what else a checkpoint holds.
        max_shard_size: divide the tensors into files of at most this size, in bytes or as "5GB"; None: into those that
            the layout names, or one.

    Raises:
        SourceError: a file can't be written.
        CheckpointError: a tensor can't be read, or the layout does not fit the tensors.
        InputError: `max_shard_size` is not a size.
    """
    named = bert.export(tensors, layout)
    metadata = dict(layout.metadata)
    placed = dict(layout.shards) if max_shard_size is None else _divide(named, max_shard_size)
    if not placed:
        write_safetensors(folder / SINGLE_FILE, named, metadata)
        return
    # The layout also knows tensors that are not written: heads, or another encoder's.
    homeless = [tensor.name for tensor in named if tensor.name not in placed]
    if homeless:
        raise CheckpointError(f"the layout has no shard for {', '.join(homeless)}; write with layout=Layout()")
    weight_map = {name: placed[name] for name in sorted(tensor.name for tensor in named)}
    for shard in sorted(set(weight_map.values())):
        write_safetensors(folder / shard, [tensor for tensor in named if weight_map[tensor.name] == shard], metadata)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in named)}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _divide(tensors: Iterable[TensorToWrite], max_shard_size: int | str) -> dict[str, str]:
    """The file of each tensor by name, as the Hub's client divides them; empty if one file is enough."""
    from huggingface_hub import split_state_dict_into_shards_factory  # slow to import, and seldom needed

    split = split_state_dict_into_shards_factory(
        {tensor.name: tensor for tensor in tensors},
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=_bytes(max_shard_size),
    )
    return split.tensor_to_filename if split.is_sharded else {}


_SIZE = re.compile(r"(\d{1,12}(?:\.\d{1,12})?) ?([KMGT])B", re.ASCII | re.IGNORECASE)


def _bytes(size: int | str) -> int:
    """A size in bytes. Raises `InputError` for what is none."""
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    count = int(float(found[1]) * 1000 ** (1 + "KMGT".index(found[2].upper()))) if found else size
    if type(count) is not int or count < 1:
        raise InputError(f"max_shard_size={size!r} is not a size; expected a number of bytes, or one as in 5GB")
    return count


def write_flax(folder: Path, tensors: Mapping[str, TensorToWrite], layout: Layout) -> None:
    """Writes `flax_model.msgpack` as FlaxBert reads it, and beside it the layout that it can't hold.

    Args:
        folder: where to write.
        tensors: by bertjax's names.
        layout: the checkpoint's spelling, to be given back by a conversion to safetensors.

    Raises:
        SourceError, CheckpointError: see `write_torch`.
    """
    names = standard_layout(tensors)
    msgpack.write_msgpack(
        folder / msgpack.SINGLE_FILE,
        [dataclasses.replace(tensor, name=names.spell(name)) for name, tensor in tensors.items()],
    )
    write_layout(folder / LAYOUT_FILE, layout)


def write_tree(
    folder: Path, plan: bert.Plan, dtype: np.dtype | None, layout: Layout, report: Callable[[int], Any]
) -> None:
    """Writes an Orbax checkpoint of the parameter tree into `params`, and beside it the layout that it can't hold.

    Args:
        folder: where to write.
        plan: the model's parameters and the tensors to read them from.
        dtype: dtype to write; None keeps the file's.
        layout: the checkpoint's spelling, to be given back by a conversion to safetensors.
        report: called with the size of every array when it has been read.

    Raises:
        SourceError, CheckpointError: see `write_torch`.
    """
    from bertjax.convert.orbax import write_orbax

    def arrays() -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
        for path, array in plan.arrays(dtype):
            report(array.nbytes)
            yield path, array

    write_orbax(folder / ORBAX_FOLDER, arrays())
    narrower = {} if dtype is not None else dict(_narrower(plan))
    write_layout(folder / LAYOUT_FILE, layout, narrower)


def _narrower(plan: bert.Plan) -> Iterable[tuple[str, str]]:
    """The tensors that their stacked array holds in a wider dtype than their own."""
    stacks: dict[tuple[str, ...], set[np.dtype]] = {}
    for slot, info in plan.pairs():
        stacks.setdefault(slot.path, set()).add(info.dtype)
    for slot, info in plan.pairs():
        if info.dtype != bert.widest(stacks[slot.path]):
            yield slot.name, info.dtype.name
