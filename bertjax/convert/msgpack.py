"""Flax msgpack files as FlaxBert wrote them: read lazily, written as a stream.

The file is one nested map in msgpack's encoding (msgpack/msgpack, spec.md). Each array in it is an extension of type 1
that holds [shape, dtype's name, bytes in C order]; an array of more than a gigabyte is a map of several such
extensions (flax, serialization.py). The msgpack library would load an array to get past it, so the few headers that
occur are read and written here, and the data is skipped.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np

from bertjax.convert import rules
from bertjax.convert.output import new_file
from bertjax.convert.tensors import (
    DTYPES,
    Contents,
    TensorInfo,
    TensorToWrite,
    ahead,
    check_shape,
    contiguous,
    read_flat,
    what_it_is,
)
from bertjax.errors import CheckpointError
from bertjax.json_files import opened

#: What `Contents.format` says of these files.
FORMAT = "Flax msgpack"

SINGLE_FILE = "flax_model.msgpack"
INDEX_FILE = "flax_model.msgpack.index.json"

# The numbers of Flax's extensions, and how it marks an array that is in pieces.
_ARRAY = 1
_OTHERS = {2: "a complex number", 3: "a scalar"}
_IN_PIECES = "__msgpack_chunked_array__"

# Flax divides arrays above this size, because msgpack libraries take no more than 2 GiB at once.
_PIECE_BYTES = 1 << 30
# Pieces are joined in blocks of this size, so that joining them needs hardly more memory than the array.
_BLOCK_BYTES = 1 << 26

# A BERT's paths have at most 8 keys of at most 21 bytes.
_MAX_DEPTH = 16
_MAX_KEY = 128
# A BERT of 1024 layers, the most that a configuration may ask for, has 32 entries in each and a few beside them.
_MAX_ENTRIES = 1 << 16
# numpy's own limit. It bounds the work; what a weight may have is for `check_shape` to say.
_MAX_DIMENSIONS = 64

_DTYPES = {dtype.name: dtype for dtype in DTYPES.values()}

# msgpack's headers. Small numbers are part of the first byte: kind, the byte for 0, how many numbers there are.
_SMALL = {"int": (0x00, 128), "map": (0x80, 16), "array": (0x90, 16), "str": (0xA0, 32)}
# Other numbers follow it: kind, the byte for the shortest width, the widths in bytes.
_LARGE = {
    "bin": (0xC4, (1, 2, 4)),
    "ext": (0xC7, (1, 2, 4)),
    "float": (0xCA, (4, 8)),
    "int": (0xCC, (1, 2, 4, 8)),
    "signed int": (0xD0, (1, 2, 4, 8)),
    "str": (0xD9, (1, 2, 4)),
    "array": (0xDC, (2, 4)),
    "map": (0xDE, (2, 4)),
}
# Extensions of 1, 2, 4, 8 and 16 bytes have a byte each.
_POWERS = {1 << power: 0xD4 + power for power in range(5)}


def _first_bytes() -> dict[int, tuple[str, int, int]]:
    """By a header's first byte: its kind, its number, and how many bytes hold the number instead; 0xC1 is unused."""
    table = {0xC0: ("nil", 0, 0), 0xC2: ("bool", 0, 0), 0xC3: ("bool", 1, 0)}
    table |= {first + n: (kind, n, 0) for kind, (first, count) in _SMALL.items() for n in range(count)}
    table |= {first + i: (kind, 0, n) for kind, (first, widths) in _LARGE.items() for i, n in enumerate(widths)}
    table |= {first: ("ext", n, 0) for n, first in _POWERS.items()}
    return table | dict.fromkeys(range(0xE0, 0x100), ("signed int", 0, 0))


_FIRST_BYTES = _first_bytes()
_TRUE = b"\xc3"


def flax_path(name: str) -> tuple[rules.Path, bool]:
    """Says where FlaxBert keeps a tensor, and whether it keeps it transposed: its kernels are [in, out].

    Args:
        name: the tensor's PyTorch name, with or without the prefix `bert.`.
    """
    *module, leaf = name.split(".")
    if leaf == "weight":
        last = module[-1] if module else ""
        if last == "LayerNorm":
            leaf = "scale"
        elif last.endswith(("_embeddings", "_embedding")):
            leaf = "embedding"
        else:
            leaf = "kernel"
    return (*module, leaf), leaf == "kernel"


def torch_name(path: rules.Path) -> str:
    """The PyTorch name of the tensor at a Flax path; the inverse of `flax_path`. Unknown leaves keep their name."""
    *module, leaf = path
    return ".".join([*module, "weight" if leaf in ("kernel", "scale", "embedding") else leaf])


@dataclasses.dataclass(frozen=True)
class TensorInPieces(TensorInfo):
    """A tensor that the file holds in pieces.

    Attributes:
        pieces: where each piece begins, in bytes, and how many elements it has; in order.
    """

    pieces: tuple[tuple[int, int], ...] = ()

    def _read_flat(self) -> np.ndarray:
        flat = np.empty(self.span, self.dtype)
        block, done = _BLOCK_BYTES // self.dtype.itemsize, 0
        for offset, count in self.pieces:
            for begin in range(0, count, block):
                size = min(block, count - begin)
                flat[done : done + size] = read_flat(self, offset + begin * self.dtype.itemsize, size)
                done += size
        return flat


def read_msgpack(path: Path) -> Contents:
    """Finds the tensors in a file of FlaxBert's; their data is not read.

    The tensors have PyTorch's names and shapes, in file order; kernels are described as the transposes they are. A
    tensor's `source` is its path in the file, joined by "/", which is how the index of a sharded checkpoint spells it.

    Raises:
        SourceError: the file can't be opened, or is not a regular file.
        CheckpointError: it is not a well-formed msgpack file, or holds something other than arrays of numbers.
    """
    with opened(path) as file:
        return Contents(FORMAT, _tensors(_Cursor(path, file)))


class _Cursor:
    """A place in a msgpack file. Nothing is read or skipped beyond its end, whatever length a header declares."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file = path, file
        self.position, self.end = 0, os.fstat(file.fileno()).st_size
        self.entries = 0

    def malformed(self, problem: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: not a Flax msgpack file ({problem}, at byte {self.position} of {self.end}); "
            "if it was downloaded, download it again"
        )

    def skip(self, count: int) -> None:
        if count > self.end - self.position:
            raise self.malformed(f"it ends inside something of {count} bytes")
        self.position += count
        self.file.seek(self.position)

    def take(self, count: int) -> bytes:
        data = self.file.read(min(count, self.end - self.position))
        if len(data) < count:
            raise self.malformed(f"it ends inside something of {count} bytes")
        self.position += count
        return data

    def header(self) -> tuple[str, int]:
        """Reads a header: its kind, and its number (a length, a number of entries, or the value)."""
        kind, number, width = _FIRST_BYTES.get(self.take(1)[0], ("invalid", 0, 0))
        if width:
            number = int.from_bytes(self.take(width), "big")
        return kind, number

    def expect(self, kind: str, what: str) -> int:
        """Reads a header of one kind and returns its number."""
        found, number = self.header()
        if found != kind:
            raise self.malformed(f"{what} is of msgpack type {found}, expected {kind}")
        return number

    def keys(self, count: int) -> Iterator[str]:
        """Reads the keys of a map, one at a time; the caller reads each value in between."""
        seen = set()
        for _ in range(count):
            self.entries += 1
            if self.entries > _MAX_ENTRIES:
                raise self.malformed(f"it has more than {_MAX_ENTRIES} entries, which no BERT has")
            key = self._text("a key", _MAX_KEY)
            if key in seen:
                raise self.malformed(f"a map has the key {key!r} twice")
            seen.add(key)
            yield key

    def _text(self, what: str, most: int) -> str:
        size = self.expect("str", what)
        if size > most:
            raise self.malformed(f"{what} has {size} bytes, expected at most {most}")
        try:
            return self.take(size).decode()
        except UnicodeDecodeError:
            raise self.malformed(f"{what} is not UTF-8 text") from None

    def array(self, where: str, size: int) -> "_Array":
        """Reads what an extension of `size` bytes, whose header was just read, says of its array, and skips the data.

        Args:
            where: the array's path, for messages.
            size: the extension's size, without the byte that says of which type it is.
        """
        number = self.take(1)[0]
        if number != _ARRAY:
            found = _OTHERS.get(number, f"a msgpack extension of type {number}")
            raise CheckpointError(f"{self.path}: {where!r} is {found}, expected an array; remove it and save again")
        end = self.position + size
        if self.expect("array", "an array's description") != 3:
            raise self.malformed(f"the description of {where!r} does not have 3 parts")
        rank = self.expect("array", "a shape")
        if rank > _MAX_DIMENSIONS:
            raise self.malformed(f"{where!r} has {rank} dimensions")
        shape = tuple(self.expect("int", "a dimension") for _ in range(rank))
        check_shape(self.path, where, shape)
        name = self._text("a dtype", _MAX_KEY)
        if name not in _DTYPES:
            raise CheckpointError(f"{self.path}: {where!r} has dtype {name!r}, which bertjax does not read")
        found, count = self.expect("bin", "an array's data"), math.prod(shape)
        if found != count * _DTYPES[name].itemsize or self.position + found != end:
            raise self.malformed(f"{where!r} of shape {list(shape)} and dtype {name} has {found} bytes of data")
        offset = self.position
        self.skip(found)
        return _Array(shape, _DTYPES[name], ((offset, count),))


class _Array(NamedTuple):
    """What the file says of an array, and where its pieces begin and how many elements they have."""

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: tuple[tuple[int, int], ...]


def _tensors(cursor: _Cursor) -> Mapping[str, TensorInfo]:
    """Walks the whole file."""
    start = what_it_is(cursor.file.read(512))
    if start:
        raise CheckpointError(f"{cursor.path}: {start}")
    cursor.file.seek(0)
    tensors: dict[str, TensorInfo] = {}
    for path, array in _walk(cursor, (), cursor.expect("map", "the whole")):
        tensor = _tensor(cursor.path, path, array)
        tensors[tensor.name] = tensor  # `torch_name` has an inverse, and so no two have one name
    if cursor.position != cursor.end:
        raise cursor.malformed("it goes on after its end")
    return tensors


def _walk(cursor: _Cursor, path: rules.Path, count: int) -> Iterator[tuple[rules.Path, _Array]]:
    """Yields the arrays in a map of `count` entries, whose header was just read."""
    if len(path) >= _MAX_DEPTH:
        raise cursor.malformed(f"its maps are more than {_MAX_DEPTH} deep")
    keys = cursor.keys(count)
    for key in keys:
        here = (*path, key)
        where = "/".join(here)
        kind, number = cursor.header()
        if key == _IN_PIECES and kind == "bool" and count == 3 and path:
            yield path, _in_pieces(cursor, "/".join(path), keys)
            continue
        if not key or "." in key or "/" in key:  # such a path would have more than one reading
            raise CheckpointError(f"{cursor.path}: {where!r} has the key {key!r}, expected a name without '.' or '/'")
        if kind == "map":
            yield from _walk(cursor, here, number)
        elif kind == "ext":
            yield here, cursor.array(where, number)
        else:
            raise CheckpointError(f"{cursor.path}: {where!r} is of msgpack type {kind}, expected an array or a map")


def _in_pieces(cursor: _Cursor, where: str, keys: Iterator[str]) -> _Array:
    """Reads an array in pieces: a map with a mark, which was just read, a shape and the pieces."""
    shape: tuple[int, ...] = ()
    pieces: tuple[_Array, ...] = ()
    found = []
    for key in keys:
        found.append(key)
        if key == "shape":
            shape = _numbered(cursor, lambda: cursor.expect("int", "a dimension"))
        elif key == "chunks":
            pieces = _numbered(cursor, lambda: cursor.array(where, cursor.expect("ext", "a piece of an array")))
        else:
            break
    if sorted(found) != ["chunks", "shape"]:
        raise cursor.malformed(f"{where!r} is an array in pieces with {found} beside the mark")
    check_shape(cursor.path, where, shape)
    dtypes = {piece.dtype for piece in pieces}
    places = tuple(place for piece in pieces for place in piece.pieces)
    if len(dtypes) != 1 or sum(size for _, size in places) != math.prod(shape):
        raise cursor.malformed(f"the pieces of {where!r} do not form an array of shape {list(shape)}")
    return _Array(shape, pieces[0].dtype, places)


_T = TypeVar("_T")


def _numbered(cursor: _Cursor, read: Callable[[], _T]) -> tuple[_T, ...]:
    """Reads a map whose keys are "0", "1" and so on, which is how Flax writes a tuple."""
    count = cursor.expect("map", "a tuple")
    values = {key: read() for key in cursor.keys(count)}
    missing = [str(i) for i in range(len(values)) if str(i) not in values]
    if missing:
        raise cursor.malformed(f"a tuple of {count} lacks the key {missing[0]!r}")
    return tuple(values[str(i)] for i in range(count))


def _tensor(file: Path, path: rules.Path, array: _Array) -> TensorInfo:
    """Describes an array in PyTorch's terms; refuses one that FlaxBert would call something else."""
    expected = flax_path(torch_name(path))[0]
    if path != expected:  # a kernel under another name would not be transposed
        raise CheckpointError(
            f"{file}: {'/'.join(path)!r} is not a name of FlaxBert's, expected {'/'.join(expected)!r}"
        )
    shape, strides = array.shape, None
    if path[-1] == "kernel" and len(shape) == 2:
        shape, strides = shape[::-1], (1, shape[1])
    source = "/".join(path)
    tensor = TensorInfo(torch_name(path), file, array.dtype, shape, array.pieces[0][0], strides, source=source)
    return TensorInPieces(**vars(tensor), pieces=array.pieces) if len(array.pieces) > 1 else tensor


def write_msgpack(path: Path, tensors: Iterable[TensorToWrite]) -> None:
    """Writes a file that FlaxBert loads, a few tensors in memory at a time.

    The tensors are written in the order given, except that those of one module stay together. The file is the one that
    Flax writes from the same nested dict. The data is flushed to the disk before this returns. Which parameters
    FlaxBert expects (no position ids, no decoder that is tied) is for the caller to know.

    Args:
        path: the file, which must not exist.
        tensors: the tensors, under their PyTorch names and in PyTorch's shapes.

    Raises:
        CheckpointError: two tensors' names leave no place for one of them.
        SourceError: the file can't be written, for instance for want of space.
    """
    tree = _tree(path, tensors)
    leaves = (functools.partial(_in_flax_order, tensor) for _, tensor in rules.flatten(tree))
    with new_file(path) as file:
        _write_map(file, tree, ahead(leaves))


def _tree(path: Path, tensors: Iterable[TensorToWrite]) -> dict:
    """The nested dict that Flax would have, of functions that make the data."""
    leaves: dict[rules.Path, TensorToWrite] = {}
    for tensor in tensors:
        place = flax_path(tensor.name)[0]
        other = leaves.setdefault(place, tensor)
        if other is not tensor:
            raise CheckpointError(
                f"{path}: {other.name!r} and {tensor.name!r} are both Flax's {'/'.join(place)!r}; leave one out"
            )
    for place, tensor in leaves.items():
        for end in range(1, len(place)):
            if place[:end] in leaves:
                raise CheckpointError(
                    f"{path}: {leaves[place[:end]].name!r} is in the way of {tensor.name!r}; leave one of them out"
                )
    return rules.unflatten(leaves.items())


def _in_flax_order(tensor: TensorToWrite) -> np.ndarray:
    """A tensor's data as Flax has it."""
    # Transposed before it is made contiguous: what comes from a Flax kernel is one already, so nothing is copied.
    array = np.asarray(tensor.make(), tensor.dtype)
    assert array.shape == tensor.shape, (tensor.name, array.shape, tensor.shape)
    transpose = flax_path(tensor.name)[1] and array.ndim == 2
    return contiguous(array.T if transpose else array)


def _write_map(file: BinaryIO, tree: Mapping, arrays: Iterator[np.ndarray]) -> None:
    """Writes nested maps, whose leaves' data come in the same order."""
    file.write(_header("map", len(tree)))
    for key, value in tree.items():
        file.write(_packed_text(key))
        if isinstance(value, Mapping):
            _write_map(file, value, arrays)
        else:
            _write_tensor(file, next(arrays))


def _write_tensor(file: BinaryIO, array: np.ndarray) -> None:
    if array.nbytes <= _PIECE_BYTES:
        _write_array(file, array)
        return
    flat, size = array.reshape(-1), max(1, _PIECE_BYTES // array.itemsize)
    file.write(_header("map", 3) + _packed_text(_IN_PIECES) + _TRUE)
    file.write(_packed_text("shape") + _header("map", array.ndim))
    for i, dimension in enumerate(array.shape):
        file.write(_packed_text(str(i)) + _header("int", dimension))
    file.write(_packed_text("chunks") + _header("map", -(-array.size // size)))
    for i, begin in enumerate(range(0, array.size, size)):
        file.write(_packed_text(str(i)))
        _write_array(file, flat[begin : begin + size])


def _write_array(file: BinaryIO, array: np.ndarray) -> None:
    shape = _header("array", array.ndim) + b"".join(_header("int", size) for size in array.shape)
    start = _header("array", 3) + shape + _packed_text(array.dtype.name) + _header("bin", array.nbytes)
    file.write(_header("ext", len(start) + array.nbytes) + bytes([_ARRAY]) + start)
    file.write(array.reshape(-1).view(np.uint8))


def _packed_text(text: str) -> bytes:
    data = text.encode()
    return _header("str", len(data)) + data


def _header(kind: str, number: int) -> bytes:
    """The shortest header of a kind that holds the number, as msgpack libraries choose it."""
    if kind == "ext" and number in _POWERS:
        return bytes([_POWERS[number]])
    first, count = _SMALL.get(kind, (0, 0))
    if number < count:
        return bytes([first + number])
    first, widths = _LARGE[kind]
    position, width = next((i, width) for i, width in enumerate(widths) if number < 1 << 8 * width)
    return bytes([first + position]) + number.to_bytes(width, "big")
