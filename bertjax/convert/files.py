"""Safetensors files, single and sharded: read lazily, written as a stream.

The format is a length, a JSON header, then the tensors' bytes (huggingface/safetensors, "Format"). The safetensors
library checks a file's header here; the tensors are then read with plain reads, because the library maps the whole
file into memory and the pages it touched count against the process beside the copies made of them.
"""

import dataclasses
import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from bertjax.errors import CheckpointError, SourceError
from bertjax.json_files import read_json

#: Safetensors' dtype names, in the order in which the safetensors library lays dtypes out in a file (it begins with the
#: last). What is not here (8-bit floats, packed and unsigned integers) has no place in a BERT checkpoint.
DTYPES: Mapping[str, np.dtype] = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype("uint8"),
    "I8": np.dtype("int8"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# No weight has more dimensions; numpy can't hold an array of very many.
_MAX_RANK = 8

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

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


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file: where it is and what it looks like, without its data."""

    name: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """Reads the tensor's data. Raises `SourceError` if the file ends early or can't be read."""
        count = int(np.prod(self.shape, dtype=np.int64))
        try:
            with open(self.file, "rb") as file:
                data = np.fromfile(file, self.dtype, count, offset=self.offset)
        except OSError as problem:
            raise SourceError(f"{self.file}: can't be read ({problem.strerror or problem})") from None
        if data.size != count:
            raise SourceError(f"{self.file}: ends inside tensor {self.name!r}; was it changed while being read?")
        return data.reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class WeightFiles:
    """The tensors of a checkpoint folder.

    Attributes:
        folder: the folder.
        tensors: every tensor by name, in file order.
        shards: base names of the files; one for a single file.
        metadata: the free-form strings of the (first) file's header.
    """

    folder: Path
    tensors: Mapping[str, TensorInfo]
    shards: tuple[str, ...]
    metadata: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def open_weights(folder: Path) -> WeightFiles:
    """Finds a folder's safetensors weights and reads their headers.

    Raises:
        SourceError: there are no weights in a format that is read, or a file can't be opened.
        CheckpointError: a file or the shard index is malformed.
    """
    if (folder / SINGLE_FILE).exists():
        tensors, metadata = read_header(inside(folder, SINGLE_FILE))
        return WeightFiles(folder, tensors, (SINGLE_FILE,), metadata)
    if (folder / INDEX_FILE).exists():
        return _open_shards(folder)
    for pattern, advice in _OTHER_WEIGHTS:
        found = sorted(folder.glob(pattern))
        if found:
            raise SourceError(f"{folder}: no {SINGLE_FILE}, but {found[0].name}: {advice}")
    raise SourceError(f"{folder}: no weights found; expected {SINGLE_FILE} or {INDEX_FILE}")


def inside(folder: Path, name: str | Path) -> Path:
    """Returns the path of one of a checkpoint's files, unless it is a link that leads out of the checkpoint.

    In the Hub's cache, files are links from snapshots/<commit>/ to blobs/ beside it; these are part of the checkpoint.

    Raises:
        SourceError: the link leads somewhere else.
    """
    root, path = Path(os.path.realpath(folder)), folder / name
    target = Path(os.path.realpath(path))
    blobs = [parent.with_name("blobs") for parent in root.parents if parent.name == "snapshots"]
    if not any(target.is_relative_to(allowed) for allowed in [root, *blobs]):
        raise SourceError(f"{path}: is a link out of the model's folder, to {target}; put the file itself there")
    return path


def _open_shards(folder: Path) -> WeightFiles:
    """Reads a sharded checkpoint; the index and the shards must agree both ways."""
    index = folder / INDEX_FILE
    weight_map = read_json(index, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no 'weight_map' object")
    listed = defaultdict(set)
    for name, shard in weight_map.items():
        # A shard is a plain file name: anything else could point outside the folder.
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            raise CheckpointError(f"{index}: weight_map[{name!r}] is {shard!r}, expected a file name in this folder")
        listed[shard].add(name)
    tensors: dict[str, TensorInfo] = {}
    problems, metadata = [], {}
    for shard, names in sorted(listed.items()):
        found, shard_metadata = read_header(inside(folder, shard))
        metadata = metadata or shard_metadata
        problems += [f"{shard} lacks {name}" for name in names - found.keys()]
        problems += [f"{shard} holds {name}, which the index does not place there" for name in found.keys() - names]
        tensors |= found
    if problems:
        raise CheckpointError(f"{index}: index and shards disagree: " + enumerate_problems(sorted(problems)))
    return WeightFiles(folder, tensors, tuple(sorted(listed)), metadata)


def enumerate_problems(problems: list[str], limit: int = 1000) -> str:
    """Joins problems for a message: all those of any BERT, but no gigabyte for a file made to give a million."""
    rest = len(problems) - limit
    return "; ".join(problems[:limit]) + (f"; and {rest} more" if rest > 0 else "")


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Reads and checks a safetensors header.

    Returns:
        The tensors by name, in the order of their data, and the free-form metadata.

    Raises:
        SourceError: the file can't be opened.
        CheckpointError: it is not a well-formed safetensors file, or holds a dtype that no BERT has.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(512)
            with safe_open(path, "numpy") as checked:  # holes, overlaps, overflow, trailing bytes
                metadata = dict(checked.metadata() or {})
            file.seek(0)
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size), object_pairs_hook=_unique)
    except SafetensorError as problem:
        raise CheckpointError(f"{path}: {_what_it_is(start) or f'not a safetensors file ({problem})'}") from None
    except OSError as problem:
        raise SourceError(f"{path}: can't be read ({problem.strerror or problem})") from None
    except ValueError as problem:
        raise CheckpointError(f"{path}: {problem}") from None
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f"{path}: tensor {name!r} has dtype {entry['dtype']}, which bertjax does not read")
        shape, begin = tuple(entry["shape"]), entry["data_offsets"][0]
        # A dimension of zero hides any size of the others from the check of the file's length.
        if len(shape) > _MAX_RANK or math.prod(size or 1 for size in shape) >= 1 << 48:
            raise CheckpointError(f"{path}: tensor {name!r} has the impossible shape {list(shape)}")
        tensors[name] = TensorInfo(name, path, DTYPES[entry["dtype"]], shape, 8 + size + begin)
    return tensors, metadata


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Refuses duplicate keys in a header, of which JSON readers silently keep the last."""
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = sorted(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the header names {enumerate_problems(list(map(repr, twice)))} twice")
    return result


def _what_it_is(start: bytes) -> str | None:
    """Names the usual things that stand where weights were meant to be."""
    if not start:
        return "the file is empty; the download did not finish"
    if start.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not the weights; run `git lfs pull` in the clone"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "this is an HTML page, not weights; the download fetched an error or a log-in page"
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return "this is a PyTorch pickle renamed; convert it with PyTorch's safetensors export"
    return None


@dataclasses.dataclass(frozen=True)
class TensorToWrite:
    """A tensor to be written: its header entry, and a function that makes its data when its turn comes."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


def write_safetensors(path: Path, tensors: Iterable[TensorToWrite], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file, one tensor in memory at a time.

    Tensors are laid out as the safetensors library does it (widest dtype first, then by name), so that a file written
    from the same tensors by either is the same file. The data is flushed to the disk before this returns.

    Raises:
        SourceError: the file can't be written, for instance for want of space.
    """
    rank = {dtype: position for position, dtype in enumerate(DTYPES.values())}
    ordered = sorted(tensors, key=lambda tensor: (-rank[tensor.dtype], tensor.name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for tensor in ordered:
        end = offset + int(np.prod(tensor.shape, dtype=np.int64)) * tensor.dtype.itemsize
        dtype = DTYPE_NAMES[tensor.dtype]
        header[tensor.name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    try:
        with open(path, "xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in ordered:
                data = np.asarray(tensor.make(), dtype=tensor.dtype, order="C")
                assert data.shape == tensor.shape, (tensor.name, data.shape, tensor.shape)
                file.write(data.reshape(-1).view(np.uint8))
            file.flush()
            os.fsync(file.fileno())
    except SourceError:  # a tensor that is copied could not be read
        raise
    except OSError as problem:
        raise SourceError(f"{path}: can't be written ({problem.strerror or problem})") from None
