"""Tensors in files, whatever the format: where they are, how they are read, and how a file that holds them is opened.

Every reader (safetensors, PyTorch pickles, msgpack, TensorFlow) finds where in a file each tensor's numbers lie, and
leaves the reading to `TensorInfo.read`. So no format needs more memory than the tensor that is asked for.
"""

import dataclasses
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import ml_dtypes
import numpy as np

from bertjax.errors import CheckpointError, SourceError

if TYPE_CHECKING:
    from bertjax.convert.layout import Layout

#: Dtypes by safetensors' names, in the order in which the safetensors library lays dtypes out in a file (it begins with
#: the last). What is not here (8-bit floats, packed and unsigned integers) has no place in a BERT checkpoint.
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
_MAX_ELEMENTS = 1 << 48

# Tensors may share numbers, or be compressed, so a small file could ask for any amount of memory. No checkpoint comes
# near this ratio: 24 layers that share their weights have one of 24. Below the floor it does not matter.
_MAX_RATIO = 64
_RATIO_FLOOR = 1 << 26


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file: where it is and what it looks like, without its data.

    Attributes:
        name: the tensor's PyTorch name.
        file: the file that holds it.
        dtype: its dtype, one of `DTYPES`.
        shape: its shape, in PyTorch's order of dimensions.
        offset: where its first element lies in the file, in bytes.
        strides: distance between neighbours along each dimension, in elements, none negative; None: in C order. A
            transposed kernel is read without copying it.
        big_endian: whether the file holds the most significant byte first.
        source: what the file calls it, where that is not `name`.
    """

    name: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...] | None = None
    big_endian: bool = False
    source: str | None = None

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return self.count * self.dtype.itemsize

    @property
    def span(self) -> int:
        """Number of elements in the file from the first to the last; what a reader must find there."""
        return span(self.shape, self.strides)

    def read(self) -> np.ndarray:
        """Reads the tensor's data; the array may be a transposed view, so it need not be contiguous.

        Raises:
            SourceError: the file ends early or can't be read.
        """
        flat = self._read_flat()
        if self.big_endian:
            flat = flat.view(f"u{self.dtype.itemsize}").byteswap().view(self.dtype)
        if self.strides is None or not self.count:
            return flat.reshape(self.shape)
        strides = [stride * self.dtype.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(flat, self.shape, strides)

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Reads the data by blocks of rows, which are still in the CPU's cache when they are passed on.

        Yields:
            Which rows, and their data [rows, ...], which the next block overwrites. For what is no plain matrix, one
            block of everything; see `read`, also for the errors.
        """
        if len(self.shape) != 2 or self.strides is not None or self.big_endian or type(self) is not TensorInfo:
            yield slice(None), self.read()
            return
        rows, columns = self.shape
        height = _TILE * max(1, _BLOCK // (_TILE * max(columns, 1) * self.dtype.itemsize))
        try:
            with open(self.file, "rb", buffering=0) as file:
                file.seek(self.offset)
                for start in range(0, rows, height):
                    count = min(height, rows - start)
                    block = _scratch(count * columns * self.dtype.itemsize)
                    if file.readinto(block) != len(block):
                        raise _cut_off(self)
                    yield slice(start, start + count), block.view(self.dtype).reshape(count, columns)
        except OSError as problem:
            raise SourceError(f"{self.file}: can't be read ({problem.strerror or problem})") from None

    def _read_flat(self) -> np.ndarray:
        """The elements as the file holds them, from the first to the last: [span]."""
        return read_flat(self, self.offset, self.span)


def read_flat(tensor: TensorInfo, offset: int, count: int) -> np.ndarray:
    """Reads elements of a tensor's file; see `TensorInfo.read` for the errors.

    Args:
        tensor: whose file and dtype it is.
        offset: where to begin, in bytes.
        count: how many elements.
    """
    try:
        with open(tensor.file, "rb") as file:
            data = np.fromfile(file, tensor.dtype, count, offset=offset)
    except OSError as problem:
        raise SourceError(f"{tensor.file}: can't be read ({problem.strerror or problem})") from None
    except MemoryError:
        size = f"{count * tensor.dtype.itemsize:,}"
        raise SourceError(
            f"{tensor.file}: tensor {tensor.name!r} needs {size} bytes, more memory than there is"
        ) from None
    if data.size != count:
        raise _cut_off(tensor)
    return data


# For each thread a buffer that is used again and again: the memory of a fresh one has to be paged in.
_buffers = threading.local()


def _scratch(nbytes: int) -> np.ndarray:
    """This thread's buffer, uint8 [nbytes], which the next call returns again."""
    buffer = getattr(_buffers, "buffer", None)
    if buffer is None or len(buffer) < nbytes:
        buffer = _buffers.buffer = np.empty(nbytes, np.uint8)
    return buffer[:nbytes]


def _cut_off(tensor: TensorInfo) -> SourceError:
    return SourceError(f"{tensor.file}: ends inside tensor {tensor.name!r}; was it changed while being read?")


def span(shape: tuple[int, ...], strides: tuple[int, ...] | None) -> int:
    """Elements from the first to the last of a tensor that is laid out with these strides."""
    if strides is None or 0 in shape:
        return math.prod(shape)
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def check_shape(path: Path, name: str, shape: tuple[int, ...]) -> None:
    """Refuses a shape that no weight has. Raises `CheckpointError`.

    A dimension of zero hides any size of the others from a check of the file's length, so it counts as one.
    """
    if len(shape) > _MAX_RANK or math.prod(size or 1 for size in shape) >= _MAX_ELEMENTS:
        raise CheckpointError(f"{path}: tensor {name!r} has the impossible shape {list(shape)[:20]}")


def check_ratio(path: Path, needed: int, held: int) -> None:
    """Refuses tensors that take far more memory than their files have bytes. Raises `CheckpointError`."""
    if needed > max(_RATIO_FLOOR, _MAX_RATIO * held):
        raise CheckpointError(
            f"{path}: its tensors take {needed:,} bytes, {needed // max(held, 1):,} times what it holds; no model "
            "needs that, so this one was made to exhaust the memory"
        )


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a reader found in one file.

    Attributes:
        format: what the file is, in words.
        tensors: every tensor by its PyTorch name, in file order.
        metadata: the free-form strings of the file's header; safetensors only.
        left_out: by name in the file, why a tensor is not among `tensors` (an optimiser's slots).
    """

    format: str
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class WeightFiles(Contents):
    """The tensors of a checkpoint, in one file or several.

    Attributes:
        folder: the folder that holds the files.
        files: base names of the files that hold the tensors.
        index: base name of the index that divides the tensors among the files, or None.
        layout: how the checkpoint spelt its names that these weights were once converted from, or None.
    """

    folder: Path = Path()
    files: tuple[str, ...] = ()
    index: str | None = None
    layout: "Layout | None" = None

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclasses.dataclass(frozen=True)
class TensorToWrite:
    """A tensor to be written: what it looks like, and a function that makes its data when its turn comes."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def data(self) -> np.ndarray:
        """The tensor's data, in C order."""
        data = contiguous(self.make().astype(self.dtype, copy=False))
        assert data.shape == self.shape, (self.name, data.shape, self.shape)
        return data


_T = TypeVar("_T")


#: How many jobs are done ahead; with the one whose result is used, so many tensors and one are in memory at a time.
AHEAD = 4


def ahead(jobs: Iterable[Callable[[], _T]]) -> Iterator[_T]:
    """Does jobs and yields their results in order, each while the next four are done by other threads.

    So tensors are read, checked and transposed while the one before is written; numpy lets go of the interpreter's
    lock for all of it.
    """
    with ThreadPoolExecutor(AHEAD) as pool:
        waiting: deque[Future] = deque()
        for job in jobs:
            waiting.append(pool.submit(job))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


# Rows and columns of the square tiles in which a matrix is transposed, by way of a buffer that a CPU's cache holds. Its
# rows are a little longer than a tile: in rows of a power of two of bytes, as weights have, a column's elements compete
# for the same few lines of the cache. Together the two make it 2 to 4 GB/s instead of 0.4 (float32, one core).
_TILE, _PAD = 256, 16
# Bytes that are read at a time: rows for some tiles.
_BLOCK = 1 << 20


def assign(target: np.ndarray, source: np.ndarray) -> None:
    """Does `target[...] = source`, several times as fast where one of two matrices is laid out across the other.

    Args:
        target: where to write; of any dtype.
        source: an array of the same shape.
    """
    if target.ndim != 2 or min(target.shape) < _TILE or _runs_down(target) == _runs_down(source):
        target[...] = source
        return
    if _runs_down(target):
        target, source = target.T, source.T
    buffer = np.empty((_TILE, _TILE + _PAD), source.dtype)
    rows, columns = target.shape
    for row in range(0, rows, _TILE):
        for column in range(0, columns, _TILE):
            tile = source[row : row + _TILE, column : column + _TILE].T
            part = buffer[: tile.shape[0], : tile.shape[1]]
            part[...] = tile
            target[row : row + _TILE, column : column + _TILE] = part.T


def _runs_down(matrix: np.ndarray) -> bool:
    """Whether neighbours in memory stand in a column."""
    return matrix.strides[0] < matrix.strides[1]


def contiguous(array: np.ndarray) -> np.ndarray:
    """The array in C order; itself, where it is that already."""
    if array.flags.c_contiguous:
        return array
    result = np.empty(array.shape, array.dtype)
    assign(result, array)
    return result


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


# Characters in one problem, and in all of them: every tensor of a BERT-large has room.
_MAX_PROBLEM, _MAX_MESSAGE = 2000, 1 << 17


def enumerate_problems(problems: list[str], limit: int = 1000) -> str:
    """Joins problems for a message: all those of any BERT, but no gigabyte for a file made to give a million."""
    shown, length = [], 0
    for problem in problems[:limit]:
        shown.append(problem if len(problem) <= _MAX_PROBLEM else problem[:_MAX_PROBLEM] + "...")
        length += len(shown[-1])
        if length > _MAX_MESSAGE:
            break
    rest = len(problems) - len(shown)
    return "; ".join(shown) + (f"; and {rest} more" if rest > 0 else "")


def what_it_is(start: bytes) -> str | None:
    """Names the usual things that stand where weights were meant to be.

    Args:
        start: the first bytes of the file, 512 or all of them.
    """
    if not start:
        return "the file is empty; the download did not finish"
    if start.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not the weights; run `git lfs pull` in the clone"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "this is an HTML page, not weights; the download fetched an error or a log-in page"
    return None
