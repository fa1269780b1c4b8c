"""What a compiled program says about itself: reads the text of the optimised HLO.

For a TPU the compiler writes beside each instruction that it schedules how many cycles it expects it to take. That is
its own estimate, made to choose between layouts and schedules: it knows nothing of waiting for memory, and nothing of
kernels that are not its own. The text is a dump, not an interface: what is not found as expected raises ValueError.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>.+?) (?P<opcode>[a-z][a-z0-9-]*)\((?P<operands>[^)]*)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')
_SHAPE = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
#: What only moves or renames numbers: a fusion of nothing else is a copy.
_MOVES = frozenset({"copy", "transpose"})
#: What takes or replaces a part of its first operand, and leaves the rest of it where it is.
_PARTS = frozenset({"dynamic-slice", "slice", "gather", "dynamic-update-slice"})
_RENAMES = frozenset({"parameter", "bitcast", "reshape", "tuple", "get-tuple-element", "constant"})


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: its name, type, opcode, operands' names, and all of the line."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    line: str

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute such as `body` names."""
        found = re.search(rf"\b{attribute}=%?([\w.-]+)", self.line)
        return found and found[1]


class Program:
    """The computations of an optimised HLO module, by name.

    Args:
        text: what `compiled.as_text()` returns.

    Raises:
        ValueError: there is no entry computation.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = None
        current = None
        for line in text.splitlines():
            if found := _COMPUTATION.match(line):
                current = self.computations.setdefault(found["name"], [])
                self.entry = found["name"] if line.startswith("ENTRY") else self.entry
            elif current is not None and (found := _INSTRUCTION.match(line)):
                operands = tuple(re.findall(r"%([\w.-]+)", found["operands"]))
                current.append(Instruction(found["name"], found["type"], found["opcode"], operands, line))
        if self.entry is None:
            raise ValueError("the text has no entry computation, so it is not that of an HLO module")

    def scheduled(self, computation: str | None = None, times: int = 1) -> Iterator[tuple[int, Instruction]]:
        """Every instruction that runs by itself, inside loops too, and how many times it does."""
        for each in self.computations[computation or self.entry]:
            yield times, each
            if each.opcode == "while":
                yield from self.scheduled(each.called("body"), times * self._trips(each))
            elif each.opcode in ("call", "async-start"):
                yield from self.scheduled(each.called("to_apply") or each.called("calls"), times)

    def _trips(self, loop: Instruction) -> int:
        """How often a loop runs that counts from 0 to a constant, which is what a scan becomes."""
        if known := _TRIPS.search(loop.line):
            return int(known[1])
        condition = self.computations[loop.called("condition")]
        bounds = [int(n) for each in condition for n in re.findall(r" constant\((\d+)\)", each.line)]
        if len(bounds) != 1 or not any("direction=LT" in each.line for each in condition):
            raise ValueError(f"how often the loop {loop.name} runs is not seen from its condition")
        return bounds[0]

    def cycles(self) -> int:
        """The compiler's estimated cycles of one run, loops included."""
        return sum(times * int(n) for times, each in self.scheduled() for n in _ESTIMATE.findall(each.line))

    def kernels(self) -> int:
        """How many calls of kernels one run makes whose cycles the compiler does not estimate."""
        return sum(
            times
            for times, each in self.scheduled()
            if "tpu_custom_call" in each.line and each.opcode == "custom-call" and not _ESTIMATE.search(each.line)
        )

    def traffic(self, kernel: Instruction) -> int:
        """Bytes that a kernel reads and writes, each array once; of one that it takes or replaces a slice of, that."""
        computation = next(found for found in self.computations.values() if any(each is kernel for each in found))
        inside = self.computations.get(kernel.called("calls") or "", [])
        types = {each.name: each.type for each in (*computation, *inside)}
        # In a fusion's own computation an operand is a parameter, by its place.
        parameters = {
            int(re.search(r"parameter\((\d+)\)", e.line)[1]): e.name for e in inside if e.opcode == "parameter"
        }
        total = _bytes_of(kernel.type)
        for each in inside:
            if each.opcode == "dynamic-update-slice" and each.operands[0] in parameters.values():
                total += _bytes_of(types[each.operands[1]]) - _bytes_of(each.type)
        for place, name in enumerate(kernel.operands):
            readers = [each for each in inside if parameters.get(place) in each.operands]
            if readers and all(each.operands[0] == parameters[place] and each.opcode in _PARTS for each in readers):
                total += sum(_bytes_of(each.type) for each in readers if each.opcode != "dynamic-update-slice")
            else:
                total += _bytes_of(types[name])
        return total

    def prefetched_bytes(self) -> int:
        """Bytes that one run moves between memories beside the computation."""
        starts = ("copy-start", "slice-start")
        return sum(times * _moved_bytes(each) for times, each in self.scheduled() if each.opcode in starts)

    def moves(self, opcode: str) -> int:
        """How many instructions do nothing but copy or transpose ("copy" or "transpose"), written once in a loop."""
        reached = {id(each): each for _, each in self.scheduled()}
        return sum(self._is_move(each, opcode) for each in reached.values())

    def _is_move(self, each: Instruction, opcode: str) -> bool:
        if each.opcode != "fusion":
            return each.opcode == opcode
        inside = {part.opcode for part in self.computations[each.called("calls")]} - _RENAMES
        return opcode in inside and inside <= _MOVES

    def matmuls(self) -> list[tuple[str, ...]]:
        """The operands' dtypes of every matrix product, those inside fusions included."""
        found = []
        for instructions in self.computations.values():
            types = {each.name: each.type for each in instructions}
            for each in instructions:
                if each.opcode in ("dot", "convolution"):
                    found.append(tuple(_SHAPE.search(types[name])[1] for name in each.operands))
        return found


def _bytes_of(text: str) -> int:
    """Bytes of all arrays of a type."""
    return sum(
        math.prod(int(length) for length in shape.split(",") if length) * (1 if dtype == "pred" else int(bits) // 8)
        for dtype, bits, shape in _SHAPE.findall(text)
    )


def _moved_bytes(start: Instruction) -> int:
    """Bytes of what an asynchronous copy or slice writes: the smallest array of its type but for a counter."""
    return min((_bytes_of(found[0]) for found in re.finditer(_SHAPE, start.type) if found[3]), default=0)
