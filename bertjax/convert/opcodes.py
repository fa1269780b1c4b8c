"""Pickles read as data: no name in them is ever looked up, imported or called.

A pickle is a program for a stack machine (see CPython's Lib/pickletools.py). This one knows the opcodes that torch
writes for a state dict, and builds plain containers, tensor descriptions and inert symbols. The bytes are hostile:

- A length is compared with a cap and with what is left before anything is taken, so it allocates nothing by itself.
- An opcode costs constant time and memory, or what its own bytes and operands on the stack cost. What the memo returns
  is the same object, never a copy, so that structures that would unfold to exabytes stay as small as their opcodes.
- Nothing recurses into what was built, which may be very deep or hold itself; nor is it printed, hashed or compared.
"""

import dataclasses
import pickletools
import re
import struct
from collections.abc import Callable, Mapping

import numpy as np

from bertjax.convert.tensors import DTYPES

#: In all pickles of a file together. Those of a BERT-large with its optimiser have 50,000; this many take a second and
#: 100 MB at worst.
MAX_OPCODES = 1 << 18
# Pickle's own writers put at most 1000 pairs on the stack at once for each level of nesting.
_MAX_STACK = 1 << 16
# Dict keys are a hundred characters long; what else a training checkpoint may hold (a configuration) is some pages.
_MAX_STRING = 1 << 16
# The longest integer is torch's magic number, of 10 bytes.
_MAX_INT_BYTES = 16
# Beyond these an integer as a key has others with the same hash, and a dict of such keys takes quadratic time.
_MAX_KEY = 1 << 32
# The longest allowed name of a module or a global is 31 characters long; a longer one is read to be named.
_MAX_NAME = 256


class Malformed(ValueError):
    """What a file holds is not what torch writes, or not supported; the message does not name the file."""


@dataclasses.dataclass(frozen=True, slots=True)
class Symbol:
    """A global that the pickle names, as a name only; a storage class has the dtype of its elements."""

    name: str
    dtype: np.dtype | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """A run of numbers outside the pickle, which tensors share.

    Attributes:
        key: what the container calls it, decimal digits.
        dtype: dtype of its elements.
        count: number of elements.
    """

    key: str
    dtype: np.dtype
    count: int

    @property
    def nbytes(self) -> int:
        """Size of its data in bytes."""
        return self.count * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor as the pickle describes it. Except for the storage, its fields may be anything and are to be checked."""

    storage: Storage
    offset: object
    shape: object
    strides: object


class Ordered(dict):
    """An OrderedDict; the one object that takes attributes, of which torch sets `_metadata`."""

    __slots__ = ()


@dataclasses.dataclass(frozen=True)
class Pickle:
    """What one pickle holds.

    Attributes:
        value: the object.
        end: position of the first byte behind the pickle.
        storages: every storage that it refers to, by key.
        left: how many of the opcodes allowed were not needed.
    """

    value: object
    end: int
    storages: Mapping[str, Storage]
    left: int


_STORAGES = {
    "BoolStorage": "BOOL",
    "ByteStorage": "U8",
    "CharStorage": "I8",
    "ShortStorage": "I16",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "IntStorage": "I32",
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "LongStorage": "I64",
}
_SYMBOLS = {
    name: Symbol(name)
    for name in (
        "collections.OrderedDict",
        "torch.Size",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",  # a parameter with Python attributes
    )
} | {f"torch.{name}": Symbol(f"torch.{name}", DTYPES[dtype]) for name, dtype in _STORAGES.items()}

# Kinds of tensors that torch can save and bertjax does not read, by the globals that betray them.
_UNSUPPORTED = {
    r"torch\._utils\._rebuild_qtensor|torch\.qu?int\w+|torch\.Q\w+Storage|torch\.per_\w+": "quantised tensors",
    r"torch\._utils\._rebuild_sparse\w*|torch\.serialization\._get_layout": "sparse tensors",
    r"torch\._utils\._rebuild_nested_tensor": "nested tensors",
    r"torch\._utils\._rebuild_meta_tensor_no_storage": "tensors without data (of the device 'meta')",
    r"torch\._utils\._rebuild_(device|xla)_tensor\w*": "tensors that were never copied to the CPU",
    r"torch\._utils\._rebuild_wrapper_subclass|torch\._tensor\._rebuild_from_type\w*": "tensors with attributes",
    r"torch\._utils\._rebuild_tensor_v3|torch\.Complex\w+|torch\.(storage\.)?UntypedStorage": "tensors of such a dtype",
}


def quote(value: object) -> str:
    """Shows a value from a file in a message: text and numbers shortened, of anything else the kind only."""
    if type(value) is str:
        return repr(value if len(value) <= 100 else value[:100] + "...")
    return repr(value) if type(value) in (int, float, bool, type(None)) else kind(value)


def kind(value: object) -> str:
    """Names the kind of a value from a file for a message."""
    name = "OrderedDict" if type(value) is Ordered else type(value).__name__
    return "None" if value is None else f"an {name}" if name[0] in "aeioO" else f"a {name.lower()}"


def interpret(data: bytes, start: int, where: str, identifier: int = 0, budget: int = MAX_OPCODES) -> Pickle:
    """Reads one pickle as data.

    Args:
        data: the bytes.
        start: where in them the pickle begins.
        where: what the bytes are, for messages.
        identifier: how many elements the identifier of a storage has; 0: storages are refused.
        budget: how many opcodes it may have; what the pickles before it in the file left.

    Raises:
        Malformed: it is not a pickle of plain data and tensors; says at which byte and why.
    """
    machine = _Machine(data, start, identifier, budget)
    try:
        return machine.run()
    except Malformed as problem:
        raise Malformed(f"{where}, byte {machine.at}: {problem}") from None


class _Machine:
    """The stack machine, for one pickle."""

    def __init__(self, data: bytes, start: int, identifier: int, budget: int):
        self.budget = budget
        self.data, self.at, self.position, self.identifier = data, start, start, identifier
        self.stack: list[object] = []
        self.marks: list[int] = []  # for each open MARK, the height of the stack there
        self.memo: dict[int, object] = {}
        self.storages: dict[str, Storage] = {}

    def run(self) -> Pickle:
        """Runs the opcodes up to STOP."""
        if self.data[self.at : self.at + 1] != b"\x80":
            raise Malformed("no pickle begins here")
        for left in reversed(range(self.budget)):
            self.at = self.position
            opcode = self.take(1)
            if opcode == b".":
                return Pickle(self.result(), self.position, self.storages, left)
            action = _ACTIONS.get(opcode)
            if action is None:
                known = pickletools.code2op.get(opcode.decode("latin-1"))
                raise Malformed(
                    f"{f'opcode {known.name}' if known else f'byte {opcode!r}'} is not part of a state dict"
                )
            action(self)
            if len(self.stack) > _MAX_STACK or len(self.marks) > _MAX_STACK:
                raise Malformed(f"more than {_MAX_STACK} values wait on the stack; no checkpoint needs that")
        raise Malformed(f"the file has more than {MAX_OPCODES} opcodes; no checkpoint of a BERT is as long")

    def result(self) -> object:
        if len(self.stack) != 1 or self.marks:
            raise Malformed(f"the pickle ends with {len(self.stack)} values, expected one")
        return self.stack[0]

    def take(self, count: int) -> bytes:
        """The next bytes."""
        end = self.position + count
        if end > len(self.data):
            raise Malformed("the pickle ends early; the file is cut short or damaged")
        taken, self.position = self.data[self.position : end], end
        return taken

    def number(self, count: int) -> int:
        """The next bytes as an unsigned number."""
        return int.from_bytes(self.take(count), "little")

    def text(self, width: int) -> None:
        """Pushes a string, whose length comes first, in this many bytes."""
        length = self.number(width)
        if length > _MAX_STRING:
            raise Malformed(f"a string of {length} bytes; at most {_MAX_STRING} are read")
        self.stack.append(_decode(self.take(length)))

    def line(self) -> str:
        """The next line."""
        end = self.data.find(b"\n", self.position, self.position + _MAX_NAME + 1)
        if end < 0:
            raise Malformed(f"the name of a global has no end within {_MAX_NAME} bytes")
        text = _decode(self.take(end - self.position))
        self.position = end + 1
        return text

    def pop(self, count: int = 1) -> tuple:
        """Takes values from the stack, none from below the last mark."""
        base = len(self.stack) - count
        if base < (self.marks[-1] if self.marks else 0):
            raise Malformed("the stack has too few values")
        values = tuple(self.stack[base:])
        del self.stack[base:]
        return values

    def pop_mark(self) -> list[object]:
        """Takes the values above the last mark, and the mark."""
        if not self.marks:
            raise Malformed("the stack has no mark")
        base = self.marks.pop()
        values = self.stack[base:]
        del self.stack[base:]
        return values

    def top(self, expected: tuple[type, ...], action: str) -> object:
        """The value on the stack that is to be changed."""
        (value,) = self.pop()
        self.stack.append(value)
        if type(value) not in expected:
            raise Malformed(f"it {action} {kind(value)}")
        return value

    def protocol(self) -> None:
        version = self.number(1)
        if not 2 <= version <= 5:
            raise Malformed(f"pickle protocol {version}, expected 2 to 5")

    def frame(self) -> None:
        self.take(8)  # how much to read ahead; nothing to do

    def mark(self) -> None:
        self.marks.append(len(self.stack))

    def long(self) -> None:
        width = self.number(1)
        if width > _MAX_INT_BYTES:
            raise Malformed(f"an integer of {width} bytes; at most {_MAX_INT_BYTES} are read")
        self.stack.append(int.from_bytes(self.take(width), "little", signed=True))

    def put(self, index: int) -> None:
        if not self.stack:
            raise Malformed("the stack is empty")
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise Malformed(f"memo entry {index} does not exist")
        self.stack.append(self.memo[index])

    def append(self, values: list | tuple) -> None:
        self.top((list,), "appends to").extend(values)

    def set_items(self, values: list | tuple) -> None:
        target = self.top((dict, Ordered), "sets items of")
        if len(values) % 2:
            raise Malformed("a key has no value")
        _insert(target, zip(values[::2], values[1::2], strict=True))

    def find_global(self, module: object, name: object) -> None:
        if type(module) is not str or type(name) is not str:
            raise Malformed(f"a global is named by {kind(module)} and {kind(name)}")
        self.stack.append(_symbol(f"{module}.{name}"))

    def reduce(self) -> None:
        symbol, arguments = self.pop(2)
        rebuild = _REBUILD.get(symbol.name) if type(symbol) is Symbol else None
        if rebuild is None or type(arguments) is not tuple:
            raise Malformed(f"it calls {quote(symbol.name) if type(symbol) is Symbol else kind(symbol)}")
        self.stack.append(rebuild(arguments))

    def build(self) -> None:
        (state,) = self.pop()
        self.top((Ordered,), "sets attributes of")
        if type(state) is not dict:
            raise Malformed(f"the attributes of an OrderedDict are {kind(state)}")

    def persistent(self) -> None:
        (identifier,) = self.pop()
        storage = _storage(identifier, self.identifier)
        if self.storages.setdefault(storage.key, storage) != storage:
            raise Malformed(f"storage {quote(storage.key)} is described twice, with another dtype or size")
        self.stack.append(storage)


def _decode(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise Malformed(f"a string is not UTF-8 ({data[:20]!r})") from None


def _symbol(name: str) -> Symbol:
    if name in _SYMBOLS:
        return _SYMBOLS[name]
    for pattern, words in _UNSUPPORTED.items():
        if re.fullmatch(pattern, name, re.ASCII):
            raise Malformed(f"the file uses {quote(name)}; bertjax does not read {words}")
    raise Malformed(
        f"the file wants to import {quote(name)}; it is a program, not only weights, and nothing of it was run. "
        f"If you trust its author, load it with torch and save model.state_dict() alone"
    )


def _insert(target: dict, pairs) -> None:
    for key, value in pairs:
        # A tuple's hash may take for ever.
        if not (type(key) is str or (type(key) is int and abs(key) < _MAX_KEY)):
            raise Malformed(f"the key of a dict is {quote(key)}, expected text or a small integer")
        if key in target:
            raise Malformed(f"a dict has the key {quote(key)} twice")
        target[key] = value


def _storage(identifier: object, length: int) -> Storage:
    """The storage that an identifier describes: ("storage", class, key, device, count), legacy files add a view."""
    if type(identifier) is not tuple or len(identifier) != length or identifier[:1] != ("storage",):
        raise Malformed(f"a persistent id is {kind(identifier)}, expected a storage's")
    _, symbol, key, _, count, *view = identifier
    if type(symbol) is not Symbol or symbol.dtype is None:
        raise Malformed(f"the class of a storage is {quote(symbol.name) if type(symbol) is Symbol else kind(symbol)}")
    if type(key) is not str or not re.fullmatch("[0-9]{1,20}", key):
        raise Malformed(f"the key of a storage is {quote(key)}, expected decimal digits")
    if type(count) is not int or count < 0:
        raise Malformed(f"storage {quote(key)} has {quote(count)} elements")
    if view not in ([], [None]):
        raise Malformed(f"storage {quote(key)} is a view of another, of torch before 0.4; load and save it with torch")
    return Storage(key, symbol.dtype, count)


def _ordered_dict(arguments: tuple) -> Ordered:
    if arguments:
        raise Malformed(
            "an OrderedDict is made of pairs, as Python 2 writes it; load and save it with torch on Python 3"
        )
    return Ordered()


def _size(arguments: tuple) -> tuple:
    if len(arguments) != 1 or type(arguments[0]) is not tuple:
        raise Malformed("a torch.Size is made of something other than a tuple")
    return arguments[0]


def _tensor(arguments: tuple) -> Tensor:
    """(storage, offset, shape, strides), and from version 2 on: requires_grad, hooks, and bits if any are set."""
    if len(arguments) not in (4, 6, 7) or type(arguments[0]) is not Storage:
        raise Malformed("a tensor is made of something other than a storage and its layout")
    if len(arguments) == 7 and (type(arguments[6]) is not dict or arguments[6]):
        raise Malformed("a tensor is conjugated or negated lazily; resolve_conj() and resolve_neg() before saving")
    return Tensor(*arguments[:4])


def _parameter(arguments: tuple) -> Tensor:
    """(tensor, requires_grad, hooks), and its attributes if there are any: all but the tensor is of no use here."""
    if len(arguments) not in (3, 4) or type(arguments[0]) is not Tensor:
        raise Malformed("a parameter is made of something other than a tensor")
    return arguments[0]


_REBUILD: Mapping[str, Callable[[tuple], object]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch.Size": _size,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}


def _push(make: Callable[[_Machine], object]) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(make(machine))


# What torch writes for a state dict in protocols 2 to 5.
_ACTIONS: Mapping[bytes, Callable[[_Machine], None]] = {
    b"\x80": _Machine.protocol,
    b"\x95": _Machine.frame,
    b"(": _Machine.mark,
    b"N": _push(lambda machine: None),
    b"\x88": _push(lambda machine: True),
    b"\x89": _push(lambda machine: False),
    b"K": _push(lambda machine: machine.number(1)),
    b"M": _push(lambda machine: machine.number(2)),
    b"J": _push(lambda machine: int.from_bytes(machine.take(4), "little", signed=True)),
    b"\x8a": _Machine.long,
    b"G": _push(lambda machine: struct.unpack(">d", machine.take(8))[0]),
    b"\x8c": lambda machine: machine.text(1),
    b"X": lambda machine: machine.text(4),
    b")": _push(lambda machine: ()),
    b"]": _push(lambda machine: []),
    b"}": _push(lambda machine: {}),
    b"\x85": _push(lambda machine: machine.pop(1)),
    b"\x86": _push(lambda machine: machine.pop(2)),
    b"\x87": _push(lambda machine: machine.pop(3)),
    b"t": _push(lambda machine: tuple(machine.pop_mark())),
    b"a": lambda machine: machine.append(machine.pop()),
    b"e": lambda machine: machine.append(machine.pop_mark()),
    b"s": lambda machine: machine.set_items(machine.pop(2)),
    b"u": lambda machine: machine.set_items(machine.pop_mark()),
    b"q": lambda machine: machine.put(machine.number(1)),
    b"r": lambda machine: machine.put(machine.number(4)),
    b"\x94": lambda machine: machine.put(len(machine.memo)),
    b"h": lambda machine: machine.get(machine.number(1)),
    b"j": lambda machine: machine.get(machine.number(4)),
    b"c": lambda machine: machine.find_global(machine.line(), machine.line()),
    b"\x93": lambda machine: machine.find_global(*machine.pop(2)),
    b"R": _Machine.reduce,
    b"b": _Machine.build,
    b"Q": _Machine.persistent,
}
