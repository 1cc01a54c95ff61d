"""Tiles of queries over pages: the kernel that `paged_attention_gpu` launches twice.

A block of threads takes one item of work after the other, an item being a tile of queries of one KV
head and a range of slots.  One warpgroup loads blocks of slots, page by page, into a ring in shared
memory; the others compute.  Either each has queries of its own and all see every block, or
(`Tiling.split`) all have the same queries and take turns at the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from jaxinfer.kernels.paged_attention_gpu_units import tiled
from jaxinfer.kernels.write_pages import LARGEST, Pool

LOG2E = math.log2(math.e)
# Below every score, and finite: differences of maxima are never NaN.
FLOOR = -1e30
# Registers of a thread that loads, and of one that computes, by the number of computing warpgroups;
# all threads together may have 64 Ki.
LOAD_REGISTERS, COMPUTE_REGISTERS = 24, {1: 240, 2: 240, 3: 160}

# Columns of the table of work: the row; where the tile's queries lie (rows of one token only) and
# the position of the first; the row's length; the slots to visit.
ROW, TOKEN, POSITION, KV_LEN, BEGIN, END = range(6)


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
    def width(self) -> int:
        """Elements that a slot stores; two numbers of four bits are one."""
        return self.H // 2 if self.stored == "uint8" else self.H


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


def scratch_types(problem: Problem, tiling: Tiling, unit: Any) -> dict[str, Any]:
    """Shared memory, barriers, and what the matrix unit needs."""
    p, t = problem, tiling
    # Both operands of a product must be swizzled alike, and the halves of packed numbers are
    # written one by one.
    operand = p.width if p.stored == "uint8" else p.H
    copies = (4 if p.quantized else 2) * (t.block // min(t.block, p.S))
    types = dict(
        q_smem=tiled((t.groups, t.rows, p.H), jnp.bfloat16, operand),
        k_smem=tiled((t.stages, t.block, p.width), p.stored),
        v_smem=tiled((t.stages, t.block, p.width), p.stored),
        full=plgpu.Barrier(num_arrivals=copies, num_barriers=t.stages),
        free=plgpu.Barrier(num_arrivals=t.groups, num_barriers=t.stages),
        q_full=plgpu.Barrier(num_barriers=t.groups),
    )
    if p.quantized:
        types |= dict(
            k_scale_smem=plgpu.SMEM((t.stages, t.block), jnp.float32),
            v_scale_smem=plgpu.SMEM((t.stages, t.block), jnp.float32),
            wide_smem=tiled((t.groups, t.block, p.H), jnp.bfloat16, operand),
        )
    if t.split:
        types |= dict(
            acc_smem=tiled((t.groups, t.rows, _columns(p.H)), jnp.float32),
            stat_smem=plgpu.SMEM((t.groups, 2, t.rows), jnp.float32),
        )
    return types | unit.scratch(t.groups, t.block, p.H)


def shared_bytes(problem: Problem, tiling: Tiling, unit: Any) -> int:
    """Shared memory of a block of threads; at least what the compiler will find."""
    total = 4096  # barriers, and the compiler's own room for reductions
    for ref in scratch_types(problem, tiling, unit).values():
        if getattr(ref, "memory_space", None) == plgpu.SMEM:
            size = math.prod(ref.shape) * jnp.dtype(ref.dtype).itemsize
            total += -(-size // 1024) * 1024
    return total


def attend(
    q: Array,
    pool: Pool,
    page_table_BM: Array,
    work: Array,
    count: Array,
    sinks: Array | None,
    *,
    problem: Problem,
    tiling: Tiling,
    unit: Any,
    multiprocessors: int,
) -> list[Array]:
    """Attention of the first `count[0]` items of `work` `[items, 6]`.

    q: if split `[T, K, padded G, H]`, else `[items, K, groups, rows, H]`, a tile's (token, head)
        pairs end to end.  sinks: `[K, rows]`, in base 2; not if split.
    Returns, if split, parts of results: sums of weighted values `[items, K, groups, padded G, H]`
    and `[items, K, groups, 2, rows]`, the maxima (base 2) that the weights are relative to and the
    sums of the weights, all float32; else results `[items, K, groups, rows, H]`, bfloat16.
    """
    p, t = problem, tiling
    # A page in pieces of at most a block: the copy engine takes whole pieces.
    piece = min(t.block, p.S)
    inputs = dict(q=q, k=pool.k_PKSH, v=pool.v_PKSH)
    if p.quantized:
        inputs |= dict(k_scale=pool.k_scale_PKS, v_scale=pool.v_scale_PKS)
    for name in set(inputs) - {"q"}:
        pages = inputs[name]
        inputs[name] = pages.reshape(-1, piece, *pages.shape[3:])
    inputs |= dict(table=page_table_BM, work=work, count=count)
    if sinks is not None:
        inputs |= dict(sinks=sinks)
    lead = (work.shape[0], p.K, t.groups)
    if t.split:
        out_type = [
            jax.ShapeDtypeStruct((*lead, p.padded, p.H), jnp.float32),
            jax.ShapeDtypeStruct((*lead, 2, t.rows), jnp.float32),
        ]
    else:
        out_type = [jax.ShapeDtypeStruct((*lead, t.rows, p.H), jnp.bfloat16)]

    def body(*refs, **scratch):
        named = dict(zip(inputs, refs, strict=False))
        outs = refs[len(inputs) :]
        group = lax.axis_index("warpgroup")

        @pl.when(group == t.groups)
        def _():
            _Loader(p, t, multiprocessors, named, scratch).run()

        @pl.when(group < t.groups)
        def _():
            matrix_unit = unit(scratch, group)
            _Computer(p, t, multiprocessors, named, scratch, outs, group, matrix_unit).run()

    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch_types(p, t, unit),
        grid=(multiprocessors,),
        grid_names=("multiprocessor",),
        num_threads=t.groups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*inputs.values())


def _columns(width: int) -> int:
    """Columns of a tile that are worked on at once where a whole row would take many registers."""
    return 64 if width % 64 == 0 else width


def _row_layout(width: int) -> Any:
    """Registers that hold eight neighbours of a row each: loads and stores of 8 and 16 bytes."""
    columns = next(n for n in (64, 32, 16) if width % n == 0)
    rows = 256 // columns
    return plgpu.Layout.TILED(
        plgpu.Tiling(((4 * rows, columns), (rows, columns), (8,))),
        warp_dims=(-5,),
        lane_dims=(-3, -2),
        vector_dim=-1,
    )


def _div(x: Any, y: int) -> Array:
    return lax.div(jnp.asarray(x, jnp.int32), jnp.int32(y))


def _rem(x: Any, y: int) -> Array:
    return lax.rem(jnp.asarray(x, jnp.int32), jnp.int32(y))


def _over_columns(x: Array, shape: tuple[int, ...]) -> Array:
    """A number for each row, beside every column."""
    return lax.broadcast_in_dim(x, shape, [0])


@dataclass
class _Worker:
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
            item, head = _div(index, self.p.K), _rem(index, self.p.K)
            if not self.t.split:
                item = count - 1 - item  # the last tiles of a prompt take longest: they go first
            blocks = _div(work[item, END] - work[item, BEGIN] + self.t.block - 1, self.t.block)
            visit(item, head, blocks, before)
            return before + blocks

        turns = _div(count * self.p.K - here + stride - 1, stride)
        return lax.fori_loop(0, turns, turn, jnp.int32(0))


@dataclass
class _Loader(_Worker):
    """The warpgroup that fills the ring."""

    def run(self) -> None:
        plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")
        total = self.each_item(self._load_item)
        # Await the end of every block: a barrier must not go before what arrives at it.
        for n in range(self.t.stages):

            @pl.when(n < total)
            def _(n=n):
                slot = _rem(jnp.maximum(total - self.t.stages, 0) + n, self.t.stages)
                plgpu.barrier_wait(self.scratch["free"].at[slot])

    def _load_item(self, item: Array, head: Array, blocks: Array, before: Array) -> None:
        p, t, work, scratch = self.p, self.t, self.inputs["work"], self.scratch
        piece = min(t.block, p.S)
        row, begin = work[item, ROW], work[item, BEGIN]
        last = _div(work[item, KV_LEN] - 1, p.S)

        def load_block(n, _):
            slot = _rem(before + n, t.stages)
            pl.when(before + n >= t.stages)(lambda: plgpu.barrier_wait(scratch["free"].at[slot]))
            for at in range(0, t.block, piece):
                first = begin + n * t.block + at
                # Past the row's end anything will do that has been written or will be masked.
                page = self.inputs["table"][row, jnp.minimum(_div(first, p.S), last)]
                source = (page * p.K + head) * (p.S // piece) + _div(_rem(first, p.S), piece)
                for name in ("k", "v", "k_scale", "v_scale")[: 4 if p.quantized else 2]:
                    target = scratch[f"{name}_smem"].at[slot, pl.ds(at, piece)]
                    plgpu.copy_gmem_to_smem(
                        self.inputs[name].at[source], target, scratch["full"].at[slot]
                    )

        lax.fori_loop(0, blocks, load_block, None)


@dataclass
class _Computer(_Worker):
    """A warpgroup that computes."""

    outs: tuple[Any, ...]
    group: Array
    unit: Any

    def run(self) -> None:
        plgpu.set_max_registers(COMPUTE_REGISTERS[self.t.groups], action="increase")
        self.q_ref = self.scratch["q_smem"].at[self.group]
        self.each_item(self._attend_item)
        plgpu.wait_smem_to_gmem(0)

    def _attend_item(self, item: Array, head: Array, blocks: Array, before: Array) -> None:
        p, t, work = self.p, self.t, self.inputs["work"]
        self.position, self.kv_len = work[item, POSITION], work[item, KV_LEN]
        begin = work[item, BEGIN]
        self._load_queries(item, head)

        def pass_by(n, _):
            slot = _rem(before + n, t.stages)
            plgpu.barrier_wait(self.scratch["full"].at[slot])
            plgpu.barrier_arrive(self.scratch["free"].at[slot])

        def take(n, carry):
            slot = _rem(before + n, t.stages)
            plgpu.barrier_wait(self.scratch["full"].at[slot])
            carry = self._fold(carry, slot, begin + n * t.block)
            plgpu.barrier_arrive(self.scratch["free"].at[slot])
            return carry

        def take_turn(n, carry):
            first, mine = n * t.groups, n * t.groups + self.group
            lax.fori_loop(first, mine, pass_by, None)
            carry = take(mine, carry)
            lax.fori_loop(mine + 1, jnp.minimum(first + t.groups, blocks), pass_by, None)
            return carry

        # Every warpgroup sees every block arrive and go, also those that are not its own.
        if t.split:
            turns = _div(blocks - self.group + t.groups - 1, t.groups)
            carry = lax.fori_loop(0, turns, take_turn, self._start())
            lax.fori_loop(turns * t.groups, blocks, pass_by, None)
            self._store_part(carry, item, head)
        else:
            self.position += self.group * t.tokens(p)
            end = jnp.minimum(self.position + t.tokens(p), self.kv_len)
            mine = _div(end - begin + t.block - 1, t.block)
            mine = jnp.where(self.position < self.kv_len, mine, 0)
            carry = lax.fori_loop(0, mine, take, self._start())
            lax.fori_loop(mine, blocks, pass_by, None)
            self._store_result(carry, item, head)

    def _load_queries(self, item: Array, head: Array) -> None:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last item's results leave from there
        arrived = self.scratch["q_full"].at[self.group]
        if self.t.split:
            source = self.inputs["q"].at[self.inputs["work"][item, TOKEN], head]
            plgpu.copy_gmem_to_smem(source, self.q_ref.at[pl.ds(0, self.p.padded)], arrived)
        else:
            source = self.inputs["q"].at[item, head, self.group]
            plgpu.copy_gmem_to_smem(source, self.q_ref, arrived)
        plgpu.barrier_wait(arrived)

    def _full(self, value: float, *shape: int) -> Array:
        layout = self.unit.LAYOUT if len(shape) == 2 else self.unit.LAYOUT.reduce(1)
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    def _start(self) -> tuple[Array, Array, Array]:
        """Weighted values, maxima in base 2, sums of weights: nothing seen yet."""
        rows = self.t.rows
        return self._full(0, rows, self.p.H), self._full(FLOOR, rows), self._full(0, rows)

    def _fold(self, carry, slot: Array, start: Array):
        """Fold the block in `slot`, whose first position is `start`, into an online softmax."""
        p, scratch = self.p, self.scratch
        acc, peak, total = carry
        scores = self.unit.scores(self.q_ref, self._operand(scratch["k_smem"].at[slot]))
        column = self.unit.LAYOUT.reduce(0)
        # Scores times `factor` are in base 2: the multiplication fuses with the subtraction below.
        factor = p.scale * (LOG2E if p.soft_cap is None else 1)
        if p.quantized:
            scale = plgpu.load(scratch["k_scale_smem"].at[slot], layout=column) * factor
            scores, factor = scores * lax.broadcast_in_dim(scale, scores.shape, [1]), 1
        if p.soft_cap is not None:
            # tanh(x) = 1 - 2 / (exp(2x) + 1); the chip's own tanh is good to three digits only.
            power = jnp.exp2(scores * (factor * 2 * LOG2E / p.soft_cap))
            scores, factor = p.soft_cap * LOG2E * (1 - 2 / (power + 1)), 1
        scores = self._mask(scores, start)
        new_peak = jnp.maximum(peak, scores.max(axis=1) * factor)
        shrink = jnp.exp2(peak - new_peak)
        weights = jnp.exp2(scores * factor - _over_columns(new_peak, scores.shape))
        total = total * shrink + weights.sum(axis=1)
        written = self.kv_len - start
        if p.quantized:
            scale = plgpu.load(scratch["v_scale_smem"].at[slot], layout=column)
            at = plgpu.broadcasted_iota(jnp.int32, scale.shape, 0, layout=column)
            scale = jnp.where(at < written, scale, 0.0)  # an unwritten scale may be NaN
            weights = weights * lax.broadcast_in_dim(scale, weights.shape, [1])
        acc = acc * _over_columns(shrink, acc.shape)
        v_ref = self._operand(scratch["v_smem"].at[slot])
        pl.when(written < self.t.block)(lambda: self._clear(v_ref, written))
        return self.unit.weigh(acc, weights.astype(jnp.bfloat16), v_ref), new_peak, total

    def _operand(self, ref: Any) -> Any:
        """Keys or values as the matrix unit takes them: bfloat16, before their scales."""
        p = self.p
        if not p.quantized:
            return ref
        wide = self.scratch["wide_smem"].at[self.group]
        step = 128 if p.width % 128 == 0 else p.width
        for at in range(0, p.width, step):
            columns = pl.ds(at, step)
            stored = plgpu.load(ref.at[:, columns], layout=_row_layout(step))
            if p.stored == "uint8":
                # Both halves of a byte as signed bytes: the low one plus 8, the high one times 16.
                low = lax.bitcast_convert_type((stored & 15) ^ 8, jnp.int8)
                high = lax.bitcast_convert_type(stored & 240, jnp.int8)
                wide[:, columns] = low.astype(jnp.bfloat16) - 8
                wide[:, pl.ds(p.width + at, step)] = high.astype(jnp.bfloat16) * 0.0625
            elif p.stored == "int8":
                wide[:, columns] = stored.astype(jnp.bfloat16)
            else:  # there is no instruction from 8-bit floats to bfloat16
                wide[:, columns] = stored.astype(jnp.float32).astype(jnp.bfloat16)
        plgpu.commit_smem()
        return wide

    def _clear(self, v_ref: Any, written: Array) -> None:
        """Zero the slots that nobody may see: a NaN would survive its zero weight.

        Warpgroups that share the block all do so; what they write is the same."""
        step = _columns(self.p.width)
        for at in range(0, self.p.H, step):
            piece = v_ref.at[:, pl.ds(at, step)]
            value = plgpu.load(piece, layout=_row_layout(step))
            slot = plgpu.broadcasted_iota(jnp.int32, value.shape, 0, layout=_row_layout(step))
            piece[...] = jnp.where(slot < written, value, 0)
        plgpu.commit_smem()

    def _mask(self, scores: Array, start: Array) -> Array:
        p, t = self.p, self.t
        last = jnp.minimum(self.position + t.tokens(p), self.kv_len) - 1
        all_seen = start + t.block <= jnp.minimum(self.position, last) + 1
        if p.window is not None:
            all_seen &= start > last - p.window

        def hide(scores):
            row, column = (
                plgpu.broadcasted_iota(jnp.int32, scores.shape, axis, layout=self.unit.LAYOUT)
                for axis in (0, 1)
            )
            limit = jnp.minimum(self.position + _div(row, p.G), last) - start
            seen = column <= limit
            if p.window is not None:
                seen &= column > limit - p.window
            return jnp.where(seen, scores, -jnp.inf)

        return lax.cond(all_seen, lambda scores: scores, hide, scores)

    def _store_result(self, carry, item: Array, head: Array) -> None:
        acc, peak, total = carry
        if "sinks" in self.inputs:
            row = self.unit.LAYOUT.reduce(1)
            sink = plgpu.load(self.inputs["sinks"].at[head], layout=row, optimized=False)
            new_peak = jnp.maximum(peak, sink)
            shrink = jnp.exp2(peak - new_peak)
            total = total * shrink + jnp.exp2(sink - new_peak)
            acc = acc * _over_columns(shrink, acc.shape)
        total = jnp.where(total == 0, 1.0, total)
        self.q_ref[...] = (acc * _over_columns(1 / total, acc.shape)).astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(self.q_ref, self.outs[0].at[item, head, self.group])

    def _store_part(self, carry, item: Array, head: Array) -> None:
        acc, peak, total = carry
        stat_ref = self.scratch["stat_smem"].at[self.group]
        acc_ref = self.scratch["acc_smem"].at[self.group]
        stat_ref[0], stat_ref[1] = peak, total
        step = acc_ref.shape[1]
        for at in range(0, self.p.H, step):
            if at:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            acc_ref[...] = acc[:, at : at + step]
            plgpu.commit_smem()
            target = self.outs[0].at[item, head, self.group, :, pl.ds(at, step)]
            plgpu.copy_smem_to_gmem(acc_ref.at[pl.ds(0, self.p.padded)], target)
        plgpu.copy_smem_to_gmem(stat_ref, self.outs[1].at[item, head, self.group])
