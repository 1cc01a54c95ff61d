"""What a compiled program moves through the device's main memory, counted from its HLO.

XLA's own estimate counts what a TPU prefetches to on-chip memory twice and is empty on GPU; this
one counts every operand and result that lies in main memory, once for each unit that runs.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from jaxinfer.aot.hlo import Computation, Instruction, Module, trip_count

# They move nothing: names for memory, or the other half of what was counted already.
FREE = frozenset({
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier",
    "partition-id", "replica-id", "add-dependency", "domain", "call-update",
})  # fmt: skip
# Calls that the TPU compiler puts into the text as annotations.
FREE_TARGETS = frozenset({
    "AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "Sharding",
    "SPMDFullToShardShape", "SPMDShardToFullShape",
})  # fmt: skip
# The second one is asynchronous, as on a TPU's other cores.
CALLS = ("call", "call-start")
# Other halves of what was counted already.
HALVES = ("-done", "-update")
SLICES = ("slice", "dynamic-slice", "gather")
UPDATES = ("dynamic-update-slice", "scatter")


@dataclass(frozen=True)
class Traffic:
    """bytes: read and written.  unknown_loops: loops whose turns depend on data, each assumed to
    turn `unknown_trips` times."""

    bytes: int
    unknown_loops: int


def traffic(module: Module, unknown_trips: int = 1) -> Traffic:
    """Count the bytes of one run on one device.

    Loops: the body times its turns.  Conditionals: the cheapest branch, so what a program does
    only on request costs nothing.  Slices and gathers read what they return; updates and scatters
    that are done in place write what they change.  A kernel counts what its own estimate says, or
    else its operands and results once, aliased ones not twice.
    """
    counter = _Counter(module, unknown_trips)
    return Traffic(counter.computation(module.entry), counter.unknown_loops)


class _Counter:
    def __init__(self, module: Module, unknown_trips: int):
        self.module, self.unknown_trips, self.unknown_loops = module, unknown_trips, 0

    def computation(self, computation: Computation) -> int:
        return sum(self.unit(computation, one) for one in computation.instructions.values())

    def unit(self, computation: Computation, one: Instruction) -> int:
        """Bytes of one instruction that runs as a unit."""
        if one.opcode in FREE or one.target in FREE_TARGETS:
            return 0
        if one.opcode == "while":
            turns = trip_count(self.module, computation, one)
            if turns is None:
                turns, self.unknown_loops = self.unknown_trips, self.unknown_loops + 1
            called = [one.called("body"), one.called("condition")]
            return turns * sum(self.named(name) for name in called)
        if one.opcode == "conditional":
            before, counts = self.unknown_loops, []
            for name in one.branches:
                self.unknown_loops = before
                counts.append((self.named(name), self.unknown_loops))
            cheapest, self.unknown_loops = min(counts)
            return cheapest
        if one.opcode in CALLS:
            return self.named(one.called("to_apply"))
        operands = [computation.instructions[name] for name in one.operands]
        if one.opcode.endswith("-done"):
            return self.done(one, operands[0])
        inner = one.called("calls")
        if inner is not None:
            return self.fusion(self.module.computations[inner], operands)
        if one.target:
            return kernel_traffic(one, operands)
        if one.opcode.endswith("-start"):  # what it writes is counted at its other half
            if one.opcode.removesuffix("-start") in SLICES:
                return min(_result_size(one), operands[0].bytes)
            return sum(operand.bytes for operand in operands)
        if one.opcode in SLICES:
            return one.bytes * 2 + sum(operand.bytes for operand in operands[1:])
        if one.opcode in UPDATES:
            return _update_bytes(one, operands) * 2
        return one.bytes + sum(operand.bytes for operand in operands)

    def named(self, name: str | None) -> int:
        return self.computation(self.module.computations[name or ""])

    def done(self, one: Instruction, start: Instruction) -> int:
        if start.called("calls") or start.opcode in CALLS or start.opcode.endswith(HALVES):
            return 0
        return one.bytes

    def fusion(self, inner: Computation, operands: list[Instruction]) -> int:
        reads = 0
        for parameter, operand in zip(inner.parameters, operands, strict=True):
            if operand.bytes:  # else it is on the chip
                reads += min(self.reads(inner, parameter.name), operand.bytes)
        return reads + self.writes(inner, inner.root)

    def reads(self, computation: Computation, name: str) -> int:
        """Bytes that a fusion reads of one of its values: less than all if it only takes slices."""
        whole, total = computation.instructions[name].shapes, 0
        for user in computation.users[name]:
            first = user.operands[0] == name and user.operands.count(name) == 1
            if user.opcode in SLICES and first:
                total += _size(user)
            elif user.opcode in UPDATES and first:
                continue  # taken over in place
            elif self.is_view(user) and not user.is_root:
                total += self.reads(computation, user.name)
            else:
                return sum(shape.bytes for shape in whole)
        return total

    def writes(self, computation: Computation, one: Instruction) -> int:
        """Bytes that a fusion writes of one of its results: an update writes what it changes."""
        operands = [computation.instructions[name] for name in one.operands]
        if one.opcode == "tuple":
            return sum(self.writes(computation, operand) for operand in operands)
        if one.bytes == 0 and one.shapes:
            return 0
        if one.opcode in UPDATES:
            return _update_bytes(one, operands)
        if one.opcode == "bitcast":
            return self.writes(computation, operands[0])
        inner = one.called("calls")
        if one.opcode == "fusion" and inner:
            inner = self.module.computations[inner]
            return self.writes(inner, inner.root)
        return one.bytes

    def is_view(self, one: Instruction) -> bool:
        """Whether an instruction inside a fusion only renames what it is given."""
        if one.opcode == "fusion" and (name := one.called("calls")):
            inner = self.module.computations[name].instructions.values()
            return all(part.opcode in ("parameter", "bitcast") for part in inner)
        return one.opcode == "bitcast"


def _size(one: Instruction) -> int:
    return sum(shape.bytes for shape in one.shapes)


def _result_size(one: Instruction) -> int:
    """Size of what an asynchronous instruction returns: its shapes are the operands' first."""
    return one.shapes[len(one.operands)].bytes


def _update_bytes(one: Instruction, operands: list[Instruction]) -> int:
    """Size of what an update or a scatter writes into its first operand."""
    count = len(one.shapes)
    changed = operands[1] if one.opcode == "dynamic-update-slice" else operands[-count:]
    parts = changed if isinstance(changed, list) else [changed]
    return sum(_size(part) for part in parts)


def kernel_traffic(one: Instruction, operands: list[Instruction]) -> int:
    """What a custom call moves."""
    if said := estimate(one).get("bytes_accessed"):
        return int(said)
    read = sum(operand.bytes for operand in operands)
    aliases = one.rest.partition("output_to_operand_aliasing=")[2]
    indices = [int(index or 0) for index in re.findall(r"\{(\d*)\}: \(\d+, \{\d*\}\)", aliases)]
    written = [shape for index, shape in enumerate(one.shapes) if index not in indices]
    return read + sum(shape.bytes for shape in written if shape.space == 0)


def estimate(one: Instruction) -> dict[str, int]:
    """The cost that a Pallas kernel declares (`pallas_call(cost_estimate=…)`); {} if none."""
    found = re.search(r'"cost_estimate":(\{[^}]*\})', one.rest)
    return {key: int(value) for key, value in json.loads(found[1]).items()} if found else {}
