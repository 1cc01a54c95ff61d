"""What a kernel over pages has to do, in which order, and the warpgroup that loads the pages."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from jaxinfer.kernels.write_pages import LARGEST

LOG2E = math.log2(math.e)
# Below every score, and finite: differences of maxima are never NaN.
FLOOR = -1e30
# Registers of a thread of the loading warpgroup and of two computing ones; 128 of each have 64 Ki.
LOAD_REGISTERS, COMPUTE_REGISTERS = 24, 240

# Columns of the table of work: the row; the tile of queries; the position of the tile's begin, as
# if the row began no later; the row's length; the slots to visit; its first query's position.
ROW, TILE, POSITION, KV_LEN, BEGIN, END, FIRST = range(7)


@dataclass(frozen=True)
class Problem:
    """Sizes and options of `paged_attention`; `stored` is the dtype of the pages."""

    K: int
    G: int
    H: int
    S: int
    stored: str
    scale: float
    window: int | None
    soft_cap: float | None

    @property
    def padded(self) -> int:
        """Query heads of a KV head, rounded up to what a tile in memory can be cut at."""
        return -(-self.G // 8) * 8

    @property
    def quantized(self) -> bool:
        return self.stored in LARGEST

    @property
    def operand(self) -> str:
        """Dtype of the matrix products.  8-bit floats are float16 numbers, and becoming those takes
        a fourth of the instructions that it takes them to become bfloat16."""
        return "float16" if self.stored.startswith("float8") else "bfloat16"

    @property
    def lift(self) -> float:
        """A power of two that weights are multiplied by: with the scale of a slot, which is its
        largest magnitude over the format's, they would be subnormal in float16."""
        return 2.0 ** round(math.log2(LARGEST[self.stored]) - 1) if self.operand == "float16" else 1

    @property
    def width(self) -> int:
        """Elements that a slot stores; two numbers of four bits are one."""
        return self.H // 2 if self.stored == "uint8" else self.H

    @property
    def swizzled(self) -> int:
        """Columns over which operands are swizzled: both of a product must be so alike, and the
        halves of packed numbers are written one by one."""
        return self.width if self.stored == "uint8" else self.H


@dataclass(frozen=True)
class Tiling:
    """How a kernel divides its problem: `groups` computing warpgroups with `rows` query rows each,
    `stages` blocks of `block` slots in the ring."""

    split: bool
    rows: int
    groups: int
    block: int
    stages: int

    def tokens(self, problem: Problem) -> int:
        """Query positions in the tile of a warpgroup."""
        return 1 if self.split else self.rows // problem.G


def div(x: Any, y: int) -> Array:
    return lax.div(jnp.asarray(x, jnp.int32), jnp.int32(y))


def rem(x: Any, y: int) -> Array:
    return lax.rem(jnp.asarray(x, jnp.int32), jnp.int32(y))


@dataclass
class Worker:
    """What the warpgroups of a block have in common: the order of the work."""

    p: Problem
    t: Tiling
    multiprocessors: int
    inputs: dict[str, Any]
    scratch: dict[str, Any]

    def each_item(self, visit: Callable[[Array, Array, Array, Array], None]) -> Array:
        """Call `visit(item, head, number of blocks, blocks before)`; returns all blocks' number."""
        here, stride = lax.axis_index("multiprocessor"), self.multiprocessors
        count, work = self.inputs["count"][0], self.inputs["work"]

        def turn(n, before):
            index = here + n * stride
            item, head = div(index, self.p.K), rem(index, self.p.K)
            if not self.t.split:
                item = count - 1 - item  # the last tiles of a prompt take longest: they go first
            blocks = div(work[item, END] - work[item, BEGIN] + self.t.block - 1, self.t.block)
            visit(item, head, blocks, before)
            return before + blocks

        turns = div(count * self.p.K - here + stride - 1, stride)
        return lax.fori_loop(0, turns, turn, jnp.int32(0))


@dataclass
class Loader(Worker):
    """The warpgroup that fills the ring."""

    def run(self) -> None:
        plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")
        total = self.each_item(self._load_item)
        # Await the end of every block: a barrier must not go before what arrives at it.
        for n in range(self.t.stages):

            @pl.when(n < total)
            def _(n=n):
                slot = rem(jnp.maximum(total - self.t.stages, 0) + n, self.t.stages)
                plgpu.barrier_wait(self.scratch["free"].at[slot])

    def _load_item(self, item: Array, head: Array, blocks: Array, before: Array) -> None:
        p, t, work, scratch = self.p, self.t, self.inputs["work"], self.scratch
        piece = min(t.block, p.S)
        row, begin = work[item, ROW], work[item, BEGIN]
        last = div(work[item, KV_LEN] - 1, p.S)

        def load_block(n, _):
            slot = rem(before + n, t.stages)
            pl.when(before + n >= t.stages)(lambda: plgpu.barrier_wait(scratch["free"].at[slot]))
            for at in range(0, t.block, piece):
                first = begin + n * t.block + at
                # Past the row's end anything will do that has been written or will be masked.
                page = self.inputs["table"][row, jnp.minimum(div(first, p.S), last)]
                source = (page * p.K + head) * (p.S // piece) + div(rem(first, p.S), piece)
                for name in ("k", "v", "k_scale", "v_scale")[: 4 if p.quantized else 2]:
                    target = scratch[f"{name}_smem"].at[slot, pl.ds(at, piece)]
                    plgpu.copy_gmem_to_smem(
                        self.inputs[name].at[source], target, scratch["full"].at[slot]
                    )

        lax.fori_loop(0, blocks, load_block, None)
