"""What is known of a program that was compiled for a target: `Report`, read off its HLO."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from jaxinfer.aot.hlo import Instruction, Module, Shape, parse
from jaxinfer.aot.traffic import FREE, FREE_TARGETS, kernel_traffic, traffic

COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip
# What a fusion that only copies consists of.
COPYING = frozenset({"parameter", "copy", "transpose", "bitcast", "reshape", "tuple", "constant"})
# Custom calls that are Pallas kernels: Mosaic for TPU, Mosaic GPU.
KERNELS = re.compile(r"tpu_custom_call|mosaic_gpu", re.IGNORECASE)
CALLBACKS = re.compile(r"callback", re.IGNORECASE)
# Their results are made by what they call.
BY_OTHERS = frozenset({"while", "conditional", "call", "call-done"})
HOST_TRANSFERS = ("infeed", "outfeed", "send", "recv")


@dataclass(frozen=True)
class Memory:
    """Bytes on each device, with a TPU's padding.

    aliased: of the outputs, what lies in the memory of donated arguments.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """What must be there at once to run the program."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclass(frozen=True)
class Moved:
    """A kind of instruction on one shape, how often it runs, and the bytes of one result.

    kind: a collective's name, or "copy".
    """

    kind: str
    shape: str
    count: int
    bytes: int


@dataclass(frozen=True)
class Report:
    """A compiled program; all figures are those of one device and one run.

    arguments: name and bytes of each, in order.  aliased: names of those whose memory a result
    takes over.  donated: how many were given for that.
    hbm_bytes: read and written in main memory, see `traffic.traffic`.  kernel_bytes: of these, by
    Pallas kernels.
    unknown_loops: loops whose number of turns depends on data; they count as asked for.
    collectives: asynchronous ones count once.
    copies: whole arrays from main memory to main memory, transposed or not.
    largest: of each number format, bytes of the largest array that is made in main memory.
    kernels: targets of custom calls that are Pallas kernels, and how often they run; custom_calls:
    of all others.
    host_callbacks: what waits for the host, by name.  f64: instructions with 64-bit floats.
    products: which numbers are multiplied as matrices, and what they are summed in, such as
        "s8 x s8 -> s32"; without those in kernels and other custom calls.
    warnings: what the compiler said about spilled registers and the like.
    """

    target: str
    name: str
    memory: Memory
    arguments: tuple[tuple[str, int], ...] = dataclasses.field(repr=False)
    aliased: tuple[str, ...] = dataclasses.field(repr=False)
    donated: int
    hbm_bytes: int
    kernel_bytes: int
    unknown_loops: int
    collectives: tuple[Moved, ...]
    copies: tuple[Moved, ...]
    largest: dict[str, int]
    kernels: dict[str, int]
    custom_calls: dict[str, int]
    host_callbacks: tuple[str, ...]
    f64: int
    lower_seconds: float
    compile_seconds: float
    products: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def collective(self, kind: str) -> int:
        """How many collectives of a kind run."""
        return sum(one.count for one in self.collectives if one.kind == kind)

    def copies_of(self, *arrays: Any) -> tuple[Moved, ...]:
        """The copies whose size is that of one of these arrays (what one device holds of them).

        Sizes are compared, not shapes: a copy often has the same elements in another order.
        """
        sizes = {_array_size(array) for array in arrays}
        return tuple(one for one in self.copies if _text_size(one.shape) in sizes)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; the lists of arguments become their lengths."""
        values = dataclasses.asdict(self)
        values["memory"]["total"] = self.memory.total
        values["arguments"], values["aliased"] = len(self.arguments), len(self.aliased)
        return values


def read(text: str, unknown_trips: int = 1) -> dict[str, Any]:
    """The fields of `Report` that stand in the HLO text of a compiled program."""
    module = parse(text)
    moved = traffic(module, unknown_trips)
    parameters = module.entry.parameters
    collectives, copies = Counter[tuple[str, Shape]](), Counter[tuple[str, Shape]]()
    kernels, others, callbacks = Counter[str](), Counter[str](), Counter[str]()
    kernel_bytes, largest = 0, dict[str, int]()
    for times, computation, one in module.executed():
        if one.opcode not in FREE | BY_OTHERS and not one.opcode.endswith("-start"):
            for shape in one.shapes:
                if shape.space == 0:
                    largest[shape.dtype] = max(largest.get(shape.dtype, 0), shape.bytes)
        if kind := _collective(one):
            for shape in _exchanged(module, one):
                collectives[kind, shape] += times
        elif shape := _copied(module, one):
            copies["copy", shape] += times
        elif one.target and one.target not in FREE_TARGETS:
            is_kernel = KERNELS.search(one.target) is not None
            (kernels if is_kernel else others)[one.target] += times
            if is_kernel:
                operands = [computation.instructions[name] for name in one.operands]
                kernel_bytes += times * kernel_traffic(one, operands)
            if CALLBACKS.search(one.target):
                callbacks[one.target] += times
        elif one.opcode in HOST_TRANSFERS and "is_host_transfer=false" not in one.rest:
            callbacks[one.opcode] += times
    double = sum(
        shape.dtype in ("f64", "c128")
        for computation in module.computations.values()
        for one in computation.instructions.values()
        for shape in one.shapes
    )
    return {
        "arguments": tuple((one.label, one.bytes) for one in parameters),
        "aliased": tuple(parameters[number].label for number in module.aliases),
        "hbm_bytes": moved.bytes,
        "kernel_bytes": kernel_bytes,
        "unknown_loops": moved.unknown_loops,
        "collectives": _listed(collectives),
        "copies": _listed(copies),
        "largest": largest,
        "kernels": dict(kernels),
        "custom_calls": dict(others),
        "host_callbacks": tuple(callbacks),
        "f64": double,
        "products": _products(module),
    }


def _listed(counts: Counter[tuple[str, Shape]]) -> tuple[Moved, ...]:
    """The largest first."""
    found = [Moved(kind, str(shape), count, shape.bytes) for (kind, shape), count in counts.items()]
    return tuple(sorted(found, key=lambda one: -one.bytes))


def _collective(one: Instruction) -> str | None:
    kind = one.opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else None


def _exchanged(module: Module, one: Instruction) -> tuple[Shape, ...]:
    """The results of a collective; an asynchronous one lists its operands before them."""
    if not one.opcode.endswith("-start"):
        return one.shapes
    count = len(one.operands)
    return one.shapes[count : 2 * count] or one.shapes


def _copied(module: Module, one: Instruction) -> Shape | None:
    """The array that an instruction copies within main memory, or None."""
    inner = one.called("calls")
    if one.opcode in ("copy", "transpose"):
        shape, source = one.shapes[0], None
    elif one.opcode == "copy-start":
        shape, source = one.shapes[0], one.shapes[1]
    elif inner and one.opcode in ("fusion", "fusion-start"):
        parts = module.computations[inner].instructions.values()
        kinds = {part.opcode for part in parts}
        if not kinds <= COPYING or not kinds & {"copy", "transpose"}:
            return None
        shape, source = module.computations[inner].root.shapes[0], None
    else:
        return None
    on_chip = shape.space != 0 or (source is not None and source.space != 0)
    return None if on_chip or not shape.dims else shape


def _array_size(array: Any) -> tuple[int, int]:
    """(elements, bytes) of what one device holds of an array, abstract or not."""
    sharding = getattr(array, "sharding", None)
    shape = sharding.shard_shape(array.shape) if sharding is not None else array.shape
    count = math.prod(shape)
    return count, count * array.dtype.itemsize


def _text_size(shape: str) -> tuple[int, int]:
    dtype, _, dims = shape.rstrip("]").partition("[")
    count = math.prod(int(size) for size in dims.split(","))
    digits = re.search(r"\d+", dtype)
    return count, count * (max(int(digits[0]), 8) if digits else 8) // 8


def _products(module: Module) -> tuple[str, ...]:
    found = set()
    for computation in module.computations.values():
        for one in computation.instructions.values():
            if one.opcode in ("dot", "convolution"):
                factors = [computation.instructions[name].shapes[0].dtype for name in one.operands]
                found.add(f"{' x '.join(factors)} -> {one.shapes[0].dtype}")
    return tuple(sorted(found))
