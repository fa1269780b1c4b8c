"""TensorFlow 1 checkpoints of google-research/bert, read without TensorFlow.

A checkpoint `bert_model.ckpt` is `bert_model.ckpt.index`, a table of the variables (`sstable`), and their bytes in
`bert_model.ckpt.data-00000-of-00001`; `.meta`, the graph, is not needed. The table's values are protobuf messages
(tensorflow/core/protobuf/tensor_bundle.proto, and tensor_shape.proto and types.proto in core/framework). A variable
also has a checksum, which is not verified: that would read all of the data when a checkpoint is opened.
"""

import dataclasses
import itertools
import math
import os
import re
import stat
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from bertjax.convert.sstable import is_table, read_table, read_varint
from bertjax.convert.tensors import DTYPES, Contents, TensorInfo, check_shape, enumerate_problems, inside, what_it_is
from bertjax.errors import CheckpointError, SourceError

# DataType in types.proto.
_DTYPES = {1: "F32", 2: "F64", 3: "I32", 4: "U8", 5: "I16", 6: "I8", 9: "I64", 10: "BOOL", 14: "BF16", 19: "F16"}

# Protobuf's wire types, and the fields of the messages: number, then name and wire type.
_VARINT, _BYTES = 0, 2
_FIXED = {1: 8, 5: 4}  # bytes
_Fields = Mapping[int, tuple[str, int]]
_HEADER: _Fields = {1: ("num_shards", _VARINT), 2: ("endianness", _VARINT), 3: ("version", _BYTES)}
_VERSION: _Fields = {2: ("min_consumer", _VARINT)}
_ENTRY: _Fields = {
    1: ("dtype", _VARINT),
    2: ("shape", _BYTES),
    3: ("shard_id", _VARINT),
    4: ("offset", _VARINT),
    5: ("size", _VARINT),
    7: ("slices", _BYTES),
}
_SHAPE: _Fields = {2: ("dim", _BYTES), 3: ("unknown_rank", _VARINT)}
_DIM: _Fields = {1: ("size", _VARINT)}

_BUNDLE_VERSION = 1  # kTensorBundleVersion, the only one there has been
_MAX_SHARDS = 99_999  # a file's name has five digits for them

_DATA = re.compile(r"(.+)\.data-[0-9]{5}-of-[0-9]{5}", re.DOTALL)

# What optimisers keep beside the weights, by the last part of a name: google-research/bert's AdamWeightDecayOptimizer
# and NVIDIA's LAMB, tf.train.AdamOptimizer, and the state of a schedule or of automatic loss scaling.
_OPTIMISER = re.compile(
    r"(adam|lamb)_[mv](_\d+)?|(Adam|AdamWeightDecayOptimizer|LAMBOptimizer)(_\d+)?|beta[12]_power(_\d+)?"
    r"|global_step|learning_rate|(current_)?loss_scale|good_steps",
    re.ASCII,
)

# Heads, by what their names end with. Their weights are [out, in] in TensorFlow too.
_HEADS = {
    "cls/predictions/output_bias": "cls/predictions/bias",
    "cls/seq_relationship/output_weights": "cls/seq_relationship/weight",
    "cls/seq_relationship/output_bias": "cls/seq_relationship/bias",
    "cls/squad/output_weights": "qa_outputs/weight",
    "cls/squad/output_bias": "qa_outputs/bias",
}
_CLASSIFIER = {"output_weights": "classifier/weight", "output_bias": "classifier/bias"}
_LAYER = re.compile(r"layer_[0-9]+")
_KERAS_NORM = re.compile(r"layer_normalization(_[0-9]+)?")
_NORM = {"gamma": "weight", "beta": "bias"}


@dataclasses.dataclass(frozen=True)
class _Variable:
    """A variable as the index describes it: a BundleEntryProto."""

    name: str
    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int

    @property
    def end(self) -> int:
        return self.offset + self.size

    @property
    def leaf(self) -> str:
        return self.name.rpartition("/")[2]


def find_prefix(path: Path) -> Path | None:
    """Finds the TensorFlow 1 checkpoint that a path means.

    Args:
        path: a folder, one of a checkpoint's files, or a checkpoint's prefix, which is no file.

    Returns:
        The checkpoint's prefix, for `read_checkpoint`; None: there is no such checkpoint.

    Raises:
        SourceError: there are several, or there is a part of one without its index; or what may be one of the old
            format is a link out of the folder.
        CheckpointError: it is in the format that TensorFlow wrote before version 0.12.
    """
    if os.path.isdir(path):
        return _find_in_folder(path)
    data = _DATA.fullmatch(path.name)
    prefix = path.parent / data[1] if data else path.with_suffix("") if path.suffix in (".index", ".meta") else path
    index = _index(prefix)
    if os.path.exists(index):
        return prefix
    _refuse_old_format(prefix)
    parts = [prefix.parent / name for name in _names(prefix.parent) if _is_part(name, prefix.name)]
    if parts:
        raise SourceError(f"{parts[0]}: is a part of a TensorFlow checkpoint that lacks {index.name}; put it beside")
    return None


def _find_in_folder(folder: Path) -> Path | None:
    names = _names(folder)
    indices = [name for name in names if name.endswith(".index")]
    if len(indices) > 1:
        found = enumerate_problems(indices, 20)
        raise SourceError(f"{folder}: has {len(indices)} TensorFlow checkpoints ({found}); name the file of one")
    if indices:
        return folder / indices[0].removesuffix(".index")
    for name in names:
        # Other programs have a .meta too.
        if _DATA.fullmatch(name) or re.fullmatch(r".*ckpt.*\.meta", name, re.DOTALL):
            return find_prefix(folder / name)
        if "ckpt" in name:
            _refuse_old_format(folder / name)
    return None


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []  # the caller finds nothing in it, and says so


def _is_part(name: str, prefix: str) -> bool:
    data = _DATA.fullmatch(name)
    return name == f"{prefix}.meta" or (data is not None and data[1] == prefix)


def _index(prefix: Path) -> Path:
    return prefix.parent / f"{prefix.name}.index"


def _refuse_old_format(path: Path) -> None:
    """Refuses a file of TensorFlow's first format, which is a table with the variables' bytes inside."""
    if is_table(inside(path.parent, path.name)):
        raise CheckpointError(
            f"{path}: is in TensorFlow's V1 format, of before 0.12; in TensorFlow, restore it and save it again with "
            "tf.compat.v1.train.Saver"
        )


def read_checkpoint(prefix: Path) -> Contents:
    """Reads where the variables of a TensorFlow 1 checkpoint are, and their PyTorch names.

    Names that are not google-research/bert's are kept, with dots for slashes. Optimiser state is left out.

    Args:
        prefix: the checkpoint's path without `.index` or `.data-...`; see `find_prefix`.

    Raises:
        SourceError: a file is missing or can't be read.
        CheckpointError: the index is malformed, or does not fit the data; it is TensorFlow 2's; two variables have
            one PyTorch name; a variable is partitioned, or has a dtype that no BERT has.
    """
    index = inside(prefix.parent, _index(prefix).name)
    table = read_table(index)
    _refuse_object_graph(index, table)
    shards, big_endian = _read_header(index, table.pop(b"", None))
    variables, problems = [], []
    for key, value in table.items():
        try:
            variables.append(_read_variable(index, key, value, shards))
        except ValueError as problem:
            problems.append(str(problem).removeprefix(f"{index}: "))
    variables.sort(key=lambda variable: (variable.shard, variable.offset, variable.end))
    weights = [variable for variable in variables if not _OPTIMISER.fullmatch(variable.leaf)]
    problems += _overlaps(variables) + _weight_problems(weights) + _collisions(weights)
    if problems:
        raise CheckpointError(f"{index}: {len(problems)} problem(s) with the variables: {enumerate_problems(problems)}")
    files = _data_files(prefix, variables, shards)
    tensors = [_tensor(weight, files[weight.shard], big_endian) for weight in weights]
    left_out = {each.name: "optimiser state" for each in variables if _OPTIMISER.fullmatch(each.leaf)}
    return Contents("TensorFlow 1 checkpoint", {each.name: each for each in tensors}, left_out=left_out)


def _refuse_object_graph(index: Path, table: Mapping[bytes, bytes]) -> None:
    if b"_CHECKPOINTABLE_OBJECT_GRAPH" in table or any(key.endswith(b"/.ATTRIBUTES/VARIABLE_VALUE") for key in table):
        raise CheckpointError(
            f"{index}: is a TensorFlow 2 object checkpoint, whose names are attributes of the program that wrote it, "
            "not BERT's; load it in that program and save the model as safetensors or with tf.compat.v1.train.Saver"
        )


def _read_header(index: Path, value: bytes | None) -> tuple[int, bool]:
    """Reads a BundleHeaderProto: the number of shards, and whether the data is big-endian."""
    if value is None:
        raise CheckpointError(f"{index}: is a table without a header, so not the index of a TensorFlow checkpoint")
    try:
        header = _message(value, _HEADER)
        version = _message(_bytes(header, "version"), _VERSION)
    except ValueError as problem:
        raise CheckpointError(f"{index}: the header is malformed ({problem}); fetch the file again") from None
    shards, endianness, consumer = (
        _number(header, "num_shards"),
        _number(header, "endianness"),
        _number(version, "min_consumer"),
    )
    if not 1 <= shards <= _MAX_SHARDS:
        raise CheckpointError(f"{index}: the header gives {shards} data files, expected 1 to {_MAX_SHARDS}")
    if endianness not in (0, 1):
        raise CheckpointError(f"{index}: the header gives endianness {endianness}, expected 0 or 1")
    if consumer > _BUNDLE_VERSION:
        raise CheckpointError(f"{index}: has format version {consumer}, expected at most {_BUNDLE_VERSION}")
    return shards, endianness == 1


def _read_variable(index: Path, key: bytes, value: bytes, shards: int) -> _Variable:
    """Reads a BundleEntryProto. Raises `ValueError`, which names the variable."""
    if key.startswith(b"\0"):
        raise ValueError(f"{key!r}: is a slice of a partitioned variable")
    try:
        name = key.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{key!r}: is not UTF-8") from None
    try:
        entry = _message(value, _ENTRY)
        shape = _shape(_bytes(entry, "shape"))
    except ValueError as problem:
        raise ValueError(f"{name!r}: the entry is malformed ({problem})") from None
    if "slices" in entry:
        raise ValueError(f"{name!r}: is partitioned, which is not read; save it again without a partitioner")
    dtype, shard, offset, size = (_number(entry, field) for field in ("dtype", "shard_id", "offset", "size"))
    if not 0 <= shard < shards:
        raise ValueError(f"{name!r}: lies in data file {shard} of {shards}, counted from 0")
    if offset < 0 or size < 0 or min(shape, default=0) < 0:
        raise ValueError(f"{name!r}: has offset {offset}, size {size} and shape {list(shape)[:20]}; one is negative")
    check_shape(index, name, shape)
    return _Variable(name, dtype, shape, shard, offset, size)


def _shape(data: bytes) -> tuple[int, ...]:
    """Reads a TensorShapeProto."""
    shape = _message(data, _SHAPE)
    if _number(shape, "unknown_rank"):
        raise ValueError("its shape is unknown")
    return tuple(_number(_message(dim, _DIM), "size") for dim in shape.get("dim", ()))


def _message(data: bytes, fields: _Fields) -> dict[str, list]:
    """Reads the values of each of a protobuf message's fields, by name; skips fields that are not listed.

    The format is in protobuf.dev/programming-guides/encoding. Raises `ValueError`.
    """
    values, position, end = defaultdict(list), 0, len(data)
    while position < end:
        tag, position = read_varint(data, position, end)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, position = read_varint(data, position, end)
        elif wire == _BYTES or wire in _FIXED:
            size, position = read_varint(data, position, end) if wire == _BYTES else (_FIXED[wire], position)
            if size > end - position:
                raise ValueError(f"field {number} is cut off")
            value, position = data[position : position + size], position + size
        else:
            raise ValueError(f"field {number} has wire type {wire}, which does not exist")
        if number in fields:
            name, expected = fields[number]
            if wire != expected:
                raise ValueError(f"{name} has wire type {wire}, expected {expected}")
            values[name].append(value)
    return dict(values)


def _number(message: Mapping[str, list], name: str) -> int:
    """An integer field, signed; of several the last counts, and a field that is left out is 0."""
    value = message.get(name, [0])[-1]
    return value - (1 << 64) if value >> 63 else value


def _bytes(message: Mapping[str, list], name: str) -> bytes:
    """A field that holds a message; of several the fields count together."""
    return b"".join(message.get(name, []))


def _overlaps(variables: Iterable[_Variable]) -> list[str]:
    """Names variables that share bytes, of which one must be wrong; they are in the order of their data."""
    return [
        f"{second.name!r}: overlaps {first.name!r} in data file {first.shard}"
        for first, second in itertools.pairwise(variables)
        if first.shard == second.shard and second.offset < first.end
    ]


def _weight_problems(weights: Iterable[_Variable]) -> list[str]:
    problems = []
    for weight in weights:
        if weight.dtype not in _DTYPES:
            problems.append(f"{weight.name!r}: has TensorFlow's dtype {weight.dtype}, which bertjax does not read")
            continue
        expected = math.prod(weight.shape) * DTYPES[_DTYPES[weight.dtype]].itemsize
        if weight.size != expected:
            found = f"{_DTYPES[weight.dtype]}{list(weight.shape)}"
            problems.append(f"{weight.name!r}: has {weight.size} bytes, expected {expected} for {found}")
    return problems


def _collisions(weights: Iterable[_Variable]) -> list[str]:
    sources = defaultdict(list)
    for weight in weights:
        sources[torch_name(weight.name)].append(repr(weight.name))
    return [f"{name}: is {' and '.join(names[:20])}" for name, names in sources.items() if len(names) > 1]


def _data_files(prefix: Path, variables: Iterable[_Variable], shards: int) -> dict[int, Path]:
    """The data file of each shard; every one must be there, and hold all of its variables."""
    last = {variable.shard: variable for variable in variables}  # in the order of the data, so it ends the last too
    # A name is made, never read from the index.
    files = {shard: inside(prefix.parent, f"{prefix.name}.data-{shard:05}-of-{shards:05}") for shard in last}
    missing = [file.name for file in files.values() if not os.path.exists(file)]
    if missing:
        raise SourceError(f"{_index(prefix)}: lacks its data; put {enumerate_problems(missing, 20)} beside it")
    for shard, file in files.items():
        _check_size(file, last[shard])
    return files


def _check_size(file: Path, last: _Variable) -> None:
    """Refuses a data file that ends before its last variable does."""
    try:
        status = os.stat(file)
        if not stat.S_ISREG(status.st_mode):
            raise SourceError(f"{file}: is not a regular file")
        if status.st_size >= last.end:
            return
        with open(file, "rb") as opened:
            start = opened.read(512)
    except SourceError:
        raise
    except OSError as problem:
        raise SourceError(f"{file}: can't be read ({problem.strerror or problem})") from None
    short = f"has {status.st_size} bytes, but {last.name!r} ends at {last.end}; it is cut off, or not this index's"
    raise CheckpointError(f"{file}: {what_it_is(start) or short}")


def torch_name(name: str) -> str:
    """The PyTorch name of a google-research/bert variable; what stands before `bert/` or `cls/` is kept.

    Of a name that is not known, slashes become dots, and a kernel or an embedding becomes a weight.
    """
    name = _CLASSIFIER.get(name, name)
    for ending, replacement in _HEADS.items():
        if f"/{name}".endswith(f"/{ending}"):
            name = name.removesuffix(ending) + replacement
    # Some retrained checkpoints number Keras' LayerNorms; in each scope there is only one.
    parts = ["LayerNorm" if _KERAS_NORM.fullmatch(part) else part for part in name.split("/")]
    *scope, leaf = [part.replace("_", ".") if _LAYER.fullmatch(part) else part for part in parts]
    if leaf == "kernel":
        leaf = "weight"
    elif leaf.endswith("_embeddings"):
        leaf = f"{leaf}.weight"
    elif scope[-1:] == ["LayerNorm"]:
        leaf = _NORM.get(leaf, leaf)
    return ".".join([*scope, leaf])


def _tensor(weight: _Variable, file: Path, big_endian: bool) -> TensorInfo:
    shape, strides = weight.shape, None
    # TensorFlow keeps a kernel [in, out], PyTorch [out, in]; all other weights are laid out alike.
    if weight.leaf == "kernel":
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))[::-1]
        shape = shape[::-1]
    dtype = DTYPES[_DTYPES[weight.dtype]]
    return TensorInfo(torch_name(weight.name), file, dtype, shape, weight.offset, strides, big_endian, weight.name)
