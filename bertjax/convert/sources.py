"""Finds the weights in a folder, whatever their format, and opens them."""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from bertjax.convert.files import read_header
from bertjax.convert.tensors import Contents, TensorInfo, WeightFiles, enumerate_problems, inside
from bertjax.errors import CheckpointError, SourceError
from bertjax.json_files import read_json


@dataclasses.dataclass(frozen=True)
class _Format:
    """A format of weights: how its files are called, and its reader."""

    single: str
    index: str
    suffix: str
    read: Callable[[Path], Contents]


# In the order of preference, for a folder that holds several.
_FORMATS = (_Format("model.safetensors", "model.safetensors.index.json", ".safetensors", read_header),)

# Weights in a format that is not read, by file name: what to say instead of "not found".
_OTHER_WEIGHTS = (
    ("pytorch_model*.bin*", "PyTorch pickles are not read yet; in transformers, save the model again, as safetensors"),
    ("flax_model*.msgpack*", "Flax msgpack weights are not read yet"),
    ("tf_model.h5", "TensorFlow weights are not read; save the model as safetensors first"),
    ("*.ckpt*", "TensorFlow checkpoints are not read yet"),
    ("adapter_model.*", "this is a PEFT adapter, not a model; merge it into its base model first"),
    ("onnx/*.onnx", "only ONNX weights found; bertjax needs the model's safetensors"),
    ("*.onnx", "only ONNX weights found; bertjax needs the model's safetensors"),
    ("*.gguf", "GGUF weights are quantised for other engines; bertjax needs the model's safetensors"),
)


def open_weights(folder: Path) -> WeightFiles:
    """Finds a folder's weights and reads where their tensors are.

    Raises:
        SourceError: there are no weights in a format that is read, or a file can't be opened.
        CheckpointError: a file or the shard index is malformed.
    """
    for each in _FORMATS:
        if (folder / each.single).exists():
            contents = each.read(inside(folder, each.single))
            return WeightFiles(**vars(contents), folder=folder, files=(each.single,))
        if (folder / each.index).exists():
            return _open_shards(folder, each)
    for pattern, advice in _OTHER_WEIGHTS:
        found = sorted(folder.glob(pattern))
        if found:
            raise SourceError(f"{folder}: no {_FORMATS[0].single}, but {found[0].name}: {advice}")
    raise SourceError(f"{folder}: no weights found; expected {', '.join(each.single for each in _FORMATS)}")


def _open_shards(folder: Path, form: _Format) -> WeightFiles:
    """Reads a sharded checkpoint; the index and the shards must agree both ways."""
    index = folder / form.index
    weight_map = read_json(inside(folder, form.index), CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no 'weight_map' object")
    listed = defaultdict(set)
    for name, shard in weight_map.items():
        # A shard is a plain file name: anything else could point outside the folder.
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+" + re.escape(form.suffix), shard):
            raise CheckpointError(f"{index}: weight_map[{name!r}] is {shard!r}, expected a file name in this folder")
        listed[shard].add(name)
    tensors: dict[str, TensorInfo] = {}
    problems, opened = [], []
    for shard, names in sorted(listed.items()):
        contents = form.read(inside(folder, shard))
        found = {tensor.source or tensor.name for tensor in contents.tensors.values()}
        problems += [f"{shard} lacks {name}" for name in names - found]
        problems += [f"{shard} holds {name}, which the index does not place there" for name in found - names]
        tensors |= contents.tensors
        opened.append(contents)
    if problems:
        raise CheckpointError(f"{index}: index and shards disagree: " + enumerate_problems(sorted(problems)))
    return WeightFiles(opened[0].format, tensors, opened[0].metadata, {}, folder, tuple(sorted(listed)), form.index)
