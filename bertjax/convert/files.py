"""Safetensors files: read lazily, written as a stream.

The format is a length, a JSON header, then the tensors' bytes (huggingface/safetensors, "Format"). The safetensors
library checks a file's header here; the tensors are then read with plain reads, because the library maps the whole
file into memory and the pages it touched count against the process beside the copies made of them.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from bertjax.convert.output import new_file
from bertjax.convert.tensors import (
    DTYPE_NAMES,
    DTYPES,
    Contents,
    TensorInfo,
    TensorToWrite,
    ahead,
    check_shape,
    enumerate_problems,
    what_it_is,
)
from bertjax.errors import CheckpointError, SourceError
from bertjax.json_files import opened

#: What `Contents.format` says of these files.
FORMAT = "safetensors"

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# The header of a BERT of 1024 layers, the most that a configuration may ask for, has 2 MB; the library allows 100 MB,
# which take gigabytes when they are read.
_MAX_HEADER = 4 << 20
# A BERT of 1024 layers has 16,000 tensors, whose names have at most a hundred characters.
_MAX_TENSORS = 1 << 16
_MAX_NAME = 512

_METADATA = "__metadata__"  # the header's one key that is no tensor


def read_header(path: Path) -> Contents:
    """Reads and checks a safetensors header; the tensors are in the order of their data.

    Raises:
        SourceError: the file can't be opened.
        CheckpointError: it is not a well-formed safetensors file, or holds a dtype that no BERT has.
    """
    try:
        with opened(path) as file:
            start = file.read(512)
            _check_length(path, start)
            with safe_open(path, "numpy") as checked:  # holes, overlaps, overflow, trailing bytes
                metadata = dict(checked.metadata() or {})
            file.seek(0)
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size), object_pairs_hook=_unique)
    except SafetensorError as problem:
        raise CheckpointError(f"{path}: {_not_safetensors(start) or f'not a safetensors file ({problem})'}") from None
    except (CheckpointError, SourceError):
        raise
    except ValueError as problem:
        raise CheckpointError(f"{path}: {problem}") from None
    header.pop(_METADATA, None)
    _check_entries(path, header)
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f"{path}: tensor {name!r} has dtype {entry['dtype']}, which bertjax does not read")
        shape, begin = tuple(entry["shape"]), entry["data_offsets"][0]
        check_shape(path, name, shape)
        tensors[name] = TensorInfo(name, path, DTYPES[entry["dtype"]], shape, 8 + size + begin)
    return Contents(FORMAT, tensors, metadata)


def _check_length(path: Path, start: bytes) -> None:
    """Refuses a header that the library would still read, into gigabytes of tensors that are all empty."""
    length = int.from_bytes(start[:8], "little")
    if _MAX_HEADER < length <= os.path.getsize(path) and not _not_safetensors(start):
        raise CheckpointError(f"{path}: not a safetensors file (its header has {length:,} bytes; no BERT's is as long)")


def _check_entries(path: Path, header: Mapping[str, object]) -> None:
    """Refuses what the library reads as a tensor though the format does not write it so, and far too many."""
    if len(header) > _MAX_TENSORS:
        raise CheckpointError(
            f"{path}: has {len(header):,} tensors, expected at most {_MAX_TENSORS:,}; no BERT has more"
        )
    for name, entry in header.items():
        if len(name) > _MAX_NAME:
            raise CheckpointError(
                f"{path}: a tensor is called {name[:100] + '...'!r}, expected at most {_MAX_NAME} characters"
            )
        plain = isinstance(entry, dict) and isinstance(entry.get("dtype"), str)
        if not (plain and _are_ints(entry.get("shape")) and _are_ints(entry.get("data_offsets"))):
            raise CheckpointError(
                f"{path}: the header's entry of tensor {name!r} is not an object with a dtype, a shape and data_offsets"
            )


def _are_ints(value: object) -> bool:
    return isinstance(value, list) and all(type(each) is int for each in value)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Refuses duplicate keys in a header, of which JSON readers silently keep the last."""
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = sorted(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the header names {enumerate_problems(list(map(repr, twice)))} twice")
    return result


def _not_safetensors(start: bytes) -> str | None:
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return "this is a PyTorch pickle renamed; call it pytorch_model.bin"
    return what_it_is(start)


def write_safetensors(path: Path, tensors: Iterable[TensorToWrite], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file, a few tensors in memory at a time.

    Tensors are laid out as the safetensors library does it (widest dtype first, then by name), so that a file written
    from the same tensors by either is the same file. The data is flushed to the disk before this returns.

    Raises:
        CheckpointError: a tensor has the name under which the format keeps the metadata.
        SourceError: the file can't be written, for instance for want of space.
    """
    rank = {dtype: position for position, dtype in enumerate(DTYPES.values())}
    ordered = sorted(tensors, key=lambda tensor: (-rank[tensor.dtype], tensor.name))
    if any(tensor.name == _METADATA for tensor in ordered):
        raise CheckpointError(f"{path}: a tensor is called {_METADATA!r}, which is no tensor's name in safetensors")
    header: dict[str, object] = {_METADATA: dict(metadata)} if metadata else {}
    offset = 0
    for tensor in ordered:
        end = offset + tensor.nbytes
        dtype = DTYPE_NAMES[tensor.dtype]
        header[tensor.name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with new_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for data in ahead(tensor.data for tensor in ordered):
            file.write(data.reshape(-1).view(np.uint8))
