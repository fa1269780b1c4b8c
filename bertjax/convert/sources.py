"""Finds a checkpoint's weights, whatever their format, and opens them."""

import dataclasses
import functools
import os
import re
import reprlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from bertjax.convert import bert, files, msgpack, tf1
from bertjax.convert.layout import LAYOUT_FILE, read_layout, standard_layout
from bertjax.convert.pickles import read_pickle
from bertjax.convert.rules import Path as TreePath
from bertjax.convert.rules import Slot
from bertjax.convert.targets import ORBAX_FOLDER
from bertjax.convert.tensors import Contents, TensorInfo, WeightFiles, enumerate_problems, inside
from bertjax.errors import CheckpointError, SourceError
from bertjax.folders import find
from bertjax.json_files import read_json


@dataclasses.dataclass(frozen=True)
class _Format:
    """A format of weights in one file or in shards with an index.

    Attributes:
        single: the name that transformers gives the one file.
        suffixes: how names of such files end; shards end like the one file.
        read: finds the tensors of a file.
    """

    single: str
    suffixes: tuple[str, ...]
    read: Callable[[Path], Contents]

    @property
    def index(self) -> str:
        """The name that transformers gives the index."""
        return f"{self.single}.index.json"


# In the order of preference, for a folder that holds several. After these come TensorFlow 1 and Orbax.
_FORMATS = (
    _Format(files.SINGLE_FILE, (".safetensors",), files.read_header),
    _Format("pytorch_model.bin", (".bin", ".pt", ".pth"), read_pickle),
    _Format(msgpack.SINGLE_FILE, (".msgpack",), msgpack.read_msgpack),
)

# Weights that are not read, by file name: what to say instead of "not found".
_OTHER_WEIGHTS = (
    ("*.h5", "Keras weights are not read; load them in transformers 4 with from_tf=True and save the model again"),
    (
        "adapter_model.*",
        "this is a PEFT adapter, not a model; merge it into its base model first, "
        "or put it on that with bertjax.training.load_adapter",
    ),
    ("onnx/*.onnx", "only ONNX weights found; bertjax needs the model's own"),
    ("*.onnx", "only ONNX weights found; bertjax needs the model's own"),
    ("*.gguf", "GGUF weights are quantised for other engines; bertjax needs the original model's"),
)

# Layers in a tree; far more than any BERT has.
_MAX_DEPTH = 1 << 10
# Shards; a BERT-large has one or two.
_MAX_SHARDS = 1 << 10
# Characters in a file's name that any file system takes.
_MAX_NAME = 200


def open_weights(path: Path) -> WeightFiles:
    """Finds a checkpoint's weights and reads where their tensors are.

    Args:
        path: a model's folder, a file of weights, an index of shards, or the prefix of a TensorFlow checkpoint.

    Raises:
        SourceError: there are no weights in a format that is read, or a file can't be opened.
        CheckpointError: a file or the shard index is malformed.
    """
    if not path.is_dir():
        return _open_file(path)
    for each in _FORMATS:
        for name in (each.single, each.index):
            if find(path, name):
                return _open_file(path / name)
    prefix = tf1.find_prefix(path)
    if prefix is not None:
        return _open_tensorflow(prefix)
    if inside(path, ORBAX_FOLDER).is_dir():
        return _open_tree(path)
    for pattern, advice in _OTHER_WEIGHTS:
        found = sorted(path.glob(pattern))
        if found:
            raise SourceError(f"{path}: no {_FORMATS[0].single}, but {found[0].relative_to(path)}: {advice}")
    expected = ", ".join(each.single for each in _FORMATS)
    raise SourceError(
        f"{path}: no weights found; expected {expected}, shards of one of these with their index, a TensorFlow "
        f"checkpoint (*.ckpt.index) or an Orbax checkpoint ({ORBAX_FOLDER}/)"
    )


def _open_file(path: Path) -> WeightFiles:
    """Opens weights by the name of their file."""
    for each in _FORMATS:
        if path.name.endswith(f"{each.suffixes[0]}.index.json"):
            return _with_layout(_open_shards(path, each))
        if path.name.endswith(each.suffixes) and path.exists():
            contents = each.read(inside(path.parent, path.name))
            return _with_layout(WeightFiles(**vars(contents), folder=path.parent, files=(path.name,)))
    prefix = tf1.find_prefix(path)
    if prefix is not None:
        return _open_tensorflow(prefix)
    if path.exists():
        endings = ", ".join(suffix for each in _FORMATS for suffix in each.suffixes)
        raise SourceError(f"{path}: not a file of weights by its name; expected one that ends in {endings}")
    raise SourceError(f"{path}: no such file or folder")


def _open_tensorflow(prefix: Path) -> WeightFiles:
    contents = tf1.read_checkpoint(prefix)
    data = sorted({tensor.file.name for tensor in contents.tensors.values()})
    return WeightFiles(**vars(contents), folder=prefix.parent, files=(f"{prefix.name}.index", *data))


def _open_shards(index: Path, form: _Format) -> WeightFiles:
    """Reads a sharded checkpoint; the index and the shards must agree both ways."""
    folder = index.parent
    weight_map = read_json(inside(folder, index.name), CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no 'weight_map' object")
    listed = defaultdict(set)
    for name, shard in weight_map.items():
        # A shard is a plain file name: anything else could point outside the folder.
        if not isinstance(shard, str) or not _is_shard(shard, form):
            raise CheckpointError(
                f"{index}: weight_map[{reprlib.repr(name)}] is {reprlib.repr(shard)}, expected a file name in this "
                f"folder that ends in {form.suffixes[0]}"
            )
        listed[shard].add(name)
    if len(listed) > _MAX_SHARDS:
        raise CheckpointError(f"{index}: names {len(listed):,} files, more than {_MAX_SHARDS:,}; no BERT has as many")
    tensors: dict[str, TensorInfo] = {}
    problems, opened = [], []
    seen: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for shard, names in sorted(listed.items()):
        file = inside(folder, shard)
        first = seen.setdefault(os.path.realpath(file), shard)
        if first != shard:
            raise CheckpointError(f"{index}: {first} and {shard} are one file; a shard is a file of its own")
        contents = form.read(file)
        found = {tensor.source or tensor.name for tensor in contents.tensors.values()}
        problems += [f"{shard} lacks {name}" for name in names - found]
        problems += [f"{shard} holds {name}, which the index does not place there" for name in found - names]
        problems += [f"{shard} holds {name} again" for name in contents.tensors if name in tensors]
        tensors |= contents.tensors
        left_out |= contents.left_out
        opened.append(contents)
        if problems:  # shards that are not the index's could be anything, and take for ever
            break
    if problems:
        raise CheckpointError(f"{index}: index and shards disagree: " + enumerate_problems(sorted(problems)))
    return WeightFiles(
        opened[0].format, tensors, opened[0].metadata, left_out, folder, tuple(sorted(listed)), index.name
    )


def _is_shard(name: str, form: _Format) -> bool:
    """Whether a shard is called by a plain file name, and not by a path."""
    return len(name) < _MAX_NAME and re.fullmatch(r"[\w.-]+" + re.escape(form.suffixes[0]), name) is not None


def _with_layout(weights: WeightFiles) -> WeightFiles:
    """Adds the layout that stands beside weights in a format that can't hold it."""
    path = None if weights.format == files.FORMAT else find(weights.folder, LAYOUT_FILE)
    if path is None:
        return weights
    layout, _ = read_layout(path)
    return dataclasses.replace(weights, layout=layout)


@dataclasses.dataclass(frozen=True)
class _Part(TensorInfo):
    """A tensor of a stacked array, which has no place of its own in a file."""

    slot: Slot | None = None
    load: Callable[[TreePath], np.ndarray] | None = None

    def read(self) -> np.ndarray:
        """Reads the array, once for all of its tensors; see `TensorInfo.read`."""
        stored = self.slot.view(self.load(self.slot.path))
        tensor = stored.astype(self.dtype, copy=False)
        if tensor is not stored and not np.array_equal(tensor.astype(stored.dtype), stored):
            raise CheckpointError(
                f"{self.file.parent / LAYOUT_FILE}: says that {self.slot.name} was {self.dtype.name}, but its "
                f"{stored.dtype.name} numbers are more exact; convert the original again"
            )
        return tensor


def _open_tree(folder: Path) -> WeightFiles:
    """Opens an Orbax checkpoint of bertjax's parameter tree, as `targets.write_tree` makes it."""
    from bertjax.convert.orbax import read_orbax

    root = folder / ORBAX_FOLDER
    arrays = read_orbax(root)
    shapes = {path: array.shape for path, array in arrays.items()}
    slots = _tree_slots(root, shapes)
    sidecar = find(folder, LAYOUT_FILE)
    layout, narrower = read_layout(sidecar) if sidecar else (None, {})
    names = standard_layout([slot.name for slot in slots])
    load = functools.cache(lambda path: arrays[path].read())
    tensors = {}
    for position, slot in enumerate(slots):
        name, source = names.spell(slot.name), "/".join(slot.path)
        dtype = np.dtype(narrower.get(slot.name, arrays[slot.path].dtype))
        tensors[name] = _Part(name, root, dtype, slot.shape, position, source=source, slot=slot, load=load)
    members = sorted(str(path.relative_to(folder)) for path in root.rglob("*") if path.is_file())
    return WeightFiles("Orbax checkpoint", tensors, {}, {}, folder, tuple(members), None, layout)


def _tree_slots(root: Path, shapes: Mapping[TreePath, tuple[int, ...]]) -> tuple[Slot, ...]:
    """The tensors that a tree's arrays are made of."""
    deep = [path for path, shape in shapes.items() if "layers" in path and not (shape and shape[0] <= _MAX_DEPTH)]
    try:
        if not deep:
            return bert.slots_of(shapes)
    except ValueError:
        pass  # an array that no BERT has, or that it lacks
    found = ", ".join("/".join(path) for path in (deep or list(shapes))[:5])
    raise CheckpointError(f"{root}: not bertjax's parameter tree of a BERT; it has {found}, ...")
