"""Orbax checkpoints of a parameter tree: a nested dict of arrays, for programs in JAX.

`orbax.checkpoint.StandardCheckpointer().restore(folder)` gives the tree back as numpy arrays, or places it on devices
when it is told where. Orbax writes, tensorstore reads: Orbax's own reader opens all arrays at once or none, and where
one of them is damaged, the rest fail aloud in threads after it has returned. In the folder, each leaf is a Zarr array
whose name is its keys joined by ".", in an OCDBT store or in plain folders; the file `_METADATA` says which.

Both libraries are imported when they are first needed: Orbax takes a second to import, and few callers need it.
"""

import concurrent.futures
import contextlib
import dataclasses
import logging
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bertjax.convert import rules
from bertjax.convert.tensors import DTYPE_NAMES, check_ratio, check_shape, inside
from bertjax.errors import CheckpointError, SourceError
from bertjax.json_files import read_json

#: The file in a checkpoint's folder that describes its tree.
METADATA_FILE = "_METADATA"


def write_orbax(path: Path, arrays: Iterable[tuple[rules.Path, np.ndarray]]) -> None:
    """Writes a checkpoint that `StandardCheckpointer` restores; dtypes are kept, float64 too.

    The arrays are written as they are in memory, uncompressed: Orbax's defaults copy the whole tree, then compress all
    of it at once, which takes twice its size in memory beside it. The folder appears when it is complete; what there is
    of one that fails stays beside it, under the name that Orbax gave it. Ctrl-C takes effect when everything is
    written.

    Args:
        path: the folder to make, which must not exist.
        arrays: every array, with its path in the tree; none is changed before this returns.

    Raises:
        CheckpointError: an array is empty or of a dtype that no weight has.
        SourceError: the folder exists, or can't be written, for instance for want of space.
    """
    leaves = dict(arrays)
    for place, array in leaves.items():
        if not array.size or array.dtype not in DTYPE_NAMES:
            found = f"has shape {list(array.shape)} and dtype {array.dtype}"
            raise CheckpointError(f"{path}: {'/'.join(place)!r} {found}, which an Orbax checkpoint can't hold")
    if os.path.lexists(path):
        raise SourceError(f"{path}: already exists; choose another folder")
    import orbax.checkpoint as ocp

    numpy_handler = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, numpy_handler))
    try:
        with _quiet():
            handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
            tree = ocp.args.PyTreeSave(rules.unflatten(leaves.items()))
            # Unlike `StandardCheckpointer`, this one has written everything, and ended its threads, when it returns.
            with ocp.Checkpointer(handler) as checkpointer, concurrent.futures.ThreadPoolExecutor(1) as thread:
                # In a thread that Ctrl-C does not reach: leaving the block waits for it, so that nothing is still being
                # written when the caller cleans up. It has to be known before, or it would not be waited for.
                thread.submit(int).result()
                thread.submit(checkpointer.save, os.path.abspath(path), tree).result()
    except Exception as problem:  # tensorstore's are ValueErrors, whatever went wrong
        raise SourceError(f"{path}: can't be written ({_first_line(problem)})") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax from logging, which it does through absl: what matters in it is raised as well."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@dataclasses.dataclass(frozen=True)
class OrbaxArray:
    """An array in a checkpoint: what it looks like, without its data.

    Attributes:
        folder: the checkpoint's folder.
        path: the array's path in the tree.
        shape: its shape.
        dtype: its dtype, one of `bertjax.convert.tensors.DTYPES`.
        spec: where and how it is stored, for tensorstore.
    """

    folder: Path
    path: rules.Path
    shape: tuple[int, ...]
    dtype: np.dtype
    spec: Mapping[str, Any] = dataclasses.field(repr=False, compare=False)

    def read(self) -> np.ndarray:
        """Reads the array's data: [shape]; needs twice its size in memory.

        That size is what the file declares, so compare `shape` with what is expected first.

        Raises:
            CheckpointError: the data is damaged or missing.
        """
        with _damage(self.folder, self.path):
            array = np.asarray(_open(self.spec).read().result())
        if (array.shape, array.dtype) != (self.shape, self.dtype):
            raise CheckpointError(f"{self.folder}: {'/'.join(self.path)!r} was changed while the checkpoint was read")
        return array


def read_orbax(path: Path) -> Mapping[rules.Path, OrbaxArray]:
    """Finds the arrays of a checkpoint that is a nested dict of arrays; their data is not read.

    Raises:
        SourceError: there is no such folder, or something in it leads out of it or is not a file.
        CheckpointError: it is not an Orbax checkpoint, is damaged, or holds something other than arrays of numbers.
    """
    held = _check_files(path)
    if not (path / METADATA_FILE).exists():
        raise CheckpointError(f"{path}: not an Orbax checkpoint of a tree; it has no file {METADATA_FILE}")
    arrays: dict[rules.Path, OrbaxArray] = {}
    for place, spec in _leaves(path):
        if place in arrays:
            raise CheckpointError(f"{path / METADATA_FILE}: describes {'/'.join(place)!r} twice")
        arrays[place] = _describe(path, place, spec)
    check_ratio(path, sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays.values()), held)
    return arrays


def _check_files(folder: Path) -> int:
    """Refuses a folder in which something else stands where a file is expected; returns the size of all files."""
    held = 0

    def fail(problem: OSError) -> None:
        raise SourceError(f"{folder}: can't be read ({problem.strerror or problem})")

    for root, folders, files in os.walk(folder, onerror=fail):
        for name in (*folders, *files):
            entry = inside(folder, (Path(root) / name).relative_to(folder))
            try:
                status = entry.stat()
            except OSError as problem:
                raise SourceError(f"{entry}: can't be read ({problem.strerror or problem})") from None
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
                raise SourceError(f"{entry}: is neither a file nor a folder; remove it")
            held += status.st_size
    return held


def _leaves(folder: Path) -> Iterator[tuple[rules.Path, Mapping[str, Any]]]:
    """Yields the path of each leaf, and how tensorstore finds it."""
    path = folder / METADATA_FILE
    metadata = read_json(path, CheckpointError)
    base = os.path.join(os.path.abspath(folder), "")
    try:
        leaves = [
            (tuple(part["key"] for part in leaf["key_metadata"]), leaf["value_metadata"]["value_type"])
            for leaf in metadata["tree_metadata"].values()
        ]
    except (AttributeError, TypeError, KeyError):
        raise CheckpointError(f"{path}: does not describe a tree as Orbax does; save the checkpoint again") from None
    for place, kind in leaves:
        for key in place:  # a key may become part of a file's path
            if not isinstance(key, str) or not key or "/" in key or "\\" in key or key.startswith("."):
                raise CheckpointError(f"{path}: the tree has the key {key!r}, expected a plain name")
        if kind not in ("np.ndarray", "jax.Array"):
            raise CheckpointError(f"{path}: {'/'.join(place)!r} is of type {kind!r}, expected an array; remove it")
        store: dict[str, Any] = {"driver": "file", "path": f"{base}{'.'.join(place)}/"}
        if metadata.get("use_ocdbt") is not False:
            store = {"driver": "ocdbt", "base": {"driver": "file", "path": base}, "path": f"{'.'.join(place)}/"}
        # Zeros are stored like other numbers, so data that is missing is lost.
        driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
        yield place, {"driver": driver, "kvstore": store, "fill_missing_data_reads": False}


def _describe(folder: Path, place: rules.Path, spec: Mapping[str, Any]) -> OrbaxArray:
    """Opens an array, and checks what the file says of it."""
    where = "/".join(place)
    with _damage(folder, place):
        store = _open(spec)
        shape, dtype = store.shape, store.dtype.numpy_dtype
        chunk = store.chunk_layout.write_chunk.shape or ()  # None for a scalar
        compressed = _uses_blosc(store.spec().to_json().get("metadata", {}))
    if compressed:
        raise CheckpointError(f"{folder}: {where!r} is compressed with blosc, which Orbax does not use; save it again")
    if dtype not in DTYPE_NAMES:
        raise CheckpointError(f"{folder}: {where!r} has dtype {dtype}, which bertjax does not read")
    check_shape(folder, where, shape)
    # A chunk is read whole, so one that is larger than its array could be of any size.
    if any(part > max(size, 1) for part, size in zip(chunk, shape, strict=True)):
        raise CheckpointError(f"{folder}: {where!r} of shape {list(shape)} is in chunks of {list(chunk)}")
    return OrbaxArray(folder, place, shape, dtype, spec)


def _uses_blosc(metadata: Mapping[str, Any]) -> bool:
    """Whether chunks are compressed with blosc, which allocates whatever size a chunk says, before it looks further."""
    waiting = [metadata.get("compressor"), metadata.get("codecs")]
    while waiting:  # codecs may hold codecs
        each = waiting.pop()
        if isinstance(each, dict):
            if "blosc" in (each.get("id"), each.get("name")):
                return True
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each
    return False


def _open(spec: Mapping[str, Any]) -> Any:
    """Opens an array: a tensorstore.TensorStore."""
    import tensorstore

    return tensorstore.open(dict(spec), open=True, read=True).result()


@contextlib.contextmanager
def _damage(folder: Path, place: rules.Path) -> Iterator[None]:
    """Makes whatever tensorstore raises, which is ValueError for nearly everything, an error that says where."""
    try:
        yield
    except Exception as problem:
        message = f"not an Orbax checkpoint, or damaged at {'/'.join(place)!r} ({_first_line(problem)})"
        raise CheckpointError(f"{folder}: {message}; save or copy it again") from None


def _first_line(problem: Exception) -> str:
    lines = str(problem).strip().splitlines() or [type(problem).__name__]
    return lines[0][:300]
