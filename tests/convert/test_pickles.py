import io
import os
import pickle
import random
import struct
import subprocess
import sys
import tarfile
import time
import zlib

import ml_dtypes
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertjax.convert.pickles import LEGACY, ZIP, read_pickle
from bertjax.convert.tensors import DTYPES
from bertjax.errors import BertjaxError, CheckpointError, SourceError

TORCH_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
}
VIEWS = {
    "whole": lambda t: t,
    "transposed": lambda t: t.transpose(0, 2),
    "sliced": lambda t: t[:, 1:, ::2],
    "expanded": lambda t: t[:1, :, :1].expand(5, -1, 4),
    "reshaped": lambda t: t.reshape(-1, 1, 1),
    "row": lambda t: t[1, 2],
    "scalar": lambda t: t[2, 1, 0],
    "empty": lambda t: t[3:, 2:],
}


def save(torch, content, path, container=ZIP, protocol=2):
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=container == ZIP)
    return path


def array_of(torch, tensor):
    """The same bytes in numpy, bfloat16 included."""
    # A copy, because what is empty passes for contiguous with any strides.
    flat = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach()).reshape(-1).view(torch.uint8)
    dtype = next(name for name, theirs in TORCH_DTYPES.items() if getattr(torch, theirs) == tensor.dtype)
    return flat.numpy().view(DTYPES[dtype]).reshape(tuple(tensor.shape))


def assert_same(torch, path, expected, container=ZIP):
    contents = read_pickle(path)
    assert contents.format == container
    assert list(contents.tensors) == list(expected)
    for name, tensor in expected.items():
        info, array = contents.tensors[name], array_of(torch, tensor)
        assert (info.name, info.file, info.dtype, info.shape) == (name, path, array.dtype, array.shape)
        assert info.read().tobytes() == array.tobytes(), name
        # What numpy finds in C order needs no strides, whatever torch writes for dimensions of one element.
        assert tensor.is_contiguous() == (info.strides is None)
    return contents


@pytest.mark.parametrize("container", [ZIP, LEGACY])
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_every_dtype_and_layout_is_read_as_torch_wrote_it(container, dtype, tmp_path):
    torch = oracle.require("torch")
    base = torch.arange(60).reshape(3, 4, 5).to(getattr(torch, TORCH_DTYPES[dtype]))
    views = {name: view(base) for name, view in VIEWS.items()}
    copies = {f"{name} copied": tensor.clone() for name, tensor in views.items()}
    path = save(torch, views | copies, tmp_path / "t", container)
    contents = assert_same(torch, path, views | copies, container)
    # Views share the numbers in the file.
    assert contents.tensors["row"].offset == contents.tensors["whole"].offset + 30 * base.itemsize
    assert path.stat().st_size < 15_000


@pytest.mark.parametrize("container", [ZIP, LEGACY])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_and_what_modules_save(container, protocol, tmp_path):
    torch = oracle.require("torch")
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    module[0].register_module("tied", torch.nn.Linear(2, 2))
    module[0].tied.bias = module[0].bias
    module[0].weight.remark = "an attribute"
    state = module.state_dict()
    path = tmp_path / "pytorch_modèle.bin"
    contents = assert_same(torch, save(torch, state, path, container, protocol), state, container)
    assert contents.tensors["0.bias"].offset == contents.tensors["0.tied.bias"].offset
    parameters = dict(module.named_parameters())
    assert_same(torch, save(torch, parameters, path, container, protocol), parameters, container)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    training = {"epoch": 3, "loss": 0.5, "optimizer": optimizer.state_dict()}
    training |= {"size": torch.Size([1, 2])}
    for name in ("state_dict", "model_state_dict"):
        save(torch, training | {name: state}, path, container, protocol)
        contents = assert_same(torch, path, state, container)
        assert contents.left_out == dict.fromkeys(["optimizer", "size"], f"stands beside '{name}'")


def test_an_archive_that_torch_wrote_without_checksums_is_read(tmp_path):
    torch = oracle.require("torch")
    torch.serialization.set_crc32_options(False)
    try:
        save(torch, {"a": torch.ones(3)}, tmp_path / "t")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_pickle(tmp_path / "t").tensors["a"].read().tolist() == [1, 1, 1]


def test_what_lies_beyond_four_gigabytes(tmp_path):
    torch = oracle.require("torch")
    with torch.serialization.skip_data():  # leaves holes
        save(torch, {"big": torch.empty(1 << 32, dtype=torch.uint8), "a": torch.ones(2, 3)}, tmp_path / "t")
    tensors = read_pickle(tmp_path / "t").tensors
    assert tensors["a"].offset > 1 << 32
    with open(tmp_path / "t", "r+b") as file:
        file.seek(tensors["a"].offset)
        file.write(np.arange(6, dtype="<f4").tobytes())
    assert tensors["a"].read().tolist() == [[0, 1, 2], [3, 4, 5]]


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name not in ("state_dict", "model_state_dict")
)


def test_a_changed_number_is_found_by_its_checksum(tmp_path):
    torch = oracle.require("torch")
    content = {"filled": torch.full((5,), 2.0), "part": torch.full((9,), 3.0)[2:]}
    torch.save(content, tmp_path / "good")
    for name, tensor in content.items():
        old = tensor.numpy().tobytes()
        (tmp_path / name).write_bytes((tmp_path / "good").read_bytes().replace(old, old[:-1] + b"\0"))
    with pytest.raises(CheckpointError, match="tensor 'filled' does not have the checksum"):
        read_pickle(tmp_path / "filled").tensors["filled"].read()
    # Only what fills its storage is read as a whole.
    assert not (read_pickle(tmp_path / "part").tensors["part"].read() == 3).all()


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_random_state_dicts_are_read_as_torch_wrote_them(tmp_path_factory, data):
    torch = oracle.require("torch")
    state, path = {}, tmp_path_factory.mktemp("random") / "t"
    for name in data.draw(st.lists(NAMES, unique=True, min_size=1, max_size=6)):
        shape = data.draw(st.lists(st.integers(0, 4), max_size=4))
        tensor = torch.randint(0, 2, shape).to(getattr(torch, data.draw(st.sampled_from(list(TORCH_DTYPES.values())))))
        tensor = tensor.permute(data.draw(st.permutations(range(len(shape)))))
        for dimension, size in enumerate(tensor.shape):
            step, begin = data.draw(st.integers(1, 3)), data.draw(st.integers(0, size))
            tensor = tensor[(slice(None),) * dimension + (slice(begin, None, step),)]
        state[name] = torch.nn.Parameter(tensor, requires_grad=False) if data.draw(st.booleans()) else tensor
    container, protocol = data.draw(st.sampled_from([ZIP, LEGACY])), data.draw(st.integers(2, 5))
    save(torch, state, path, container, protocol)
    assert_same(torch, path, state, container)


@pytest.mark.parametrize("container", [ZIP, LEGACY])
def test_what_torch_saves_besides_plain_tensors_is_refused_by_name(container, tmp_path):
    torch = oracle.require("torch")
    ones = torch.ones(2)
    for content, message in [
        (torch.nn.Linear(2, 2), "wants to import 'torch.nn.modules.linear.Linear'; it is a program"),
        ({"state_dict": {"a": ones}, "time": np.float32(1)}, r"wants to import 'numpy.*nothing of it was run"),
        ({"state_dict": {"a": ones}, "time": time.time}, "wants to import 'time.time'"),
        ({"a": torch.zeros(2, device="meta")}, "without data"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "tensors of such a dtype"),
        ({"a": torch.zeros(2, dtype=torch.float8_e4m3fn)}, "tensors of such a dtype"),
        ({"a": ones.to_sparse()}, "sparse tensors"),
        ({"a": torch.quint8}, "quantised tensors"),
        ({"a": ones, "b": None, "c": {"d": ones}}, "'b' is None, expected a tensor.*; 'c' is a dict"),
        ({"state_dict": {"a": ones}, "model_state_dict": {"a": ones}}, "state_dict and model_state_dict.*keys are"),
        ({"state_dict": {"a": ones}, "a": ones, "b": ones, "epoch": 3}, "beside 'state_dict', .*: 'a'; 'b'; save one"),
        ({"epoch": 3, "generator": {"a": ones}}, "no state dict.*keys are: 'epoch'; 'generator'"),
        ({i: {} for i in range(50)}, "keys are: 0; .*; 19; and 30 more"),
        ({}, "keys are: nothing"),
        ({3: ones}, "a tensor is called 3, expected a text"),
        ({"": ones}, "a tensor is called ''"),
        ({"a": ones.expand(1, 1, 1, 1, 1, 1, 1, 1, 2)}, "impossible shape"),
        ([ones], "a list, expected a dict of tensors"),
        (ones, "a tensor, expected a dict of tensors"),
    ]:
        save(torch, content, tmp_path / "t", container)
        with pytest.raises(CheckpointError, match=f"/t: .*{message}"):
            read_pickle(tmp_path / "t")


# A writer of both containers, opcode by opcode, so that every fault can be made.


def text(value):
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def number(value):
    return b"\x8a\x10" + value.to_bytes(16, "little", signed=True)


def symbol(module, name):
    return f"c{module}\n{name}\n".encode()


def group(*items):
    return b"(" + b"".join(items) + b"t"


ORDERED = symbol("collections", "OrderedDict") + b")R"


def storage(kind="FloatStorage", key="0", count=6, tag="storage", view=b""):
    return group(text(tag), symbol("torch", kind), text(key), text("cpu"), number(count), view) + b"Q"


def tensor(stored=None, offset=0, shape=(2, 3), strides=(3, 1), rest=b""):
    """By default the six numbers of storage 0 as [2, 3]."""
    sizes = [sizes if isinstance(sizes, bytes) else group(*map(number, sizes)) for sizes in (shape, strides)]
    offset = offset if isinstance(offset, bytes) else number(offset)
    layout = group(stored or storage(), offset, *sizes, b"\x89", ORDERED, rest)
    return symbol("torch._utils", "_rebuild_tensor_v2") + layout + b"R"


def state(*entries):
    """A state dict of tensors that are called a, b, c..."""
    return b"}(" + b"".join(text(chr(97 + i)) + entry for i, entry in enumerate(entries)) + b"u"


def program(body, protocol=2):
    return bytes([0x80, protocol]) + body + b"."


DATA = np.arange(6, dtype="<f4").tobytes()
GOOD = program(state(tensor()))
FIELDS = ("flags", "method", "crc", "packed", "size", "name", "header")


def archive(members, local=None, directory=None, wide=False, **end):
    """A zip archive.

    Args:
        members: pairs of name and data.
        local: fields to change in local headers, by name of the member; directory: likewise.
        wide: write sizes and positions in the fields for zip64.
        end: fields to change in the record of the end.
    """
    body, entries = bytearray(), bytearray()
    for name, data in members:
        true = dict(zip(FIELDS, (0, 0, zlib.crc32(data), len(data), len(data), name.encode(), len(body)), strict=True))
        here, there = true | (local or {}).get(name, {}), true | (directory or {}).get(name, {})
        body += zip_entry(b"PK\3\4" + bytes(2), here, b"", wide) + here["name"] + extra(here, wide, 2) + data
        body += here.get("after", b"")
        tail = bytes(10) + struct.pack("<L", (1 << 32) - 1 if wide else there["header"])
        entries += zip_entry(b"PK\1\2" + bytes(4), there, tail, wide, 3) + there["name"] + extra(there, wide, 3)
    count, begin = len(members), len(body)
    if wide:
        end64 = struct.pack("<4sQ4x2L4Q", b"PK\6\6", 44, 0, 0, count, count, len(entries), begin)
        entries += end64 + struct.pack("<4sLQL", b"PK\6\7", 0, begin + len(entries), 1)
        count, begin, size = 0xFFFF, (1 << 32) - 1, (1 << 32) - 1
    fields = {"disk": 0, "start": 0, "here": count, "count": count, "size": size if wide else len(entries)}
    fields |= {"begin": begin, "comment": 0} | end
    return bytes(body + entries) + b"PK\5\6" + struct.pack("<4H2LH", *fields.values())


def zip_entry(start, fields, tail, wide, count=2):
    sizes = [(1 << 32) - 1] * 2 if wide else [fields["packed"], fields["size"]]
    lengths = [len(fields["name"]), len(extra(fields, wide, count))]
    numbers = struct.pack("<2H4x3L2H", fields["flags"], fields["method"], fields["crc"], *sizes, *lengths)
    return start + numbers + tail


def extra(fields, wide, count):
    values = [fields["size"], fields["packed"], fields["header"]][:count]
    return struct.pack(f"<2H{count}Q", 1, 8 * count, *values) if wide else b""


P = "archive/data.pkl"


def zipped(pickled=GOOD, data=DATA, more=(), **faults):
    return archive([(P, pickled), ("archive/data/0", data), *more], **faults)


KEYS = b"](" + text("0") + b"e"


def stacked(body=None, keys=KEYS, counts=((6, DATA),), start=None, rest=b""):
    """The container of pickles one after another."""
    stored = storage(view=b"N")
    heads = start or program(number(0x1950A86A20F9469CFC6C)) + program(number(1001))
    heads += program(b"}(" + text("little_endian") + b"\x88u")
    heads += program(body or state(tensor(stored))) + program(keys)
    return heads + b"".join(count.to_bytes(8, "little", signed=True) + data for count, data in counts) + rest


@pytest.mark.parametrize(
    "content",
    [
        zipped(),
        zipped(wide=True),
        zipped(more=[("archive/version", b"3\n"), ("archive/data/1", b"not used"), ("archive/.new", b"")]),
        zipped(pickled=program(state(tensor()), protocol=5)),
        zipped(pickled=program(state(symbol("torch._utils", "_rebuild_tensor")
               + group(storage(), number(0), symbol("torch", "Size") + group(group(number(2), number(3))) + b"R",
                       group(number(3), number(1))) + b"R"))),
        zipped(pickled=program(state(tensor(rest=b"}")))),
        stacked(),
        stacked(start=program(number(0x1950A86A20F9469CFC6C)) + program(b"M\xe9\x03")),
    ],
)  # fmt: skip
def test_the_writer_above_writes_what_can_be_read(content, tmp_path):
    (tmp_path / "t").write_bytes(content)
    contents = read_pickle(tmp_path / "t")
    assert contents.format == (ZIP if content.startswith(b"PK") else LEGACY)
    assert {name: info.read().tolist() for name, info in contents.tensors.items()} == {"a": [[0, 1, 2], [3, 4, 5]]}


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, "f2", "f4", "f8", "i2", "i8", "u1", "bool"])
def test_the_byte_order_of_an_archive_is_honoured(dtype, tmp_path):
    values = (np.arange(6) > 2 if dtype == "bool" else np.arange(6) + 250).astype(dtype)
    kinds = dict(f2="Half", f4="Float", f8="Double", i2="Short", i8="Long", u1="Byte", bool="Bool")  # noqa: C408
    pickled = program(state(tensor(storage(f"{kinds.get(dtype, 'BFloat16')}Storage"), shape=(3, 2), strides=(1, 3))))
    swapped = values.view(f"u{values.itemsize}").byteswap().tobytes()
    for order, data in (("little", values.tobytes()), ("big", swapped)):
        (tmp_path / "t").write_bytes(zipped(pickled, data, [("archive/byteorder", order.encode())]))
        info = read_pickle(tmp_path / "t").tensors["a"]
        assert info.big_endian == (order == "big")
        np.testing.assert_array_equal(info.read(), values.reshape(2, 3).T)


def test_the_numbers_of_the_older_container_are_little_endian_on_any_machine(tmp_path):
    """torch/csrc/serialization.cpp swaps the bytes on big-endian machines; torch.load ignores what the file says."""
    content = stacked().replace(b"little_endian\x88", b"little_endian\x89")
    (tmp_path / "t").write_bytes(content)
    assert read_pickle(tmp_path / "t").tensors["a"].read().tolist() == [[0, 1, 2], [3, 4, 5]]
    torch = oracle.require("torch")
    assert torch.load(tmp_path / "t")["a"].tolist() == [[0, 1, 2], [3, 4, 5]]


def both(fields):
    return {"local": fields, "directory": fields}


def tar():
    with io.BytesIO() as buffer:
        with tarfile.open(fileobj=buffer, mode="w") as file:
            file.addfile(tarfile.TarInfo("storages"), io.BytesIO())
        return buffer.getvalue()


# Containers that hold the one before twice, a hundred times over: 2^100 leaves.
LISTS = b"](]q\0" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(100)) + b"e"
TUPLES = b"()q\0" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(100)) + b"t"
CALL = group(text("true")) + b"R"
DESCRIPTOR = {"flags": 8, "crc": 0, "packed": 0, "size": 0}
BOMB = zlib.compress(bytes(1 << 20))[2:-4]
# Each with what the message must say. Numbers are those of the list of forty inputs to refuse well.
HOSTILE = {
    "21 os.system": (
        zipped(program(symbol("os", "system") + CALL)),
        "data.pkl, byte 2: .*import 'os.system'.*nothing of it was run",
    ),
    "21 os.system in a legacy file": (stacked(symbol("os", "system") + CALL), "byte [0-9]+: .*import 'os.system'"),
    "21 os.system in a plain pickle": (program(symbol("os", "system") + CALL), "import 'os.system'"),
    "21 builtins": (zipped(program(symbol("builtins", "eval") + CALL)), "import 'builtins.eval'"),
    "21 a path through torch": (
        zipped(program(symbol("torch.serialization", "os.system") + CALL)),
        "import 'torch.serial",
    ),
    "22 stack global": (
        zipped(program(b"\x8c\2os\x8c\6system\x93" + CALL, 4)),
        "data.pkl, byte 14: .*import 'os.system'",
    ),
    "22 stack global of numbers": (zipped(program(b"K\1K\2\x93", 4)), "a global is named by an int and an int"),
    "inst": (zipped(program(b"(ios\nsystem\n")), "opcode INST is not part of a state dict"),
    "newobj": (zipped(program(ORDERED + b")\x81")), "opcode NEWOBJ"),
    "extension": (zipped(program(b"\x82\1")), "opcode EXT1"),
    "no opcode": (zipped(program(b"\xff")), r"byte b'\\xff' is not part"),
    "endless global": (zipped(program(b"c" + b"x" * 9999)), "no end within"),
    "23 lists doubled": (zipped(program(state(tensor(), LISTS))), "'b' is a list"),
    "23 tuples doubled": (zipped(program(state(tensor(), TUPLES))), "'b' is a tuple"),
    "23 tuples doubled as a key": (zipped(program(b"}" + TUPLES + b"Ns")), "the key of a dict is a tuple"),
    "23 tuples doubled as a shape": (zipped(program(state(tensor(shape=TUPLES)))), "tensor 'a' has an offset, shape"),
    "23 tuples doubled as an id": (zipped(program(TUPLES + b"Q")), "a persistent id is a tuple"),
    "lists in themselves": (zipped(program(state(tensor(), b"]q\0h\0a"))), "'b' is a list"),
    "dicts in themselves": (zipped(program(b"}q\0" + text("state_dict") + b"h\0s")), "'state_dict' is a dict"),
    "60,000 levels": (zipped(program(b"]" * 60_000 + b"a" * 59_999)), "a list, expected a dict"),
    "200,000 levels": (zipped(program(b")" + b"\x85" * 200_000)), "a tuple, expected a dict"),
    "marks": (zipped(program(b"(" * 200_000)), "wait on the stack"),
    "a deep stack": (zipped(program(b"N" * 200_000)), "wait on the stack"),
    "long program": (zipped(program(b"}" + b"q\0" * 300_000)), "more than 262144 opcodes"),
    "long programs": (
        stacked(b"}" + b"q\0" * 140_000, keys=b"]" + b"q\0" * 140_000),
        "more than 262144 opcodes",
    ),
    "24 string of 4 GiB": (zipped(program(b"X\xff\xff\xff\xff")), "a string of 4294967295 bytes; at most 65536"),
    "24 string of 2^63": (zipped(program(b"\x8d" + b"\xff" * 8)), "opcode BINUNICODE8"),
    "24 short string": (zipped(program(b"\x8c\xff")), "ends early"),
    "24 long integer": (zipped(program(b"\x8a\xff" + bytes(255))), "an integer of 255 bytes"),
    "24 longer integer": (zipped(program(b"\x8b\xff\xff\xff\x7f")), "opcode LONG4"),
    "not utf-8": (zipped(program(b"X\2\0\0\0\xff\xff")), "not UTF-8"),
    "a lone surrogate": (zipped(program(b"X\3\0\0\0\xed\xa0\x80")), "not UTF-8"),
    "25 item of a tuple": (zipped(program(b")" + text("a") + b"Ns")), "sets items of a tuple"),
    "25 items of a tensor": (zipped(program(tensor() + b"(" + text("a") + b"Nu")), "sets items of a tensor"),
    "25 append to a dict": (zipped(program(b"}Na")), "appends to a dict"),
    "attributes of a dict": (zipped(program(b"}}b")), "sets attributes of a dict"),
    "attributes that are no dict": (zipped(program(ORDERED + b"Nb")), "attributes of an OrderedDict are None"),
    "call of a string": (zipped(program(text("a") + b")R")), "it calls a str"),
    "call of a storage class": (zipped(program(symbol("torch", "FloatStorage") + b")R")), "calls 'torch.FloatStorage'"),
    "call with a list": (zipped(program(symbol("torch", "Size") + b"]R")), "it calls 'torch.Size'"),
    "pairs of Python 2": (zipped(program(ORDERED[:-2] + b"]\x85R")), "Python 2"),
    "key twice": (
        zipped(program(state() + text("a") + tensor() + b"s" + text("a") + tensor() + b"s")),
        "key 'a' twice",
    ),
    "odd items": (zipped(program(b"}(Nu")), "a key has no value"),
    "colliding keys": (
        zipped(program(b"}" + number((1 << 61) - 1) + b"Ns")),
        "the key of a dict is 2305843009213693951",
    ),
    "too few values": (zipped(program(b"}(s")), "too few values"),
    "no mark": (zipped(program(b"t")), "no mark"),
    "empty memo": (zipped(program(b"h\0")), "memo entry 0 does not exist"),
    "put of nothing": (zipped(program(b"q\0")), "stack is empty"),
    "two results": (zipped(program(b"NN")), "ends with 2 values"),
    "no result": (zipped(program(b"")), "ends with 0 values"),
    "protocol 0": (zipped(b"N."), "no pickle begins"),
    "protocol 9": (zipped(b"\x80\x09N."), "pickle protocol 9"),
    "no stop": (zipped(GOOD[:-1]), "ends early"),
    "behind the stop": (zipped(GOOD + b"N"), "1 bytes behind its end"),
    "conjugated": (zipped(program(state(tensor(rest=b"}" + text("conj") + b"\x88s")))), "resolve_conj"),
    "tensor of nothing": (zipped(program(symbol("torch._utils", "_rebuild_tensor_v2") + b")R")), "a tensor is made of"),
    "parameter of nothing": (
        zipped(program(symbol("torch._utils", "_rebuild_parameter") + b"NNN\x87R")),
        "parameter is",
    ),
    "size of nothing": (zipped(program(symbol("torch", "Size") + b"N\x85R")), "torch.Size is made of"),
    "26 storage too short": (zipped(data=DATA[:-1]), "tensor 'a' .*storage '0', which has 23 bytes, but 24 by its"),
    "26 storage too long": (zipped(data=DATA + b"\0"), "25 bytes, but 24"),
    "26 no storage": (archive([(P, GOOD)]), "storage '0', which the file does not have"),
    "26 storage of two sizes": (zipped(program(state(tensor(), tensor(storage(count=5))))), "'0' is described twice"),
    "26 storage of two dtypes": (zipped(program(state(tensor(), tensor(storage("IntStorage"))))), "described twice"),
    "26 storage of -1": (zipped(program(state(tensor(storage(count=-1))))), "storage '0' has -1 elements"),
    "27 negative stride": (zipped(program(state(tensor(strides=(-3, 1))))), "tensor 'a' .*negative"),
    "27 negative offset": (zipped(program(state(tensor(offset=-1)))), "tensor 'a' .*negative"),
    "27 negative size": (zipped(program(state(tensor(shape=(-2, 3))))), "tensor 'a' .*negative"),
    "27 stride out of range": (zipped(program(state(tensor(strides=(4, 1))))), "'a' reaches beyond the 6 elements"),
    "27 offset out of range": (zipped(program(state(tensor(offset=1)))), "'a' reaches beyond the 6 elements"),
    "27 shape out of range": (zipped(program(state(tensor(shape=(3, 3))))), "'a' reaches beyond the 6 elements"),
    "27 too few strides": (zipped(program(state(tensor(strides=(1,))))), "tensor 'a' .*uneven"),
    "27 offset of True": (zipped(program(state(tensor(offset=b"\x88")))), "tensor 'a' has an offset"),
    "27 fractional shape": (
        zipped(program(state(tensor(shape=b"G" + bytes(8) + b"\x85")))),
        "tensor 'a' has an offset",
    ),
    "27 huge shape": (zipped(program(state(tensor(shape=(0, 1 << 60))))), "impossible shape"),
    "27 rank 9": (zipped(program(state(tensor(shape=(1,) * 9, strides=(1,) * 9)))), "impossible shape"),
    "27 rank 65": (zipped(program(state(tensor(shape=(1,) * 65, strides=(1,) * 65)))), "uneven"),
    "27 all at once": (
        zipped(program(state(tensor(offset=9), tensor(), tensor(shape=(9, 9)), b"N"))),
        "'a' reaches .*; tensor 'c' reaches .*; 'd' is None",
    ),
    "28 key ../../x": (zipped(program(state(tensor(storage(key="../../x"))))), r"key of a storage is '\.\./\.\./x'"),
    "28 empty key": (zipped(program(state(tensor(storage(key=""))))), "key of a storage is ''"),
    "28 key in other digits": (zipped(program(state(tensor(storage(key="\u0663"))))), "expected decimal digits"),
    "28 not a storage": (zipped(program(state(tensor(storage(tag="module"))))), "a persistent id is a tuple"),
    "28 not a class": (zipped(program(state(tensor(storage("Size"))))), "class of a storage is 'torch.Size'"),
    "28 a view": (stacked(state(tensor(storage(view=b"NNN\x87")))), "a view of another"),
    "28 not an id": (zipped(program(b"NQ")), "a persistent id is None"),
    "29 data.pkl twice": (zipped(more=[(P, GOOD)]), "names a member twice"),
    "29 storage in capitals too": (zipped(more=[("archive/DATA/0", DATA[::-1])]), "names a member twice, if not in"),
    "29 storage in capitals": (zipped(more=[("archive/Data/1", DATA)]), "'archive/Data/1' is spelt with capitals"),
    "29 byte order in capitals": (zipped(more=[("archive/BYTEORDER", b"big")]), "'archive/BYTEORDER' is spelt with"),
    "29 NUL in a name": (zipped(more=[("archive/data/0\0x", DATA)]), "has a NUL or a backslash in its name"),
    "29 backslash in a name": (zipped(more=[("archive\\data/0", DATA)]), "has a NUL or a backslash in its name"),
    "29 two of data.pkl": (zipped(more=[("archive/x/data.pkl", GOOD)]), "2 members called data.pkl"),
    "29 two folders": (zipped(more=[("other/data/0", DATA)]), "not in one folder"),
    "29 no data.pkl": (archive([("a", b"b")]), "0 members called data.pkl"),
    "29 no folder": (archive([("data.pkl", GOOD)]), "not in one folder"),
    "30 deflated": (
        zipped(data=BOMB, **both({"archive/data/0": {"method": 8, "size": 1 << 20}})),
        "member 'archive/data/0' is compressed",
    ),
    "30 deflated pickle": (
        zipped(BOMB, **both({P: {"method": 8, "size": 1 << 31}})),
        "member 'archive/data.pkl' is compressed",
    ),
    "31 encrypted": (zipped(**both({P: {"flags": 1}})), "is encrypted"),
    "31 flags differ": (zipped(directory={P: {"flags": 0x800}}), "local header and the directory contradict"),
    "31 names differ": (zipped(local={P: {"name": b"archive/DATA.pkl"}}), "contradict"),
    "31 sizes differ": (zipped(local={P: {"size": 3, "packed": 3}}), "contradict"),
    "31 checksums differ": (zipped(local={P: {"crc": 3}}), "contradict"),
    "31 methods differ": (zipped(local={P: {"method": 8}}), "contradict"),
    "31 wrong checksum": (zipped(**both({P: {"crc": 3}})), "does not have the checksum"),
    "31 no descriptor": (
        zipped(local={P: DESCRIPTOR}, directory={P: {"flags": 8}}),
        "does not end where the next begins",
    ),
    "31 wrong descriptor": (
        zipped(local={P: DESCRIPTOR | {"after": b"PK\7\x08" + bytes(12)}}, directory={P: {"flags": 8}}),
        "does not end where the next begins",
    ),
    "overlap": (zipped(directory={"archive/data/0": {"header": 3}}), "does not end where|contradict"),
    "a member beyond the end": (zipped(directory={"archive/data/0": {"header": 1 << 31}}), "does not end|lies behind"),
    "a member far beyond": (zipped(wide=True, directory={P: {"header": 1 << 63}}), "stand before|lies behind"),
    "members larger than the file": (
        zipped(wide=True, **both({P: {"size": 1 << 63, "packed": 1 << 63}})),
        "does not end where the next begins",
    ),
    "hole": (zipped(local={P: {"after": b"hidden"}}), "does not end where the next begins"),
    "no zip64 sizes": (zipped(directory={P: {"size": (1 << 32) - 1}}), "has no size"),
    "many members": (zipped(count=60_000, here=60_000), "directory of the zip archive is damaged"),
    "more members": (archive([("", b"")] * 70_000, wide=True), "70000 members"),
    "many folders": (archive([(f"{i}/", b"") for i in range(60_000)]), "0 members called data.pkl"),
    "two disks": (zipped(disk=1), "bytes were added or are missing"),
    "comment": (zipped(comment=9), "bytes were added or are missing"),
    "directory elsewhere": (zipped(begin=0), "bytes were added or are missing"),
    "zip64 contradiction": (zipped(wide=True, count=1), "contradict each other"),
    "truncated zip": (zipped()[:-1], "does not end with the record of its end"),
    "appended to a zip": (zipped() + b"x", "does not end with the record of its end"),
    "empty zip": (archive([]), "not a PyTorch checkpoint"),
    "byte order": (zipped(more=[("archive/byteorder", b"middle")]), "byte order is b'middle'"),
    "long byte order": (zipped(more=[("archive/byteorder", b"little" * 9)]), "has 54 bytes; at most 8"),
    "long pickle": (zipped(GOOD + bytes(16 << 20)), "at most 16777216 are read"),
    "torchscript": (zipped(more=[("archive/constants.pkl", b"")]), "TorchScript"),
    "torchscript code": (zipped(more=[("archive/code/__torch__.py", b"")]), "TorchScript"),
    "32 tar": (tar(), "tar archive"),
    "33 pickle before a zip": (program(b"}") + zipped(), "a pickle, but not one of torch.save's: it holds a dict"),
    "33 legacy file before a zip": (stacked(rest=zipped()), "bytes follow the last storage; it may be two files"),
    "33 bytes before the first member": (
        archive([("archive/x", b""), (P, GOOD), ("archive/data/0", DATA)], directory={"archive/x": {"header": 5}}),
        "5 bytes stand before",
    ),
    "plain pickle": (pickle.dumps({"a": 1}, 2), "not one of torch.save's: it holds a dict"),
    "another magic number": (stacked(start=program(number(7)) + program(number(1001))), "it holds an int"),
    "another version": (
        stacked(start=program(number(0x1950A86A20F9469CFC6C)) + program(number(1002))),
        "version of the file's format is 1002, expected 1001",
    ),
    "keys that are no list": (stacked(keys=b"N"), "keys of the storages are None"),
    "keys that are no text": (stacked(keys=b"](Ne"), "lists storage None"),
    "unknown storage": (stacked(keys=b"](" + text("0") + text("1") + b"e"), "lists storage '1'"),
    "storage listed twice": (stacked(keys=b"](" + text("0") * 2 + b"e"), "lists storage '0', which"),
    "storage not listed": (stacked(keys=b"]", counts=()), "0 of the 1 storages"),
    "26 legacy, count": (stacked(counts=((5, DATA),)), "storage '0' has 5 elements, but 6"),
    "26 legacy, negative count": (stacked(counts=((-1, DATA),)), "storage '0' has -1 elements, but 6"),
    "26 legacy, too short": (stacked()[:-1], "ends inside storage '0'; the download"),
    "26 legacy, without its count": (stacked(counts=()), "ends inside storage '0'"),
    "26 legacy, huge": (stacked(state(tensor(storage(view=b"N", count=1 << 100)))), "ends inside storage '0'"),
    "trailing byte": (stacked(rest=b"x"), "1 bytes follow the last storage"),
    "storage in the heads": (stacked(start=program(tensor())), "a persistent id is"),
    "1 zero bytes": (b"", "the file is empty"),
    "2 LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
    "3 HTML": (b"<!DOCTYPE html><html>", "HTML page"),
    "safetensors": (b"\x20\0\0\0\0\0\0\0" + b'{"a":' + bytes(30), "safetensors file renamed"),
    "garbage": (b"garbage", "not a PyTorch checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_one_typed_error_that_names_it(case, tmp_path):
    content, message = HOSTILE[case]
    (tmp_path / "t").write_bytes(content)
    start = time.process_time()
    with pytest.raises(CheckpointError, match=f"/t: .*({message})") as error:
        read_pickle(tmp_path / "t")
    assert time.process_time() - start < 5
    assert len(str(error.value)) < 2000
    assert "\n" not in str(error.value)


def test_no_entry_of_a_state_dict_is_looked_at_longer_for_being_repeated(tmp_path):
    """A tensor of 60,000 dimensions under 10,000 names: quadratic code would take minutes."""
    big = tensor(shape=b"(" + b"N" * 60_000 + b"t") + b"q\7"
    names = b"".join(text(str(i)) + b"h\7" for i in range(10_000))
    (tmp_path / "t").write_bytes(zipped(program(b"}" + text("first") + big + b"s(" + names + b"u")))
    start = time.process_time()
    with pytest.raises(CheckpointError, match="and 9001 more") as error:
        read_pickle(tmp_path / "t")
    assert time.process_time() - start < 5
    assert len(str(error.value)) < 200_000


WATCH = """
import resource, sys, time
from pathlib import Path
from bertjax.convert.pickles import read_pickle
from bertjax.errors import BertjaxError
seen, active = [], False
def watch(event, arguments):
    allowed = event == "open" and Path(arguments[0]).parent == folder
    if active and not allowed and event.split(".")[0] not in ("object", "sys"):
        seen.append((event, repr(arguments)[:200]))
folder, slowest = Path(sys.argv[1]), 0
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sys.addaudithook(watch)
for file in sorted(folder.iterdir()):
    start, active = time.process_time(), True
    try:
        read_pickle(file)
    except BertjaxError:
        pass
    active, slowest = False, max(slowest, time.process_time() - start)
print(seen, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10, slowest)
assert not seen
assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10 < 256
"""


def test_nothing_is_imported_run_or_opened_for_any_hostile_file(tmp_path):
    for i, (content, _) in enumerate(HOSTILE.values()):
        (tmp_path / str(i)).write_bytes(content)
    (tmp_path / "good").write_bytes(zipped())
    result = subprocess.run([sys.executable, "-c", WATCH, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr


def damage(random, content):
    """One to four changes anywhere, of the kinds that make parsers fall over."""
    content = bytearray(content)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(content) + 1)
        kind = random.randrange(5)
        if kind == 0:
            content[at : at + 1] = bytes([random.randrange(256)])
        elif kind == 1:
            content[at:at] = random.randbytes(random.randint(1, 9))
        elif kind == 2:
            del content[at : at + random.randint(1, 9)]
        elif kind == 3:
            content[at : at + 4] = random.choice([b"\xff" * 4, bytes(4), b"\0\0\0\x80", b"PK\3\4"])
        else:
            del content[at:]
    return bytes(content)


def assert_read_or_refused(path):
    try:
        for info in read_pickle(path).tensors.values():
            assert info.read().shape == info.shape
    except BertjaxError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("seed", range(4))
def test_any_damage_is_read_or_refused_but_never_anything_else(seed, tmp_path):
    source, path = random.Random(seed), tmp_path / "t"
    pickled = program(state(tensor(), tensor(offset=1, shape=(2,), strides=(2,)), tensor(shape=(0, 3))))
    for content in (zipped(), zipped(wide=True), zipped(pickled), stacked()):
        for _ in range(200):
            path.write_bytes(damage(source, content))
            assert_read_or_refused(path)
    for _ in range(500):  # inside a sound archive, where the checksum does not shield the pickle
        path.write_bytes(zipped(damage(source, pickled)))
        assert_read_or_refused(path)


@pytest.mark.parametrize("container", [ZIP, LEGACY])
def test_any_damage_to_what_torch_wrote_is_read_or_refused(container, tmp_path):
    torch = oracle.require("torch")
    path = save(torch, torch.nn.Linear(3, 2).state_dict(), tmp_path / "t", container, 2)
    content, source = path.read_bytes(), random.Random(0)
    for end in range(len(content)):
        path.write_bytes(content[:end])
        with pytest.raises(CheckpointError, match="/t: "):
            read_pickle(path)
    for _ in range(500):
        path.write_bytes(damage(source, content))
        assert_read_or_refused(path)


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path):
    with pytest.raises(SourceError, match="absent: can't be read \\(No such file"):
        read_pickle(tmp_path / "absent")
    with pytest.raises(SourceError, match="can't be read \\(Is a directory"):
        read_pickle(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(SourceError, match="fifo: can't be read \\(it is not a regular file"):
        read_pickle(tmp_path / "fifo")
