"""The warpgroups that compute: an online softmax over the blocks of an item."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from jaxinfer.kernels.gpu import float16_of_bytes, load, row_layout
from jaxinfer.kernels.paged_attention_gpu_units import full, keys_in_registers, over_columns
from jaxinfer.kernels.paged_attention_gpu_work import (
    BEGIN,
    FIRST,
    FLOAT16_LARGEST,
    FLOOR,
    KV_LEN,
    LOG2E,
    POSITION,
    ROW,
    TILE,
    Item,
    Worker,
    div,
    rem,
)


def columns_at_once(width: int) -> int:
    """Columns of a tile that are worked on at once where a whole row would take many registers."""
    return 64 if width % 64 == 0 else width


@dataclass
class Computer(Worker):
    """A warpgroup that computes."""

    outs: tuple[Any, ...]
    group: Array
    unit: Any

    def run(self) -> None:
        plgpu.set_max_registers(self.t.registers, action="increase")
        self.each_item(self._attend_item)
        plgpu.wait_smem_to_gmem(0)

    def _attend_item(self, item: Item) -> None:
        p, t, work = self.p, self.t, self.inputs["work"]
        self.position, self.kv_len = work[item.index, POSITION], work[item.index, KV_LEN]
        begin, blocks, before = work[item.index, BEGIN], item.blocks, item.before
        heads = t.heads(p)

        def take(n, carry):
            slot = rem(before + n, t.stages)
            plgpu.barrier_wait(self.scratch["full"].at[slot])
            carry = self._fold(carry, slot, begin + div(n, heads) * t.block)
            plgpu.barrier_arrive(self.scratch["free"].at[slot])
            return carry

        if t.split:
            plgpu.barrier_wait(self.scratch["q_full"].at[item.queries])
            # Each has places of its own in the ring, and meets them in turn.  They hold blocks of
            # its own head, if it has one: then those before were as many of each.
            first = rem(self.group + t.groups - rem(before, t.groups), t.groups)
            mine = rem(first, heads)
            self.q_ref = self.scratch["q_smem"].at[item.queries * heads + mine]
            turns = div(blocks - first + t.groups - 1, t.groups)
            carry = lax.fori_loop(
                0, turns, lambda n, carry: take(first + n * t.groups, carry), self._start()
            )
            plgpu.barrier_arrive(self.scratch["q_free"].at[item.queries])
            self._store_part(carry, item.index, item.head + mine, div(first, heads))
        else:
            self._load_queries(item)

            def pass_by(n, _):
                slot = rem(before + n, t.stages)
                plgpu.barrier_wait(self.scratch["full"].at[slot])
                plgpu.barrier_arrive(self.scratch["free"].at[slot])

            # Every warpgroup sees every block arrive and go, also those that it does not need.
            self.position += self.group * t.tokens(p)
            end = jnp.minimum(self.position + t.tokens(p), self.kv_len)
            mine = div(end - begin + t.block - 1, t.block)
            seen = (self.position < self.kv_len) & (work[item.index, FIRST] < end)
            mine = jnp.where(seen, mine, 0)
            carry = lax.fori_loop(0, mine, take, self._start())
            lax.fori_loop(mine, blocks, pass_by, None)
            self._store_result(carry, item)

    def _load_queries(self, item: Item) -> None:
        """A tile's, to where its results will leave from."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # those of the last item
        self.q_ref = self.scratch["q_smem"].at[self.group]
        arrived = self.scratch["q_full"].at[self.group]
        tile = self.inputs["work"][item.index, TILE]
        source = self.inputs["q"].at[tile, item.head, self.group]
        plgpu.copy_gmem_to_smem(source, self.q_ref, arrived)
        plgpu.barrier_wait(arrived)

    def _start(self) -> tuple[Array, Array, Array]:
        """Weighted values, maxima in base 2, sums of weights (a row's or, if they are summed late,
        each column's): nothing seen yet."""
        rows, layout = self.t.rows, self.unit.LAYOUT
        each = layout.reduce(1)
        total = full(0, layout, rows, self.t.block) if self.unit.SUMS_LATE else full(0, each, rows)
        return self.unit.start(rows, self.p.H), full(FLOOR, each, rows), total

    def _fold(self, carry, slot: Array, start: Array):
        """Fold the block in `slot`, whose first position is `start`, into an online softmax."""
        p, scratch = self.p, self.scratch
        acc, peak, total = carry
        k_ref, v_ref = scratch["k_smem"].at[slot], scratch["v_smem"].at[slot]
        scores = self._scores(k_ref, v_ref)
        column = self.unit.LAYOUT.reduce(0)
        # Scores times `factor` are in base 2: the multiplication fuses with the subtraction below.
        factor = p.scale * (LOG2E if p.soft_cap is None else 1)
        if p.quantized:
            scale = load(scratch["k_scale_smem"].at[slot], layout=column) * factor
            scores, factor = scores * lax.broadcast_in_dim(scale, scores.shape, [1]), 1
        if p.soft_cap is not None:
            # tanh(x) = 1 - 2 / (exp(2x) + 1); the chip's own tanh is good to three digits only.
            power = jnp.exp2(scores * (factor * 2 * LOG2E / p.soft_cap))
            scores, factor = p.soft_cap * LOG2E * (1 - 2 / (power + 1)), 1
        scores = self._mask(scores, start)
        new_peak = jnp.maximum(peak, scores.max(axis=1) * factor)
        shrink = jnp.exp2(peak - new_peak)
        weights = jnp.exp2(scores * factor - over_columns(new_peak, scores.shape))
        if self.unit.SUMS_LATE:
            total = total * over_columns(shrink, total.shape) + weights
        else:
            total = total * shrink + weights.sum(axis=1)
        written = self.kv_len - start
        if p.quantized:
            scale = load(scratch["v_scale_smem"].at[slot], layout=column)
            at = plgpu.broadcasted_iota(jnp.int32, scale.shape, 0, layout=column)
            scale = jnp.minimum(scale * p.lift, FLOAT16_LARGEST)
            scale = jnp.where(at < written, scale, 0.0)  # an unwritten scale may be NaN
            weights = weights * lax.broadcast_in_dim(scale, weights.shape, [1])
        weights = weights.astype(p.operand)
        if p.quantized:
            if not self.early:
                self._widen(v_ref)
            v_ref = self.wide_ref
        pl.when(written < self.t.block)(lambda: self._clear(v_ref, written))
        if p.quantized and not self.unit.COMMITS:
            plgpu.commit_smem()
        return self.unit.weigh(acc, shrink, weights, v_ref), new_peak, total

    @property
    def early(self) -> bool:
        """Whether the place for converted values is free while scores are computed: keys are
        converted in registers then."""
        return keys_in_registers(self.p, self.unit)

    @property
    def wide_ref(self) -> Any:
        """A block of converted numbers, in shared memory."""
        return self.scratch["wide_smem"].at[self.group]

    def _scores(self, k_ref: Any, v_ref: Any) -> Array:
        """Queries times a block's keys, before their scales.  Converts its values meanwhile, if
        they are early."""
        if not self.p.quantized:
            return self.unit.scores(self.q_ref, k_ref)
        if not self.early:
            self._widen(k_ref)
            plgpu.commit_smem()
            return self.unit.scores(self.q_ref, self.wide_ref)
        keys = map(self.unit.keys, self._converted(k_ref, self.unit.KEYS))
        return self.unit.scores(self.q_ref, *keys, meanwhile=lambda: self._widen(v_ref))

    def _converted(self, ref: Any, layout: Any) -> list[Array]:
        """Stored numbers as operands, in a layout; of packed ones, the low halves before the high
        ones."""
        stored = load(ref, layout)
        if stored.dtype == jnp.int8:
            return [
                float16_of_bytes(lax.bitcast_convert_type(stored, jnp.uint8) ^ 128, 128, layout)
            ]
        if stored.dtype != jnp.uint8:
            return [stored.astype(self.p.operand)]
        low, high = (stored & 15) ^ 8, (stored & 240) ^ 128  # without signs, the high one times 16
        return [
            float16_of_bytes(low, 8, layout), float16_of_bytes(high, 128, layout) * 0.0625
        ]  # fmt: skip

    def _widen(self, ref: Any) -> None:
        """Convert a block to `wide_ref`, before its scales; to be committed."""
        wide, step = self.wide_ref, columns_at_once(self.p.width)
        for at in range(0, self.p.width, step):
            parts = self._converted(ref.at[:, pl.ds(at, step)], row_layout(step))
            for half, part in enumerate(parts):
                part = plgpu.layout_cast(part, row_layout(step))  # as `_clear` relies on
                wide[:, pl.ds(half * self.p.width + at, step)] = part

    def _clear(self, v_ref: Any, written: Array) -> None:
        """Zero the slots that nobody may see: a NaN would survive its zero weight.

        Warpgroups that share the block all do so; what they write is the same.  A thread loads what
        it stored itself, here or in `_widen`: the layouts are alike.
        """
        step = columns_at_once(self.p.width)
        for at in range(0, self.p.H, step):
            piece = v_ref.at[:, pl.ds(at, step)]
            value = load(piece, layout=row_layout(step))
            slot = plgpu.broadcasted_iota(jnp.int32, value.shape, 0, layout=row_layout(step))
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
            limit = jnp.minimum(self.position + div(row, p.G), last) - start
            seen = column <= limit
            if p.window is not None:
                seen &= column > limit - p.window
            return jnp.where(seen, scores, -jnp.inf)

        return lax.cond(all_seen, lambda scores: scores, hide, scores)

    def _store_result(self, carry, item: Item) -> None:
        acc, peak, total = carry
        if "sinks" in self.inputs:
            row = self.unit.LAYOUT.reduce(1)
            sink = load(self.inputs["sinks"].at[item.head], layout=row, optimized=False)
            new_peak = jnp.maximum(peak, sink)
            shrink = jnp.exp2(peak - new_peak)
            total = total * shrink + jnp.exp2(sink - new_peak)
        else:
            shrink = 1.0
        factor = shrink / (jnp.where(total == 0, 1.0, total) * self.p.lift)
        each = self.unit.piece(self.p.H)
        for at in range(0, self.p.H, each):
            some = self.unit.columns(acc, at, each)
            some = some * over_columns(factor, some.shape)
            ref = self.q_ref if each == self.p.H else self.q_ref.at[:, pl.ds(at, each)]
            ref[...] = some.astype(self.p.operand)
        plgpu.commit_smem()
        # Of two items the later one has a later row or a later tile: their sums differ.
        place = self.inputs["work"][item.index, ROW] + self.inputs["work"][item.index, TILE]
        plgpu.copy_smem_to_gmem(self.q_ref, self.outs[0].at[place, item.head, self.group])

    def _store_part(self, carry, *place: Array) -> None:
        """place: the item, the head and the part."""
        acc, peak, total = carry
        if self.unit.SUMS_LATE:
            total = total.sum(axis=1)
        stat_ref = self.scratch["stat_smem"].at[self.group]
        acc_ref = self.scratch["acc_smem"].at[self.group]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last item's part
        stat_ref[0], stat_ref[1] = peak, total
        step = acc_ref.shape[1]
        for at in range(0, self.p.H, step):
            if at:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            self.unit.leave(self.unit.columns(acc, at, step) * (1 / self.p.lift), acc_ref)
            plgpu.commit_smem()
            target = self.outs[0].at[*place, :, pl.ds(at, step)]
            plgpu.copy_smem_to_gmem(acc_ref.at[pl.ds(0, self.p.padded)], target)
        plgpu.copy_smem_to_gmem(stat_ref, self.outs[1].at[*place])
