"""PyTorch checkpoints, read without torch: where in the file each tensor of a state dict lies.

There are two containers, both written by torch.save (torch/serialization.py):

- From torch 1.6 on a zip archive, all of whose members are stored: `<prefix>/data.pkl` describes the tensors, and
  `<prefix>/data/<key>` holds the numbers of one storage, which several tensors may share.
- Before, and on request, pickles one after another: a magic number, a version, facts of the writing machine, the
  object, the keys of the storages; then for each key a count of elements and the numbers.

The pickles are read as data by `opcodes`. Whatever the zip format says twice must agree, and the members must fill the
file without a gap, so that no two readers can see different files in one. Checksums are compared: that of data.pkl at
once, and that of a storage when the tensor that fills it is read.
"""

import dataclasses
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from bertjax.convert.opcodes import Malformed, Pickle, Storage, Tensor, interpret, kind, quote
from bertjax.convert.tensors import Contents, TensorInfo, check_ratio, check_shape, enumerate_problems, span, what_it_is
from bertjax.errors import CheckpointError
from bertjax.json_files import opened

ZIP, LEGACY = "PyTorch zip pickle", "PyTorch legacy pickle"

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001

# That of a BERT-large has 80 KB, and three times that with its optimiser's.
_MAX_PICKLE_BYTES = 16 << 20
# One per storage, and five; their entries in the directory take about 60 bytes each.
_MAX_MEMBERS = 1 << 16
_MAX_DIRECTORY_BYTES = 16 << 20
_MAX_NAME = 512
# Torch's own limit. A tensor of more is refused before anything looks at each of its dimensions.
_MAX_RANK = 64

_STATE_DICTS = ("state_dict", "model_state_dict")


class _Place(NamedTuple):
    """Where a storage's numbers lie in the file, in bytes, and their checksum; 0: it was not computed."""

    offset: int
    nbytes: int
    crc: int = 0


@dataclasses.dataclass(frozen=True)
class ChecksummedTensor(TensorInfo):
    """A tensor that fills a member of a zip archive.

    Attributes:
        crc: the member's CRC-32.
    """

    crc: int = 0

    def _read_flat(self) -> np.ndarray:
        data = super()._read_flat()
        if zlib.crc32(data.view(np.uint8)) != self.crc:
            raise CheckpointError(
                f"{self.file}: tensor {self.name!r} does not have the checksum that the archive says; it is damaged, "
                "download it again"
            )
        return data


class _Found(NamedTuple):
    """What a container holds: the object, where its storages lie, and the order of their bytes."""

    format: str
    value: object
    places: Mapping[str, _Place]
    big_endian: bool = False


def read_pickle(path: Path) -> Contents:
    """Finds the tensors of a state dict that torch.save wrote, in the order of the dict.

    The state dict may be the whole file, or stand in a dict under `state_dict` or `model_state_dict`; what stands
    beside it there is in `left_out` if it may hold tensors, and refused if it is one. Nothing that the file names is
    imported or called.

    Raises:
        SourceError: the file can't be read, or is not a regular file.
        CheckpointError: it is not a PyTorch checkpoint; is one of a kind that is not read (TorchScript, tar, whole
            modules, quantised or sparse tensors); is damaged; or holds something other than plain tensors.
    """
    try:
        with opened(path) as file:
            found = _open(file, os.fstat(file.fileno()).st_size)
        state, left_out = _state_dict(found.value)
    except Malformed as problem:
        raise CheckpointError(f"{path}: {problem}") from None
    tensors = _tensors(path, state, found)
    check_ratio(
        path, sum(tensor.nbytes for tensor in tensors.values()), sum(place.nbytes for place in found.places.values())
    )
    return Contents(found.format, tensors, left_out=left_out)


def _open(file: BinaryIO, size: int) -> _Found:
    start = file.read(512)
    if start.startswith(b"PK\x03\x04"):
        return _read_zip(file, size)
    if start.startswith(b"\x80"):
        return _read_legacy(file, size)
    raise Malformed(what_it_is(start) or _what_else(start))


def _what_else(start: bytes) -> str:
    if start[257:262] == b"ustar":
        return "this is a tar archive, perhaps of torch before 0.1.10; load it with torch and save it again"
    if start[8:10] == b'{"':
        return "this is a safetensors file renamed; call it model.safetensors"
    return "this is not a PyTorch checkpoint: neither a zip archive nor a pickle begins here"


# The zip container. Record layouts: PKWARE's APPNOTE.TXT, 4.3; all numbers are little-endian.

_LOCAL = struct.Struct("<4s2x2H4x3L2H")  # signature, flags, method, crc, packed, size, lengths of name and extra
_CENTRAL = struct.Struct("<4s4x2H4x3L3H8xL")  # the same, length of the comment, position of the local header
_END = struct.Struct(
    "<4s4H2LH"
)  # signature, this disk, directory's disk, members here, members, size, position, comment
_END64 = struct.Struct("<4sQ4x2L4Q")  # signature, size of the rest, then as above
_LOCATOR = struct.Struct("<4sLQL")  # signature, disk of the record above, its position, disks
_MAX32 = (1 << 32) - 1

_DESCRIPTOR, _UTF8 = 0x0008, 0x0800  # flags: sizes follow the data; the name is UTF-8


class _Member(NamedTuple):
    """A member as the central directory describes it; `header` is the position of its local header."""

    name: bytes
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    header: int

    def __str__(self) -> str:
        return f"member {quote(self.name.decode('utf-8', 'backslashreplace'))}"


def _read_zip(file: BinaryIO, size: int) -> _Found:
    directory, end = _directory(file, size)
    members = {member.name: member for member in directory}
    _check_names(members, directory)
    prefix = _prefix(members)
    _check_case(members, prefix)
    places = dict(_walk(file, directory, end))
    pickle = _read_member(file, members[prefix + b"data.pkl"], places, _MAX_PICKLE_BYTES)
    order = members.get(prefix + b"byteorder")
    order = _read_member(file, order, places, 8) if order else b"little"
    if order not in (b"little", b"big"):
        raise Malformed(f"the archive's byte order is {order!r}, expected 'little' or 'big'")
    found = interpret(pickle, 0, "data.pkl", identifier=5)
    if found.end != len(pickle):
        raise Malformed(f"data.pkl has {len(pickle) - found.end} bytes behind its end")
    data = prefix + b"data/"
    keys = {name.removeprefix(data).decode("latin-1"): places[name] for name in members if name.startswith(data)}
    return _Found(ZIP, found.value, keys, order == b"big")


def _check_names(members: Mapping[bytes, _Member], directory: list[_Member]) -> None:
    """Refuses names that others read differently: torch ignores their case, and takes them for C's strings."""
    if len({name.lower() for name in members}) != len(directory):
        raise Malformed("the archive names a member twice, if not in the same case; readers could see different files")
    for name, member in members.items():
        if b"\0" in name or b"\\" in name:
            raise Malformed(f"{member} has a NUL or a backslash in its name; readers could see different files")


def _check_case(members: Mapping[bytes, _Member], prefix: bytes) -> None:
    """Refuses a member that torch reads, whatever its case, and this module would not see."""
    for name, member in members.items():
        rest = name.removeprefix(prefix)
        lower = rest.lower()
        if rest != lower and (lower in (b"data.pkl", b"byteorder") or lower.startswith(b"data/")):
            raise Malformed(
                f"{member} is spelt with capitals, which torch never does; readers could see different files"
            )


def _read_at(file: BinaryIO, position: int, count: int) -> bytes:
    file.seek(position)
    data = file.read(count)
    if len(data) != count:
        raise Malformed("the archive is cut short or damaged")
    return data


def _end(file: BinaryIO, size: int) -> tuple[int, int, int, int]:
    """Returns how many members there are, the directory's size and position, and where it must end."""
    if size < _END.size or not (record := _read_at(file, size - _END.size, _END.size)).startswith(b"PK\5\6"):
        raise Malformed("the zip archive does not end with the record of its end; it is cut short, or bytes follow it")
    _, *disks, here, total, length, position, comment = _END.unpack(record)
    end = size - _END.size
    fields = (here, total, length, position)
    locator = end - _LOCATOR.size
    if locator >= _END64.size and _read_at(file, locator, 4) == b"PK\6\7":
        end = locator - _END64.size
        _, *where = _LOCATOR.unpack(_read_at(file, locator, _LOCATOR.size))
        signature, rest, *disks64, here, total, length, position = _END64.unpack(_read_at(file, end, _END64.size))
        wide, limits = (here, total, length, position), (0xFFFF, 0xFFFF, _MAX32, _MAX32)
        agree = all(old in (new, limit) for old, new, limit in zip(fields, wide, limits, strict=True))
        if where != [0, end, 1] or signature != b"PK\6\6" or rest != _END64.size - 12 or any(disks64) or not agree:
            raise Malformed("the records at the end of the zip archive contradict each other")
    if any(disks) or here != total or comment or position + length != end:
        raise Malformed(
            "the record at the end of the zip archive does not fit the file; bytes were added or are missing"
        )
    return total, length, position, end


def _directory(file: BinaryIO, size: int) -> tuple[list[_Member], int]:
    """Reads the central directory; returns it with its position."""
    total, length, position, _ = _end(file, size)
    if total > _MAX_MEMBERS or length > _MAX_DIRECTORY_BYTES:
        raise Malformed(f"the archive has {total} members in a directory of {length} bytes; no checkpoint has as many")
    data, at, members = _read_at(file, position, length), 0, []
    for _ in range(total):
        if at + _CENTRAL.size > length or data[at : at + 4] != b"PK\1\2":
            raise Malformed("the directory of the zip archive is damaged")
        _, flags, method, crc, packed, unpacked, name, extra, comment, header = _CENTRAL.unpack_from(data, at)
        at += _CENTRAL.size
        wide = _widen((unpacked, packed, header), data[at + name : at + name + extra])
        members.append(_Member(data[at : at + name], flags, method, crc, wide[1], wide[0], wide[2]))
        at += name + extra + comment
    if at != length:
        raise Malformed("the directory of the zip archive is damaged")
    return members, position


def _widen(fields: tuple[int, ...], extra: bytes) -> list[int]:
    """Replaces numbers that did not fit in 32 bits by those of the extra field for zip64."""
    if _MAX32 not in fields:
        return list(fields)
    at = 0
    while at + 4 <= len(extra):
        tag, length = struct.unpack_from("<HH", extra, at)
        if tag == 1:
            break
        at += 4 + length
    wide = extra[at + 4 : at + 4 + length] if at + 4 <= len(extra) else b""
    if len(wide) < 8 * fields.count(_MAX32):
        raise Malformed("a member of the zip archive has no size")
    values = iter(struct.unpack_from(f"<{len(wide) // 8}Q", wide))
    return [next(values) if field == _MAX32 else field for field in fields]


def _prefix(members: Mapping[bytes, _Member]) -> bytes:
    """The folder of the archive, with its slash."""
    pickles = [name for name in members if name.rpartition(b"/")[2] == b"data.pkl"]
    folders = {name.partition(b"/")[0] + b"/" for name in members}
    if {b"constants.pkl", b"model.json", b"code"} & {name.split(b"/", 2)[1] for name in members if b"/" in name}:
        raise Malformed("this is a TorchScript program, not weights; load it with torch.jit and save its state_dict()")
    if len(pickles) != 1:
        raise Malformed(
            f"the zip archive has {len(pickles)} members called data.pkl, expected one as torch.save writes"
        )
    prefix = pickles[0].removesuffix(b"data.pkl")
    if folders != {prefix}:
        raise Malformed("the members of the zip archive are not in one folder, as torch.save puts them")
    return prefix


def _walk(file: BinaryIO, directory: list[_Member], end: int) -> Iterator[tuple[bytes, _Place]]:
    """Yields where each member's data lies, after checking that the members fill the file from 0 to `end`."""
    members = sorted(directory, key=lambda member: member.header)
    ends = [member.header for member in members[1:]] + [end]
    if members and members[0].header:
        raise Malformed(f"{members[0].header} bytes stand before the zip archive; it may be two files in one")
    for member, following in zip(members, ends, strict=True):
        if member.method or member.packed != member.size:
            raise Malformed(
                f"{member} is compressed, which torch never does; unpack the archive and save it with torch"
            )
        if member.flags & ~(_DESCRIPTOR | _UTF8):
            raise Malformed(f"{member} is encrypted or otherwise special (flags {member.flags:#06x})")
        offset = _check_local(file, member, end)
        gap = following - offset - member.size
        if not 0 <= gap <= 24 or _read_at(file, following - gap, gap) not in _descriptors(member):
            raise Malformed(f"{member} does not end where the next begins; they overlap, or there are bytes between")
        # torch writes zeros on request: torch.serialization.set_crc32_options(False).
        yield member.name, _Place(offset, member.size, member.crc)


def _check_local(file: BinaryIO, member: _Member, end: int) -> int:
    """Compares a member's local header with its entry in the directory; returns where its data begins."""
    if member.header + _LOCAL.size > end:
        raise Malformed(f"{member} lies behind the end of the file")
    signature, flags, method, crc, packed, size, length, extra = _LOCAL.unpack(
        _read_at(file, member.header, _LOCAL.size)
    )
    rest = _read_at(file, member.header + _LOCAL.size, length + extra)
    later = bool(flags & _DESCRIPTOR) and crc == packed == size == 0  # as torch does
    if not later:
        size, packed = _widen((size, packed), rest[length:])
    same = (signature, flags, method, rest[:length]) == (b"PK\3\4", member.flags, member.method, member.name)
    if not same or not (later or (crc, packed, size) == (member.crc, member.packed, member.size)):
        raise Malformed(f"{member}: its local header and the directory contradict each other; the file is damaged")
    return member.header + _LOCAL.size + length + extra


def _descriptors(member: _Member) -> list[bytes]:
    """What may follow a member's data: its checksum and sizes, where they were not known before."""
    if not member.flags & _DESCRIPTOR:
        return [b""]
    forms = ["<LQQ"] if member.size > _MAX32 else ["<LLL", "<LQQ"]
    plain = [struct.pack(form, member.crc, member.packed, member.size) for form in forms]
    return plain + [b"PK\7\x08" + descriptor for descriptor in plain]


def _read_member(file: BinaryIO, member: _Member, places: Mapping[bytes, _Place], limit: int) -> bytes:
    if member.size > limit:
        raise Malformed(f"{member} has {member.size} bytes; at most {limit} are read")
    data = _read_at(file, *places[member.name][:2])
    if member.crc not in (0, zlib.crc32(data)):
        raise Malformed(f"{member} does not have the checksum that the archive says; it is damaged, download it again")
    return data


# The container of pickles one after another.


def _read_legacy(file: BinaryIO, size: int) -> _Found:
    file.seek(0)
    data = file.read(_MAX_PICKLE_BYTES)  # how long the pickles are shows only when they are read
    magic = interpret(data, 0, "the file")
    if type(magic.value) is not int or magic.value != _MAGIC:
        raise Malformed(f"this is a pickle, but not one of torch.save's: it holds {kind(magic.value)}")
    version = _next(data, magic)
    if type(version.value) is not int or version.value != _PROTOCOL:
        raise Malformed(f"the version of the file's format is {quote(version.value)}, expected {_PROTOCOL}")
    # The writer's byte order is in here, but torch writes the numbers themselves in little-endian order on any machine.
    machine = _next(data, version)
    content = _next(data, machine, identifier=6)
    keys = _next(data, content)
    if type(keys.value) is not list:
        raise Malformed(f"the keys of the storages are {kind(keys.value)}, expected a list")
    return _Found(LEGACY, content.value, _walk_storages(file, size, keys, content.storages))


def _next(data: bytes, before: Pickle, identifier: int = 0) -> Pickle:
    return interpret(data, before.end, "the file", identifier, before.left)


def _walk_storages(file: BinaryIO, size: int, keys: Pickle, storages: Mapping[str, Storage]) -> dict[str, _Place]:
    """Finds the storages' numbers, each behind a count of elements, up to the end of the file."""
    places: dict[str, _Place] = {}
    offset = keys.end
    for key in keys.value:
        if type(key) is not str or key not in storages or key in places:
            raise Malformed(f"the file lists storage {quote(key)}, which its tensors don't use or it listed before")
        file.seek(offset)
        count = int.from_bytes(file.read(8), "little", signed=True)
        place = places[key] = _Place(offset + 8, storages[key].nbytes)
        offset = place.offset + place.nbytes
        if offset > size:
            raise Malformed(f"the file ends inside storage {quote(key)}; the download did not finish")
        if count != storages[key].count:
            raise Malformed(f"storage {quote(key)} has {count} elements, but {storages[key].count} by its description")
    if len(places) != len(storages):
        raise Malformed(f"the file has {len(places)} of the {len(storages)} storages that it describes")
    if offset != size:
        raise Malformed(f"{size - offset} bytes follow the last storage; it may be two files in one")
    return places


# What both hold.


def _state_dict(value: object) -> tuple[dict, dict[str, str]]:
    """Finds the state dict in what a file holds; returns it, and why what stands beside it is left out."""
    if not isinstance(value, dict):
        raise Malformed(f"the file holds {kind(value)}, expected a dict of tensors; save model.state_dict()")
    nested = [key for key in _STATE_DICTS if isinstance(value.get(key), dict)]
    if len(nested) == 1:
        reason = f"stands beside {nested[0]!r}"
        _refuse_tensors_beside(value, nested[0])
        beside = (key for key in value if key != nested[0] and isinstance(value[key], (dict, list, tuple)))
        return value[nested[0]], {str(key): reason for key in beside}
    if not any(isinstance(entry, Tensor) for entry in value.values()):
        keys = enumerate_problems([quote(key) for key in value], limit=20) or "nothing"
        wanted = " and ".join(nested) or "no state dict"
        raise Malformed(f"the file holds a dict with {wanted}, expected one state dict; its keys are: {keys}")
    return value, {}


def _refuse_tensors_beside(value: dict, nested: str) -> None:
    """Refuses tensors at the top of a file that holds a state dict as well: they may be another model."""
    found = [quote(key) for key, entry in value.items() if isinstance(entry, Tensor)]
    if found:
        listed = enumerate_problems(found, limit=20)
        raise Malformed(
            f"tensors stand beside {nested!r}, which may be another model: {listed}; save one of the two alone"
        )


def _tensors(path: Path, state: dict, found: _Found) -> dict[str, TensorInfo]:
    """Checks every entry of a state dict, and reports all faults together."""
    tensors, problems = {}, []
    for name, entry in state.items():
        try:
            tensors[name] = _info(path, name, entry, found)
        except (Malformed, CheckpointError) as problem:
            problems.append(str(problem).removeprefix(f"{path}: "))
    if problems:
        raise CheckpointError(f"{path}: {enumerate_problems(problems)}")
    return tensors


def _info(path: Path, name: object, entry: object, found: _Found) -> TensorInfo:
    if type(name) is not str or not 0 < len(name) <= _MAX_NAME:
        raise Malformed(f"a tensor is called {quote(name)}, expected a text of up to {_MAX_NAME} characters")
    if not isinstance(entry, Tensor):
        raise Malformed(f"{name!r} is {kind(entry)}, expected a tensor; save model.state_dict() alone")
    storage, shape, strides = entry.storage, entry.shape, entry.strides
    if not (_are_sizes(shape) and _are_sizes(strides) and len(shape) == len(strides) and _are_sizes((entry.offset,))):
        raise Malformed(f"tensor {name!r} has an offset, shape or strides that torch never writes: negative or uneven")
    check_shape(path, name, shape)
    place = found.places.get(storage.key)
    if place is None:
        raise Malformed(f"tensor {name!r} lies in storage {quote(storage.key)}, which the file does not have")
    if place.nbytes != storage.nbytes:
        raise Malformed(
            f"tensor {name!r} lies in storage {quote(storage.key)}, which has {place.nbytes} bytes, "
            f"but {storage.nbytes} by its description"
        )
    strides = _normal(shape, strides)
    offset = entry.offset if 0 not in shape else 0  # torch cuts empty tensors out anywhere
    if offset + span(shape, strides) > storage.count:
        raise Malformed(f"tensor {name!r} reaches beyond the {storage.count} elements of its storage")
    start = place.offset + offset * storage.dtype.itemsize
    info = TensorInfo(name, path, storage.dtype, shape, start, strides, found.big_endian)
    if place.crc and info.span == storage.count:
        return ChecksummedTensor(**vars(info), crc=place.crc)
    return info


def _are_sizes(values: object) -> bool:
    return (
        type(values) is tuple
        and len(values) <= _MAX_RANK
        and all(type(value) is int and value >= 0 for value in values)
    )


def _normal(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...] | None:
    """Returns None for strides of C order; those of dimensions of size 1 mean nothing."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride != expected and 0 not in shape:
            return strides
        expected *= size
    return None
