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
# What queries and weights are clipped to that meet quantised pages.
FLOAT16_LARGEST = 65504.0
# Below every score, and finite: differences of maxima are never NaN.
FLOOR = -1e30
# Registers of a thread of the loading warpgroup; those that compute share what it leaves of the
# 64 Ki, which are 512 for each of the 128 threads of a warpgroup.
LOAD_REGISTERS = 24

# Where rows are split, the queries of so many items are in shared memory: those at work, and those
# that come next.
QUERY_STAGES = 2

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
        """Dtype of the matrix products.  Numbers of eight bits and fewer are float16 numbers, and
        becoming those takes a fourth of the instructions that it takes them to become bfloat16."""
        return "float16" if self.quantized else "bfloat16"

    @property
    def lift(self) -> float:
        """A power of two that weights are multiplied by: with the scale of a slot, which is its
        largest magnitude over the format's, they would be subnormal in float16."""
        return 2.0 ** round(math.log2(LARGEST[self.stored]) - 1) if self.quantized else 1

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

    @property
    def registers(self) -> int:
        """Registers of a thread that computes: a multiple of eight."""
        return min((512 - LOAD_REGISTERS) // self.groups, 240) // 8 * 8

    def tokens(self, problem: Problem) -> int:
        """Query positions in the tile of a warpgroup."""
        return 1 if self.split else self.rows // problem.G

    @property
    def small(self) -> bool:
        """Whether there is room in shared memory for further tiles of queries."""
        return self.rows <= 16

    def heads(self, problem: Problem) -> int:
        """KV heads of an item.  If rows are split, small tiles are of as many heads as there are
        warpgroups, one for each; of a head that they share, each would leave a part."""
        own = self.split and self.small and problem.K % self.groups == 0
        return self.groups if own else 1


def div(x: Any, y: int) -> Array:
    return lax.div(jnp.asarray(x, jnp.int32), jnp.int32(y))


def rem(x: Any, y: int) -> Array:
    return lax.rem(jnp.asarray(x, jnp.int32), jnp.int32(y))


@dataclass(frozen=True)
class Item:
    """An item of work and its KV heads: the how many-th it is here, its row in the table, the first
    head, how many blocks all of them have, and how many came before."""

    number: Array
    index: Array
    head: Array
    blocks: Array
    before: Array

    @property
    def queries(self) -> Array:
        """Where its queries are, if they are loaded ahead."""
        return rem(self.number, QUERY_STAGES)


@dataclass
class Worker:
    """What the warpgroups of a block have in common: the order of the work."""

    p: Problem
    t: Tiling
    multiprocessors: int
    inputs: dict[str, Any]
    scratch: dict[str, Any]

    def each_item(self, visit: Callable[[Item], None]) -> tuple[Array, Array]:
        """Call `visit` for each item in turn; returns how many items and how many blocks were."""
        here, stride = lax.axis_index("multiprocessor"), self.multiprocessors
        count, work = self.inputs["count"][0], self.inputs["work"]
        heads = self.t.heads(self.p)
        across = self.p.K // heads

        def turn(n, before):
            index = here + n * stride
            item, head = div(index, across), rem(index, across) * heads
            if not self.t.split:
                item = count - 1 - item  # the last tiles of a prompt take longest: they go first
            blocks = div(work[item, END] - work[item, BEGIN] + self.t.block - 1, self.t.block)
            visit(Item(n, item, head, blocks * heads, before))
            return before + blocks * heads

        turns = div(count * across - here + stride - 1, stride)
        return turns, lax.fori_loop(0, turns, turn, jnp.int32(0))


@dataclass
class Loader(Worker):
    """The warpgroup that fills the ring."""

    def run(self) -> None:
        plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")
        items, blocks = self.each_item(self._load_item)
        self._await_last("free", blocks, self.t.stages)
        if self.t.split:
            self._await_last("q_free", items, QUERY_STAGES)

    def _await_last(self, name: str, total: Array, places: int) -> None:
        """Await the end of everything that is still in use: a barrier must not go before what
        arrives at it."""
        for n in range(places):

            @pl.when(n < total)
            def _(n=n):
                place = rem(jnp.maximum(total - places, 0) + n, places)
                plgpu.barrier_wait(self.scratch[name].at[place])

    def _load_item(self, item: Item) -> None:
        p, t, work, scratch = self.p, self.t, self.inputs["work"], self.scratch
        piece, heads = min(t.block, p.S), t.heads(p)
        row, begin = work[item.index, ROW], work[item.index, BEGIN]
        last = div(work[item.index, KV_LEN] - 1, p.S)
        if t.split:
            self._load_queries(item)

        def load_block(n, _):
            slot = rem(item.before + n, t.stages)
            reused = item.before + n >= t.stages
            pl.when(reused)(lambda: plgpu.barrier_wait(scratch["free"].at[slot]))
            head = item.head + rem(n, heads)
            for at in range(0, t.block, piece):
                first = begin + div(n, heads) * t.block + at
                # Past the row's end anything will do that has been written or will be masked.
                page = self.inputs["table"][row, jnp.minimum(div(first, p.S), last)]
                source = (page * p.K + head) * (p.S // piece) + div(rem(first, p.S), piece)
                for name in ("k", "v", "k_scale", "v_scale")[: 4 if p.quantized else 2]:
                    target = scratch[f"{name}_smem"].at[slot, pl.ds(at, piece)]
                    plgpu.copy_gmem_to_smem(
                        self.inputs[name].at[source], target, scratch["full"].at[slot]
                    )

        lax.fori_loop(0, item.blocks, load_block, None)

    def _load_queries(self, item: Item) -> None:
        """While the warpgroups that compute are still busy with the item before."""
        place, scratch = item.queries, self.scratch
        pl.when(item.number >= QUERY_STAGES)(
            lambda: plgpu.barrier_wait(scratch["q_free"].at[place])
        )
        tile, heads = self.inputs["work"][item.index, TILE], self.t.heads(self.p)
        for n in range(heads):
            source = self.inputs["q"].at[tile, item.head + n]
            target = scratch["q_smem"].at[place * heads + n, pl.ds(0, self.p.padded)]
            plgpu.copy_gmem_to_smem(source, target, scratch["q_full"].at[place])
