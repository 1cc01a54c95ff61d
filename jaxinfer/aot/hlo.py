"""Reads the text of an optimized HLO module: shapes with their layout, instructions, computations.

Only what analysis needs is kept.  Imports no jax.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([^\]]*)\](\{[^{}]*\})?")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_ALIAS = re.compile(r"\{[\d, ]*\}: \((\d+), \{[\d, ]*\}, (?:may|must)-alias\)")
_TILE = re.compile(r"T(\([^)]*\))+")
_NO_DATA = ("token", "opaque")


@dataclass(frozen=True)
class Shape:
    """One array in memory.

    space: 0 is the device's main memory (HBM); a TPU has others on the chip.
    bytes: as laid out, so with the padding of a TPU's tiles.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


def _shape(dtype: str, dims_text: str, layout: str) -> Shape:
    dims = tuple(int(size.lstrip("<=")) for size in dims_text.split(",") if size)
    space = re.search(r"S\((\d+)\)", layout)
    return Shape(dtype, dims, int(space[1]) if space else 0, _bytes(dtype, dims, layout))


def _bytes(dtype: str, dims: tuple[int, ...], layout: str) -> int:
    if dtype in _NO_DATA:
        return 0
    stored = re.search(r"E\((\d+)\)", layout)  # bits of an element that is packed
    digits = re.search(r"\d+", dtype)
    bits = int(stored[1]) if stored else max(int(digits[0]), 8) if digits else 8
    sizes = list(dims)
    if tiles := _TILE.search(layout):
        order = [int(axis) for axis in re.findall(r"\d+", layout.partition(":")[0])]
        tile = [int(size) for size in re.findall(r"\d+", tiles[0].partition(")")[0])]
        # The tile covers the last axes in memory; missing leading ones are of size 1.
        physical = [dims[axis] for axis in reversed(order)]
        physical = [1] * (len(tile) - len(physical)) + physical
        first = len(physical) - len(tile)
        sizes = physical[:first] + [
            -(-size // step) * step for size, step in zip(physical[first:], tile, strict=True)
        ]
    return math.prod(sizes) * bits // 8


@dataclass(frozen=True)
class Instruction:
    """shapes: of the result, a tuple's one after the other.  operands: names of instructions.

    rest: the attributes as text.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    literal: str
    rest: str
    is_root: bool

    @property
    def bytes(self) -> int:
        """Of the result, in main memory."""
        return sum(shape.bytes for shape in self.shapes if shape.space == 0)

    def called(self, attribute: str) -> str | None:
        """The name of the computation that an attribute such as `body` names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None

    @property
    def branches(self) -> tuple[str, ...]:
        """The computations that a conditional chooses from."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
        if listed:
            return tuple(_NAME.findall(listed[1]))
        either = [self.called("true_computation"), self.called("false_computation")]
        return tuple(name for name in either if name)

    @property
    def target(self) -> str:
        """What a custom call calls; "" for other instructions."""
        found = re.search(r'custom_call_target="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def label(self) -> str:
        """What the source calls it: for an argument of the program, its name."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.rest)
        return found[1].replace("\\", "") if found else self.name


@dataclass(frozen=True)
class Computation:
    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @cached_property
    def root(self) -> Instruction:
        return next(one for one in self.instructions.values() if one.is_root)

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """For each instruction, those that have it as an operand."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for one in self.instructions.values():
            for operand in dict.fromkeys(one.operands):
                users[operand].append(one)
        return users

    @cached_property
    def parameters(self) -> tuple[Instruction, ...]:
        """In order of their numbers."""
        found = [one for one in self.instructions.values() if one.opcode == "parameter"]
        return tuple(sorted(found, key=lambda one: int(one.literal)))


@dataclass(frozen=True)
class Module:
    """aliases: numbers of the arguments whose memory a result of the program takes over."""

    computations: dict[str, Computation]
    entry: Computation
    aliases: tuple[int, ...]

    def executed(self) -> Iterator[tuple[int, Computation, Instruction]]:
        """Every instruction that runs as a unit (not those inside a fusion): how often, and where.

        A loop whose number of turns is unknown counts one; a conditional counts all its branches.
        """
        return self._executed(self.entry, 1)

    def _executed(
        self, computation: Computation, times: int
    ) -> Iterator[tuple[int, Computation, Instruction]]:
        for one in computation.instructions.values():
            yield times, computation, one
            if one.opcode == "while":
                turns = trip_count(self, computation, one) or 1
                for name in (one.called("body"), one.called("condition")):
                    yield from self._executed(self.computations[name or ""], times * turns)
            elif one.opcode == "conditional":
                for name in one.branches:
                    yield from self._executed(self.computations[name], times)
            elif one.opcode in ("call", "call-start") and (name := one.called("to_apply")):
                yield from self._executed(self.computations[name], times)


def parse(text: str) -> Module:
    """Read what `compiled.as_text()` returns."""
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    entry = ""
    for line in text.splitlines():
        if current is None:
            if start := _COMPUTATION.match(line):
                current = computations[start[2]] = Computation(start[2])
                entry = start[2] if start[1] else entry
        elif line.startswith("}"):
            current = None
        elif start := _INSTRUCTION.match(line):
            one = _instruction(line, start)
            current.instructions[one.name] = one
    header = text.partition("\n")[0]
    aliases = tuple(int(number) for number in _ALIAS.findall(header))
    return Module(computations, computations[entry], aliases)


def _instruction(line: str, start: re.Match[str]) -> Instruction:
    line = re.sub(r"/\*index=\d+\*/", "", line)
    at = start.end()
    if line[at] == "(":
        end = _closing(line, at) + 1
    else:
        array = _ARRAY.match(line, at)
        end = array.end() if array else line.index(" ", at)
    shapes = tuple(_shape(*found.groups(default="")) for found in _ARRAY.finditer(line, at, end))
    opcode = _OPCODE.match(line, end)
    if opcode is None:
        raise ValueError(f"not an HLO instruction: {line.strip()[:200]}")
    close = _closing(line, opcode.end() - 1)
    inside = line[opcode.end() : close]
    has_operands = opcode[1] not in ("constant", "parameter")
    return Instruction(
        name=start[2],
        opcode=opcode[1],
        shapes=shapes,
        operands=tuple(_NAME.findall(inside)) if has_operands else (),
        literal="" if has_operands else inside,
        rest=line[close + 1 :],
        is_root=start[1] is not None,
    )


def _closing(text: str, at: int) -> int:
    """The index of the bracket that closes the one at `at`; the end if there is none."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, at):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    return len(text)


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often a loop in `computation` turns: said by the compiler, or read off a counter that
    goes from one constant to another; None if it depends on data."""
    if said := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(said[1])
    condition = module.computations[loop.called("condition") or ""]
    body = module.computations[loop.called("body") or ""]
    test = condition.root
    if test.opcode != "compare" or "direction=LT" not in test.rest:
        return None
    counter, bound = (condition.instructions[name] for name in test.operands)
    place = re.search(r"index=(\d+)", counter.rest)
    if counter.opcode != "get-tuple-element" or place is None:
        return None
    index = int(place[1])
    begin = _carried(computation, loop.operands[0], index)
    step = body.instructions[body.root.operands[index]] if body.root.opcode == "tuple" else None
    if step is None or step.opcode != "add":
        return None
    increments = [_constant(body, name) for name in step.operands]
    increment = next((value for value in increments if value is not None), None)
    limit = _constant(condition, bound.name)
    if begin is None or limit is None or not increment:
        return None
    return max(-(-(limit - begin) // increment), 0)


def _carried(computation: Computation, name: str, index: int) -> int | None:
    """The constant with which a loop's carried value starts."""
    start = computation.instructions[name]
    return _constant(computation, start.operands[index]) if start.opcode == "tuple" else None


def _constant(computation: Computation, name: str) -> int | None:
    one = computation.instructions[name]
    while one.opcode in ("copy", "bitcast"):
        one = computation.instructions[one.operands[0]]
    whole = one.opcode == "constant" and re.fullmatch(r"-?\d+", one.literal)
    return int(one.literal) if whole else None
