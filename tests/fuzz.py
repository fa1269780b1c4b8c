"""Damages valid checkpoints of every format, and checks that each is then read or refused.

`python -m tests.fuzz --cases 20000 --seed 1` prints what came out. A case depends on the seed and its number alone, so
`--only N` repeats one. Workers are limited in memory and time and watched by an audit hook; what ends one of them, or
comes out as anything but a result or a `BertjaxError`, fails, and its input is kept in tests/data/found if it is small.

The valid checkpoints are written here by hand after the formats' documents, so neither torch nor TensorFlow is needed.
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import math
import os
import pickletools
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

import bertjax
from bertjax import conversion
from bertjax.convert import bert, certificate
from bertjax.convert.sstable import masked_crc32c
from bertjax.json_files import read_json
from bertjax.pretrained import abstract_model
from bertjax.sentence_files import read_spec

FOUND = Path(__file__).parent / "data" / "found"

#: How far a case may raise the memory of its process.
MAX_GROWTH = 512 << 20
#: After so many seconds a case hangs.
MAX_SECONDS = 20

# Valid files

VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "a", "b", "c", "."]


def config(layers: int = 1) -> dict:
    """The contents of config.json, of a tiny BERT."""
    return {
        "model_type": "bert",
        "vocab_size": len(VOCAB),
        "hidden_size": 8,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 10,
    }


@functools.cache
def _tensors(layers: int) -> dict[str, np.ndarray]:
    slots = bert.slots_of(abstract_model(bertjax.BertConfig.from_hf(config(layers)))[1])
    rng = np.random.default_rng(0)
    return {slot.name: rng.normal(size=slot.shape).astype("<f4") for slot in slots}


def tensors(layers: int = 1) -> dict[str, np.ndarray]:
    """The tensors of that BERT, by PyTorch's names."""
    return dict(_tensors(layers))


def safetensors(state: Mapping[str, np.ndarray]) -> bytes:
    """A safetensors file."""
    header, data = {}, b""
    names = {"f4": "F32", "f2": "F16", "i1": "I8", "i8": "I64"}
    for name, array in state.items():
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": names[array.dtype.str[1:]], "shape": list(array.shape), "data_offsets": offsets}
        data += array.tobytes()
    return with_header(json.dumps(header).encode(), data)


def with_header(header: bytes, data: bytes) -> bytes:
    """A safetensors file of a ready header."""
    return len(header).to_bytes(8, "little") + header + data


def text(value: str) -> bytes:
    """A pickle's string."""
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def number(value: int) -> bytes:
    """A pickle's integer."""
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def symbol(module: str, name: str) -> bytes:
    """A pickle's global."""
    return f"c{module}\n{name}\n".encode()


def group(*items: bytes) -> bytes:
    """A pickle's tuple."""
    return b"(" + b"".join(items) + b"t"


def program(body: bytes, protocol: int = 2) -> bytes:
    """A whole pickle."""
    return bytes([0x80, protocol]) + body + b"."


ORDERED = symbol("collections", "OrderedDict") + b")R"


def torch_tensor(key: str, shape, *, count=None, offset=0, strides=None, view=b"") -> bytes:
    """A tensor of float32 as torch pickles it."""
    count = math.prod(shape) if count is None else count
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))] if strides is None else strides
    storage = group(text("storage"), symbol("torch", "FloatStorage"), text(key), text("cpu"), number(count), view)
    sizes = (group(*map(number, values)) for values in (shape, strides))
    rest = group(storage + b"Q", number(offset), *sizes, b"\x89", ORDERED)
    return symbol("torch._utils", "_rebuild_tensor_v2") + rest + b"R"


def state_dict(entries: Mapping[str, bytes]) -> bytes:
    """A state dict of pickled tensors."""
    return b"}(" + b"".join(text(name) + entry for name, entry in entries.items()) + b"u"


def torch_state(state: Mapping[str, np.ndarray], view: bytes = b"") -> bytes:
    """A state dict in which the n-th tensor has storage n to itself."""
    return state_dict({name: torch_tensor(str(i), a.shape, view=view) for i, (name, a) in enumerate(state.items())})


def torch_zip(pickled: bytes, storages: list[bytes], more: Mapping[str, bytes] | None = None) -> bytes:
    """A file of torch 1.6 or later."""
    members = {"m/data.pkl": pickled, "m/byteorder": b"little"}
    members |= {f"m/data/{key}": data for key, data in enumerate(storages)} | dict(more or {})
    with io.BytesIO() as buffer:
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
            for name, data in members.items():
                archive.writestr(zipfile.ZipInfo(name), data)  # without the time
        return buffer.getvalue()


def torch_file(state: Mapping[str, np.ndarray]) -> bytes:
    """A state dict in a file of torch 1.6 or later."""
    return torch_zip(program(torch_state(state)), [array.tobytes() for array in state.values()])


def legacy_file(state: Mapping[str, np.ndarray], body: bytes | None = None) -> bytes:
    """A state dict in a file of torch before 1.6."""
    heads = program(number(0x1950A86A20F9469CFC6C)) + program(number(1001))
    heads += program(b"}(" + text("little_endian") + b"\x88u") + program(body or torch_state(state, b"N"))
    heads += program(b"](" + b"".join(text(str(i)) for i in range(len(state))) + b"e")
    return heads + b"".join(array.size.to_bytes(8, "little") + array.tobytes() for array in state.values())


def shards(state: Mapping[str, np.ndarray], stem: str, suffix: str, write: Callable) -> dict[str, bytes]:
    """Two shards and their index."""
    names, half = list(state), len(state) // 2
    parts = [{name: state[name] for name in part} for part in (names[:half], names[half:])]
    files = {f"{stem}-{i:05}-of-00002{suffix}": part for i, part in enumerate(parts, 1)}
    weight_map = {name: file for file, part in files.items() for name in part}
    index = {"metadata": {"total_size": sum(array.nbytes for array in state.values())}, "weight_map": weight_map}
    written = {file: write(part) for file, part in files.items()}
    return written | {f"{stem}{suffix}.index.json": json.dumps(index).encode()}


def _varint(value: int) -> bytes:
    groups = []
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def _field(tag: int, value: int | bytes) -> bytes:
    """A field of a protobuf message."""
    if isinstance(value, int):
        return _varint(tag << 3) + _varint(value)
    return _varint(tag << 3 | 2) + _varint(len(value)) + value


def _block(items: Mapping[bytes, bytes]) -> bytes:
    """A block of a table, whose keys share nothing."""
    body = b"".join(_varint(0) + _varint(len(key)) + _varint(len(data)) + key + data for key, data in items.items())
    return body + bytes(4) + (1).to_bytes(4, "little")


def _seal(block: bytes) -> bytes:
    return block + b"\0" + masked_crc32c(block + b"\0").to_bytes(4, "little")


def tensorflow(state: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    """The files of a TensorFlow 1 checkpoint."""
    entries, data = {b"": _field(1, 1) + _field(3, _field(1, 1))}, b""
    arrays = {_tf_name(name): array for name, array in state.items()}
    for name, array in sorted(arrays.items()):
        array = np.ascontiguousarray(array.T if name.endswith("kernel") else array)
        shape = b"".join(_field(2, _field(1, size)) for size in array.shape)
        entries[name.encode()] = _field(1, 1) + _field(2, shape) + _field(4, len(data)) + _field(5, array.nbytes)
        data += array.tobytes()
    return {"bert.ckpt.index": table(_block(entries)), "bert.ckpt.data-00000-of-00001": data}


def _tf_name(name: str) -> str:
    name = name.replace("layer.", "layer_").replace(".", "/").replace("LayerNorm/weight", "LayerNorm/gamma")
    name = name.replace("LayerNorm/bias", "LayerNorm/beta")
    return "bert/" + (name.removesuffix("/weight") if "_embeddings/" in name else name.replace("weight", "kernel"))


def table(block: bytes) -> bytes:
    """A table of one block of data."""
    index = _block({b"z": _varint(0) + _varint(len(block))})
    start = len(_seal(block))
    empty = _block({})
    footer = _varint(start) + _varint(len(empty)) + _varint(start + len(_seal(empty))) + _varint(len(index))
    return _seal(block) + _seal(empty) + _seal(index) + footer.ljust(40, b"\0") + _TABLE_MAGIC


_TABLE_MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]
POOLING = {"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}


def put(folder: Path, files: Mapping[str, bytes | str | dict | list]) -> Path:
    """Writes files; what is neither bytes nor text is written as JSON."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        content = content if isinstance(content, (bytes, str)) else json.dumps(content)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def sentence_files(layers: int = 1) -> dict:
    """A sentence-transformers folder with its weights in safetensors."""
    return {
        "config.json": config(layers),
        "model.safetensors": safetensors(tensors(layers)),
        "vocab.txt": "\n".join(VOCAB) + "\n",
        "tokenizer_config.json": {"do_lower_case": True, "model_max_length": 10},
        "modules.json": MODULES,
        "1_Pooling/config.json": POOLING,
        "sentence_bert_config.json": {"max_seq_length": 10, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": {"query": "the "}, "default_prompt_name": None},
    }


# Formats


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of folder.

    Attributes:
        make: writes a valid one.
        victims: which of its files are damaged, as patterns.
        use: what is done with it.
    """

    make: Callable[[Path], object]
    victims: tuple[str, ...]
    use: Callable[[Path], object]


def _weights(files: Callable[[dict], Mapping[str, bytes]], *victims: str) -> Format:
    return Format(lambda folder: put(folder, {"config.json": config(), **files(tensors())}), victims, _read)


def _converted(to: str, *victims: str) -> Format:
    def make(folder: Path) -> None:
        source = put(folder.parent / "source", {"config.json": config(), "model.safetensors": safetensors(tensors())})
        bertjax.convert_checkpoint(source, folder, to=to, certify=folder.parent / "certificate", force=True)
        (folder.parent / "certificate").rename(folder / "certificate")
        shutil.rmtree(source)

    return Format(make, victims, _check if victims == ("certificate",) else _read)


def _read(folder: Path) -> None:
    plan = conversion.read_checkpoint(folder).plan
    for tensor in plan.to_write().values():
        tensor.data()
    for _ in plan.arrays():
        pass


def _convert(folder: Path) -> None:
    target = folder.parent / "target"
    try:
        bertjax.convert_checkpoint(folder, target)
        assert (target / "config.json").exists()
        read_json(target / "config.json", AssertionError)
    finally:
        shutil.rmtree(target, ignore_errors=True)


def _check(folder: Path) -> None:
    certificate.check(folder / "certificate", folder)


def _tokenize(folder: Path) -> None:
    tokenizer = bertjax.Tokenizer.from_folder(folder)
    tokenizer(["the cats.", ""], max_length=8).padded()
    tokenizer.decode([2, 5, 3])


def _sentences(folder: Path) -> None:
    read_spec(folder)
    bertjax.SentenceEncoder.from_pretrained(folder)


def _with_tokenizer_json(folder: Path) -> None:
    put(folder, {"vocab.txt": "\n".join(VOCAB) + "\n"})
    bertjax.Tokenizer.from_vocab(folder / "vocab.txt").save_pretrained(folder)


_SENTENCE_VICTIMS = (
    "modules.json",
    "1_Pooling/config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)
FORMATS = {
    "safetensors": _weights(lambda state: {"model.safetensors": safetensors(state)}, "model.safetensors"),
    "sharded": _weights(lambda state: shards(state, "model", ".safetensors", safetensors), "model*"),
    "torch": _weights(lambda state: {"pytorch_model.bin": torch_file(state)}, "pytorch_model.bin"),
    "legacy": _weights(lambda state: {"pytorch_model.bin": legacy_file(state)}, "pytorch_model.bin"),
    "bins": _weights(lambda state: shards(state, "pytorch_model", ".bin", torch_file), "pytorch_model*"),
    "tf1": _weights(tensorflow, "bert.ckpt.index", "bert.ckpt.index", "bert.ckpt.data*"),
    "msgpack": _converted("msgpack", "flax_model.msgpack"),
    "orbax": _converted("orbax", "params/**/*"),
    "config": _weights(lambda state: {"model.safetensors": safetensors(state)}, "config.json"),
    "layout": _converted("msgpack", "bertjax_layout.json"),
    "certificate": _converted("safetensors", "certificate"),
    "tokenizer": Format(_with_tokenizer_json, ("tokenizer.json", "tokenizer_config.json"), _tokenize),
    "vocabulary": Format(
        lambda folder: put(folder, sentence_files()), ("vocab.txt", "tokenizer_config.json"), _tokenize
    ),
    "sentence": Format(lambda folder: put(folder, sentence_files()), _SENTENCE_VICTIMS, _sentences),
}

# Damage

_BYTES = (0, 1, 0x7F, 0x80, 0xFE, 0xFF)
_NUMBERS = (0, 1, -1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, (1 << 63) - 1, -(1 << 63), 100_000)


def _span(rng: random.Random, data: bytes, most: int = 64) -> tuple[int, int]:
    begin = rng.randrange(len(data) + 1)
    return begin, min(len(data), begin + rng.randint(1, most))


def _flip(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def _set(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([rng.choice(_BYTES)]) + data[at + 1 :]


def _insert(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + bytes(rng.choice(_BYTES) for _ in range(rng.randint(1, 9))) + data[at:]


def _delete(rng: random.Random, data: bytes) -> bytes:
    begin, end = _span(rng, data)
    return data[:begin] + data[end:]


def _repeat(rng: random.Random, data: bytes) -> bytes:
    begin, end = _span(rng, data, 400)
    return data[:end] + data[begin:end] * rng.choice((1, 1, 2, 50)) + data[end:]


def _truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def _splice(rng: random.Random, data: bytes) -> bytes:
    begin, end = _span(rng, data, 2000)
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[begin:end] + data[at + rng.choice((0, end - begin)) :]


def _integer(rng: random.Random, data: bytes) -> bytes:
    at, size = rng.randrange(len(data)), rng.choice((1, 2, 4, 8))
    value = rng.choice(_NUMBERS) % (1 << 8 * size)
    return data[:at] + value.to_bytes(size, rng.choice(("little", "big"))) + data[at + size :]


_ANY = (_flip, _set, _insert, _delete, _repeat, _truncate, _splice, _integer)

_DEEP = '"@deep"'
_LEAVES = (
    None, True, False, "", "x", "../x", "/etc/passwd", "\ud800", "\0", "a" * 300, "[UNK]", 0, -1, 0.5, 1e308, 10**12,
    2**31, 2**63, 10**400, float("nan"), float("inf"), [], {}, [None], [[1, 2]], {"": 1}, {"x": {}}, "@deep",
)  # fmt: skip


def _json(rng: random.Random, data: bytes) -> bytes:
    """Changes a value, a key or the order in JSON; leaves other data alone."""
    try:
        value = json.loads(data)
    except ValueError:
        return data
    containers = []
    stack = [value]
    while stack:
        each = stack.pop()
        if isinstance(each, (dict, list)) and each:
            containers.append(each)
            stack += each.values() if isinstance(each, dict) else each
    if not containers:
        return data
    where = rng.choice(containers)
    key = rng.choice(list(where)) if isinstance(where, dict) else rng.randrange(len(where))
    kind = rng.randrange(5)
    if kind == 0:
        del where[key]
    elif kind == 1 and isinstance(where, dict):
        where[rng.choice((key + "x", "", "../x", "\ud800", key.upper(), "0", "__metadata__"))] = where.pop(key)
    elif kind == 2:
        other = rng.choice(containers)
        where[key] = rng.choice(list(other.values()) if isinstance(other, dict) else other)
    else:
        where[key] = rng.choice(_LEAVES)
    try:
        written = json.dumps(value, indent=rng.choice((None, 1)))
    except (ValueError, RecursionError):  # it now holds itself
        return data
    if rng.random() < 0.05:
        written = written.replace("{", '{"x": 1, "x": 2, ', 1)
    depth = rng.choice((65, 500, 990, 200_000))
    return written.replace(_DEEP, rng.choice(("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth))).encode()


_OPCODES = (
    symbol("os", "system") + text("true") + b"\x85R", b"\x8c\2os\x8c\6system\x93", b"R", b"b", b"s", b"u", b"a", b"e",
    b"t", b"(", b"0", b"1", b"2", b"h\0", b"q\0", b"j\xff\xff\xff\x7f", b"r\xff\xff\xff\xff", b"X\xff\xff\xff\xff",
    b"\x8a\x09\0\0\0\0\0\0\0\0\x80\0", number(-1), number(1 << 40), b"N", b"}", b"]", b")", b"Q", b"]q\0h\0a",
    symbol("torch", "LongStorage"), symbol("torch._utils", "_rebuild_parameter"), ORDERED,
)  # fmt: skip


def _pickle(rng: random.Random, data: bytes) -> bytes:
    """Removes, repeats, exchanges or adds an opcode of the first pickle that is long."""
    start = next((at for at in range(len(data) - 1) if data[at] == 0x80 and _length(data, at) > 500), None)
    if start is None:
        return data
    ends = [at for _, _, at in pickletools.genops(io.BytesIO(data[start:]))][1:]
    begin, end = (start + at for at in rng.choice(list(itertools.pairwise(ends))))
    new = rng.choice((b"", data[begin:end] * 2, rng.choice(_OPCODES), rng.choice(_OPCODES) + data[begin:end]))
    return data[:begin] + new + data[end:]


def _length(data: bytes, at: int) -> int:
    try:
        return max(place for _, _, place in pickletools.genops(io.BytesIO(data[at:])))
    except (ValueError, IndexError, UnicodeDecodeError, struct.error):
        return 0


def _any(rng: random.Random, data: bytes) -> bytes:
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        data = rng.choice(_ANY)(rng, data) if data else data
    return data


def _inner(change: Callable, rng: random.Random, data: bytes) -> bytes:
    """Damages what stands behind a container's own checks, and makes these hold again."""
    if data.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        pickled = change(rng, members.pop("m/data.pkl"))
        return torch_zip(pickled, [data for name, data in members.items() if name.startswith("m/data/")])
    if data.endswith(_TABLE_MAGIC):
        size = data.index(_seal(_block({}))) - len(_seal(b""))  # what stands before the block that is always empty
        return table(change(rng, data[:size]))
    if data[8:9] == b"{":
        size = int.from_bytes(data[:8], "little")
        return with_header(change(rng, data[8 : 8 + size]), data[8 + size :])
    return change(rng, data)


def damage(rng: random.Random, data: bytes) -> bytes:
    """A damaged copy of a file."""
    choice = rng.random()
    if data[:1] in b"{[":
        return _json(rng, data) if choice < 0.75 else _any(rng, data)
    if choice < 0.35:
        return _any(rng, data)
    if data[8:9] == b"{":
        return _inner(rng.choice((_json, _json, _any)), rng, data)
    if data.startswith((b"PK", b"\x80")):
        return _inner(rng.choice((_pickle, _pickle, _any)), rng, data)
    return _inner(_any, rng, data)


# The watch over one case

_EVENTS = ("import", "exec", "compile", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.",
           "socket.", "ctypes.", "pickle.", "marshal.", "webbrowser.", "ftplib.", "urllib.", "http.")  # fmt: skip
_PATHS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate")


class Watch:
    """Sees what a process does: imports, runs, and touches outside a folder. There is one in a process, for good.

    Nothing is allowed for: once all is imported, no library needs a file of its own, so there is no list to keep.
    """

    def __init__(self):
        self.folder, self.seen = None, []
        sys.addaudithook(self._hook)

    @contextlib.contextmanager
    def over(self, folder: Path) -> Iterator[list[str]]:
        """Collects what is done that nothing in this folder should make a reader do."""
        self.folder, self.seen = os.path.realpath(folder), []
        try:
            yield self.seen
        finally:
            self.folder = None

    def _hook(self, event: str, arguments: tuple) -> None:
        if self.folder is None:
            return
        outside = event in _PATHS and isinstance(arguments[0], (str, bytes)) and not self._is_inside(event, arguments)
        if event.startswith(_EVENTS) or outside:
            self.seen.append(f"{event} {arguments!r:.200}")

    def _is_inside(self, event: str, arguments: tuple) -> bool:
        path = os.fsdecode(arguments[0])
        if event != "open" and not os.path.isabs(path):
            return True  # relative to a folder that is open: that is how shutil.rmtree removes what it found
        folder = os.path.dirname(path)
        where = os.path.join(os.path.realpath(folder), os.path.basename(path))
        return where == self.folder or where.startswith(self.folder + os.sep)


def memory(what: str) -> int:
    """This process's memory in bytes: VmRSS is what it has, VmHWM the most it had, VmData what it asked for."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) << 10
    raise ValueError(what)


@contextlib.contextmanager
def limited(watch: Watch, folder: Path) -> Iterator[dict]:
    """Runs a block under watch; what it took is in the dict that this gives, when it ends."""
    Path("/proc/self/clear_refs").write_text("5")  # the most begins anew
    before, found = memory("VmRSS"), {}
    signal.alarm(MAX_SECONDS)  # ends the process
    begin = time.perf_counter()
    try:
        with watch.over(folder) as seen:
            yield found
    finally:
        found["seconds"] = time.perf_counter() - begin
        signal.alarm(0)
        found["growth"] = max(0, memory("VmHWM") - before)
        found["seen"] = seen


def limit_memory() -> None:
    """From now on this process gets so much more memory, and no more; to be called when all is imported."""
    most = memory("VmData") + MAX_GROWTH + (256 << 20)  # the rest is for stacks of threads, which they hardly touch
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


# Cases


def make_all(root: Path, formats: list[str]) -> None:
    """Makes a valid folder of each format, and uses it, so that whatever is imported late is imported."""
    # Half of the time of a case is JAX's for the model's structure, which depends on nothing but the configuration.
    conversion.abstract_model = functools.lru_cache(64)(abstract_model)
    for name in formats:
        folder = root / name / "model"
        folder.parent.mkdir(parents=True)
        FORMATS[name].make(folder)
        FORMATS[name].use(folder)
        if FORMATS[name].use is _read:
            _convert(folder)


@dataclasses.dataclass(frozen=True)
class Case:
    """A damaged file in an otherwise valid folder."""

    format: str
    file: str
    content: bytes
    convert: bool


def make_case(root: Path, formats: list[str], seed: str, position: int) -> Case:
    """The case of a seed and a number; the seed "found" has the inputs that failed once."""
    if seed == "found":
        return read_found(found_cases()[position])
    rng = random.Random(f"{seed} {position}")
    name = rng.choice(formats)
    folder = root / name / "model"
    pattern = rng.choice(FORMATS[name].victims)
    file = rng.choice(sorted(path for path in folder.glob(pattern) if path.is_file() and path.stat().st_size))
    content = damage(rng, file.read_bytes())
    return Case(name, str(file.relative_to(folder)), content, FORMATS[name].use is _read and rng.random() < 0.05)


def run_case(root: Path, case: Case, watch: Watch) -> dict:
    """Runs a case, and says what came out."""
    folder = root / case.format / "model"
    kept = (folder / case.file).read_bytes()
    (folder / case.file).write_bytes(case.content)
    outcome, problem, failure = "read", "", None
    try:
        with limited(watch, folder.parent) as found:
            try:
                (_convert if case.convert else FORMATS[case.format].use)(folder)
            except bertjax.BertjaxError as error:
                outcome, message = type(error).__name__, str(error)
                if str(folder) not in message:
                    outcome, problem = "FAILED", f"the message names no file: {message[:300]}"
            except BaseException as error:
                outcome, failure = "FAILED", error
        if failure is not None:
            problem = "".join(traceback.format_exception(failure))[-3000:]
    finally:
        (folder / case.file).write_bytes(kept)
    left = [path.name for path in folder.parent.iterdir() if path.name != "model"]
    if found["seen"] or left or found["growth"] > MAX_GROWTH:
        outcome, problem = "FAILED", f"did {found['seen'][:5]}; left {left}; took {found['growth']:,} bytes. {problem}"
    return {"outcome": outcome, "problem": problem, "format": case.format, "file": case.file, **found}


def _work(formats: list[str], seed: str, positions: range) -> None:
    """The worker: one line of JSON before each case, and one after it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the panics of libraries
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        root = Path(name)
        make_all(root, formats)
        watch = Watch()
        limit_memory()
        for position in positions:
            case = make_case(root, formats, seed, position)
            print(json.dumps({"begin": position}), flush=True)
            print(json.dumps({"position": position, **run_case(root, case, watch)}), flush=True)


# The parent


def run(formats: list[str], seed: str, positions: range, report: Callable[[dict], object]) -> None:
    """Runs cases in workers, one after another; a worker that dies costs its case, and a new one goes on."""
    start = positions.start
    while start < positions.stop:
        stop = min(positions.stop, start + 2000)
        options = ["--seed", seed, "--formats", *formats, "--worker", str(start), str(stop)]
        command = [sys.executable, str(Path(__file__).resolve()), *options]
        begun = None
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as worker:
            for line in worker.stdout:
                result = json.loads(line)
                begun = result.get("begin")
                if begun is None:
                    report(result)
                    start = result["position"] + 1
        if begun is not None:
            died = f"the worker died with status {worker.returncode}"
            report({"position": begun, "outcome": "FAILED", "problem": died, "format": "?", "growth": 0, "seconds": 0})
            start = begun + 1
        elif worker.returncode:
            raise RuntimeError(f"the worker failed before its first case, with status {worker.returncode}")


def environment() -> dict[str, str]:
    """The environment of a process that runs cases."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def keep(formats: list[str], seed: str, position: int, folder: Path = FOUND) -> Path | None:
    """Keeps the damaged file of a case, as format--file--seed-number, unless it is large."""
    with tempfile.TemporaryDirectory() as root:
        for name in formats:
            (Path(root) / name).mkdir()
            FORMATS[name].make(Path(root) / name / "model")
        case = make_case(Path(root), formats, seed, position)
    if len(case.content) > 20_000:
        return None
    folder.mkdir(exist_ok=True)
    path = folder / f"{case.format}--{case.file.replace('/', '+')}--{seed}-{position}"
    path.write_bytes(case.content)
    return path


def found_cases() -> list[Path]:
    """The inputs that failed once."""
    return sorted(path for path in FOUND.glob("*--*--*"))


def read_found(path: Path) -> Case:
    """An input that failed once, as a case."""
    name, file, _ = path.name.split("--")
    return Case(name, file.replace("+", "/"), path.read_bytes(), FORMATS[name].use is _read)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", default="1")
    parser.add_argument("--only", type=int, help="the number of one case to run")
    parser.add_argument("--formats", nargs="*", choices=[*FORMATS], default=[*FORMATS])
    parser.add_argument("--worker", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _work(options.formats, options.seed, range(*options.worker))
        return
    positions = range(options.cases) if options.only is None else range(options.only, options.only + 1)
    results: list[dict] = []

    def report(result: dict) -> None:
        results.append(result)
        if result["outcome"] == "FAILED":
            kept = keep(options.formats, options.seed, result["position"])
            print(f"case {result['position']} ({result['format']}): {result['problem']}\nkept as {kept}", flush=True)

    begin = time.perf_counter()
    run(options.formats, options.seed, positions, report)
    seconds = time.perf_counter() - begin
    outcomes = Counter((result["format"], result["outcome"]) for result in results)
    for name in sorted({name for name, _ in outcomes}):
        counts = ", ".join(f"{outcome} {count}" for (each, outcome), count in sorted(outcomes.items()) if each == name)
        print(f"{name:12} {counts}")
    slowest, largest = (max(results, key=lambda result: result[key]) for key in ("seconds", "growth"))
    print(f"{len(results)} cases in {seconds:.0f} s: {dict(Counter(result['outcome'] for result in results))}")
    print(f"slowest {slowest['seconds']:.2f} s, case {slowest['position']} ({slowest['format']})")
    print(f"most memory {largest['growth'] >> 20} MB, case {largest['position']} ({largest['format']})")
    sys.exit(any(result["outcome"] == "FAILED" for result in results))


if __name__ == "__main__":
    main()
