"""Tables of sorted keys: the format of a TensorFlow checkpoint's index.

The format is LevelDB's (google/leveldb, doc/table_format.md), of which TensorFlow has its own writer
(tensorflow/core/lib/io/table_builder.cc). A footer points to an index block, which points to the data blocks; each
block is followed by its compression and its CRC-32C. All of a table is read here, never a part of it, so what only
speeds up a search (restart points, the metaindex with its filters) is not looked at.
"""

import stat
from collections.abc import Iterator
from pathlib import Path

from bertjax.convert.tensors import what_it_is
from bertjax.errors import CheckpointError, SourceError

_MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")
_FOOTER = 48
_TRAILER = 5  # of a block: one byte of compression, four of CRC
_COMPRESSIONS = {1: "snappy", 2: "zstd"}

# 24 layers with Adam's slots are 1,200 keys of at most 100 bytes, and 50 KB. These bounds leave room for any BERT, and
# keep the worst of files to a second and some megabytes: a key may share its beginning with the one before, so it can
# cost three bytes in the file however long it is.
_MAX_FILE = 1 << 18
_MAX_KEYS = 1 << 13
_MAX_KEY = 1 << 9


def read_table(path: Path) -> dict[bytes, bytes]:
    """Reads all keys and values of a table, in the order of the keys.

    Every data block's checksum is verified.

    Raises:
        SourceError: the file can't be read.
        CheckpointError: it is not a well-formed table, is damaged or compressed, or is far larger than any index.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise SourceError(f"{path}: is not a regular file")
        with open(path, "rb") as file:
            data = file.read(_MAX_FILE + 1)
        return _parse(data)
    except SourceError:
        raise
    except OSError as problem:
        raise SourceError(f"{path}: can't be read ({problem.strerror or problem})") from None
    except ValueError as problem:
        raise CheckpointError(f"{path}: {problem}") from None


def is_table(path: Path) -> bool:
    """Whether a file ends as a table does; false where it can't be read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode) or path.stat().st_size < _FOOTER:
            return False
        with open(path, "rb") as file:
            file.seek(-len(_MAGIC), 2)
            return file.read() == _MAGIC
    except OSError:
        return False


def read_varint(data: bytes, position: int, end: int) -> tuple[int, int]:
    """Reads an unsigned integer of up to 64 bits, seven to a byte with the lowest first, as tables and protobuf do.

    Args:
        data: what holds it.
        position: where it begins.
        end: where it must have ended.

    Returns:
        The integer, and the position after it.

    Raises:
        ValueError: it does not end, or does not fit.
    """
    value = 0
    for at in range(position, min(end, position + 10)):
        byte = data[at]
        value |= (byte & 0x7F) << 7 * (at - position)
        if byte < 0x80:
            if value >> 64:
                break
            return value, at + 1
    raise ValueError(f"a number at byte {position} is cut off or exceeds 64 bits")


def _parse(data: bytes) -> dict[bytes, bytes]:
    if len(data) > _MAX_FILE:
        raise ValueError(f"is larger than {_MAX_FILE:,} bytes, which no BERT's index is")
    if len(data) < _FOOTER or not data.endswith(_MAGIC):
        raise ValueError(what_it_is(data[:512]) or "is not a TensorFlow index, or is cut off; fetch it again")
    table: dict[bytes, bytes] = {}
    last, covered = None, 0
    for offset, size in _blocks(data):
        # Blocks that overlap could make a small file a table of any size.
        if offset < covered:
            raise ValueError(f"the block at byte {offset} overlaps the one before; the file is damaged")
        covered = offset + size + _TRAILER
        for key, value in _entries(data, offset, size):
            if last is not None and key <= last:
                raise ValueError(f"key {key!r} is not in order after {last!r}; the file is damaged")
            if len(table) == _MAX_KEYS:
                raise ValueError(f"has more than {_MAX_KEYS:,} keys, which no BERT's index has")
            table[key] = value
            last = key
    return table


def _blocks(data: bytes) -> Iterator[tuple[int, int]]:
    """Where the data blocks are."""
    footer = len(data) - _FOOTER
    _, position = _handle(data, footer, len(data))  # the metaindex
    index, _ = _handle(data, position, len(data))
    for _, value in _entries(data, *index):
        yield _handle(value, 0, len(value))[0]


def _handle(data: bytes, position: int, end: int) -> tuple[tuple[int, int], int]:
    """Reads where a block is, offset and size; returns the position after it too."""
    offset, position = read_varint(data, position, end)
    size, position = read_varint(data, position, end)
    return (offset, size), position


def _entries(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Reads a block's keys and values; each key leaves out what it has in common with the one before."""
    block = _block(data, offset, size)
    restarts = int.from_bytes(block[-4:], "little")
    end = len(block) - 4 * (restarts + 1)
    # A block without a key is never written, and would not count against the bound on the number of keys.
    if end <= 0:
        raise ValueError(f"the block at byte {offset} holds no keys; the file is damaged")
    position, key = 0, b""
    while position < end:
        shared, position = read_varint(block, position, end)
        unshared, position = read_varint(block, position, end)
        length, position = read_varint(block, position, end)
        if shared > len(key) or unshared + length > end - position:
            raise ValueError(f"the block at byte {offset} is malformed at its byte {position}; the file is damaged")
        if shared + unshared > _MAX_KEY:
            raise ValueError(f"a key has {shared + unshared} bytes, expected at most {_MAX_KEY}")
        key = key[:shared] + block[position : position + unshared]
        position += unshared
        yield key, block[position : position + length]
        position += length


def _block(data: bytes, offset: int, size: int) -> bytes:
    """A block's contents, once its checksum is verified."""
    end = offset + size
    if end + _TRAILER > len(data) - _FOOTER:
        raise ValueError(f"a block ends at byte {end}, outside the file's {len(data)}; the file is damaged")
    # The checksum covers the compression too.
    if masked_crc32c(data[offset : end + 1]) != int.from_bytes(data[end + 1 : end + _TRAILER], "little"):
        raise ValueError(f"the block at byte {offset} fails its checksum; the file is damaged, fetch it again")
    if compression := data[end]:
        name = _COMPRESSIONS.get(compression, f"compression {compression}")
        raise ValueError(f"is compressed with {name}, expected none as TensorFlow writes; save the checkpoint again")
    return data[offset:end]


def _crc_table() -> tuple[int, ...]:
    table = []
    for crc in range(256):
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)  # Castagnoli's polynomial, lowest bit first
        table.append(crc)
    return tuple(table)


_CRC_TABLE = _crc_table()


def masked_crc32c(data: bytes) -> int:
    """The CRC-32C as tables store it: rotated and shifted, so that a CRC of data that holds CRCs stays a good one."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC_TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
