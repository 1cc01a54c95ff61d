"""Attention of tiles of queries over pages: the kernel that `paged_attention_gpu` launches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from jaxinfer.kernels.write_pages import Pool

LOG2E = math.log2(math.e)
# Below every score; finite, so that differences of maxima are never NaN.
FLOOR = -1e30
# Warpgroups that compute; one more loads pages.
COMPUTE = 2
# Of the register file of 64 Ki, for three warpgroups of 128 threads.
LOAD_REGISTERS, COMPUTE_REGISTERS = 24, 240

ROW, TOKEN, POSITION, KV_LEN, BEGIN, END = range(6)


@dataclass(frozen=True)
class Tiling:
    block: int
    stages: int
    split: bool
    rows: int = 64


@dataclass(frozen=True)
class Problem:
    K: int
    G: int
    H: int
    S: int
    scale: float
    window: int | None
    soft_cap: float | None

    def tokens(self, tiling):
        return 1 if tiling.split else tiling.rows // self.G

    @property
    def padded(self):
        return -(-self.G // 8) * 8


def tiled(shape, dtype, width):
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(width * bits)
    if swizzle == 16:
        return plgpu.SMEM(shape, dtype)
    return plgpu.SMEM(
        shape, dtype,
        transforms=(plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)),
    )


def _cols(H):
    return {256: 32, 128: 64}.get(H, H)


def shared_bytes(p: Problem, t: Tiling, width: int, stored) -> int:
    kib = lambda *shape: -(-math.prod(shape) // 1024) * 1024
    size = kib(COMPUTE, t.rows, p.H, 2) + 2 * kib(t.stages, t.block, width, jnp.dtype(stored).itemsize)
    if jnp.dtype(stored) != jnp.bfloat16:
        size += 2 * kib(t.stages, t.block, 4) + kib(COMPUTE, t.block, p.H, 2)
    if t.split:
        size += kib(COMPUTE, t.rows, _cols(p.H), 4) + kib(COMPUTE, 2, t.rows, 4)
    return size + 2 * 1024


def attend(q, pool: Pool, table_BM, work, count, sinks, *, problem: Problem, tiling: Tiling, unit: Any, multiprocessors: int):
    p, t = problem, tiling
    P = pool.k_PKSH.shape[0]
    piece = min(t.block, p.S)
    flat = lambda x: x.reshape(P * p.K * (p.S // piece), piece, *x.shape[3:])
    k, v = flat(pool.k_PKSH), flat(pool.v_PKSH)
    quantized = pool.k_scale_PKS is not None
    scales = [flat(pool.k_scale_PKS), flat(pool.v_scale_PKS)] if quantized else []
    capacity = work.shape[0]
    if t.split:
        out_type = [
            jax.ShapeDtypeStruct((capacity, p.K, COMPUTE, p.padded, p.H), jnp.float32),
            jax.ShapeDtypeStruct((capacity, p.K, COMPUTE, 2, t.rows), jnp.float32),
        ]
    else:
        out_type = [jax.ShapeDtypeStruct((capacity, p.K, COMPUTE, t.rows, p.H), jnp.bfloat16)]
    width = k.shape[-1]
    stored = k.dtype
    cols = _cols(p.H)
    scratch = dict(
        q_smem=tiled((COMPUTE, t.rows, p.H), jnp.bfloat16, width if stored == jnp.uint8 else p.H),
        k_smem=tiled((t.stages, t.block, width), stored, width),
        v_smem=tiled((t.stages, t.block, width), stored, width),
        full=plgpu.Barrier(num_arrivals=(4 if quantized else 2) * (t.block // min(t.block, p.S)), num_barriers=t.stages),
        free=plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=t.stages),
        q_full=plgpu.Barrier(num_barriers=COMPUTE),
    )
    if quantized:
        scratch |= dict(
            ks_smem=plgpu.SMEM((t.stages, t.block), jnp.float32),
            vs_smem=plgpu.SMEM((t.stages, t.block), jnp.float32),
            wide_smem=tiled((COMPUTE, t.block, p.H), jnp.bfloat16, width if stored == jnp.uint8 else p.H),
        )
    if t.split:
        scratch |= dict(
            acc_smem=tiled((COMPUTE, t.rows, cols), jnp.float32, cols),
            stat_smem=plgpu.SMEM((COMPUTE, 2, t.rows), jnp.float32),
        )
    inputs = [q, k, v, *scales, table_BM, work, count] + ([sinks] if sinks is not None else [])
    names = ["q", "k", "v"] + ["ks", "vs"] * quantized + ["table", "work", "count"] + ["sinks"] * (sinks is not None)

    def body(*refs, **scratch):
        ins = dict(zip(names, refs[: len(names)], strict=True))
        outs = refs[len(names) :]
        run = _Run(p, t, multiprocessors, quantized, ins, outs, scratch)
        group = lax.axis_index("warpgroup")
        pl.when(group == COMPUTE)(run.load)

        @pl.when(group < COMPUTE)
        def _():
            run.unit = unit(scratch, group)
            run.compute(group)


    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=(multiprocessors,),
        grid_names=("sm",),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*inputs)


def i32(x):
    return jnp.asarray(x, jnp.int32)


def div(x, y):
    return lax.div(i32(x), i32(y))


def rem(x, y):
    return lax.rem(i32(x), i32(y))


def cdiv(x, y: int):
    return div(x + (y - 1), y)


@dataclass
class _Run:
    p: Problem
    t: Tiling
    multiprocessors: int
    quantized: bool
    ins: dict[str, Any]
    outs: Any
    scratch: dict[str, Any]
    unit: Any = None

    def each_item(self, visit):
        """visit(item, head, base) -> blocks"""
        sm = lax.axis_index("sm")
        total = self.ins["count"][0] * self.p.K
        rounds = div(total - sm + self.multiprocessors - 1, self.multiprocessors)

        def turn(round, base):
            index = sm + round * self.multiprocessors
            item, head = div(index, self.p.K), rem(index, self.p.K)
            if not self.t.split:
                item = self.ins["count"][0] - 1 - item
            return base + visit(item, head, base)

        return lax.fori_loop(0, rounds, turn, i32(0))

    def blocks(self, item):
        work = self.ins["work"]
        return cdiv(work[item, END] - work[item, BEGIN], self.t.block)

    def load(self):
        plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")
        p, t, ins, sc = self.p, self.t, self.ins, self.scratch
        piece = min(t.block, p.S)

        def visit(item, head, base):
            row, begin = ins["work"][item, ROW], ins["work"][item, BEGIN]
            last = div(ins["work"][item, KV_LEN] - 1, p.S)
            blocks = self.blocks(item)

            def fetch(n, _):
                at = base + n
                slot = rem(at, t.stages)

                @pl.when(at >= t.stages)
                def _():
                    plgpu.barrier_wait(sc["free"].at[slot])

                for j in range(t.block // piece):
                    first = begin + n * t.block + j * piece
                    entry = jnp.minimum(div(first, p.S), last)
                    page = ins["table"][row, entry] * p.K + head
                    page = page * (p.S // piece) + div(rem(first, p.S), piece)
                    to = (slot, pl.ds(j * piece, piece))
                    barrier = sc["full"].at[slot]
                    plgpu.copy_gmem_to_smem(ins["k"].at[page], sc["k_smem"].at[to], barrier)
                    plgpu.copy_gmem_to_smem(ins["v"].at[page], sc["v_smem"].at[to], barrier)
                    if self.quantized:
                        plgpu.copy_gmem_to_smem(ins["ks"].at[page], sc["ks_smem"].at[to], barrier)
                        plgpu.copy_gmem_to_smem(ins["vs"].at[page], sc["vs_smem"].at[to], barrier)

            lax.fori_loop(0, blocks, fetch, None)
            return blocks

        total = self.each_item(visit)
        for n in range(t.stages):

            @pl.when(n < total)
            def _():
                plgpu.barrier_wait(sc["free"].at[rem(jnp.maximum(total - t.stages, 0) + n, t.stages)])

    def compute(self, group):
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        p, t, ins, sc = self.p, self.t, self.ins, self.scratch
        tokens = p.tokens(t)
        q_smem = sc["q_smem"].at[group]

        def visit(item, head, base):
            work = ins["work"]
            position, kv_len = work[item, POSITION], work[item, KV_LEN]
            begin, token = work[item, BEGIN], work[item, TOKEN]
            blocks = self.blocks(item)
            if not t.split:
                position += group * tokens
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if t.split:
                source, target = ins["q"].at[token, head], q_smem.at[pl.ds(0, p.padded)]
            else:
                source, target = ins["q"].at[item, head, group], q_smem
            plgpu.copy_gmem_to_smem(source, target, sc["q_full"].at[group])
            plgpu.barrier_wait(sc["q_full"].at[group])
            carry = self.start()

            def skip(n):
                slot = rem(base + n, t.stages)
                plgpu.barrier_wait(sc["full"].at[slot])
                plgpu.barrier_arrive(sc["free"].at[slot])

            def step(n, carry):
                slot = rem(base + n, t.stages)
                plgpu.barrier_wait(sc["full"].at[slot])
                carry = self.fold(carry, group, slot, begin + n * t.block, position, kv_len)
                plgpu.barrier_arrive(sc["free"].at[slot])
                return carry

            if t.split:
                mine = div(blocks - group + 1, 2)

                def pair(i, carry):
                    carry = step(2 * i + group, carry)
                    other = 2 * i + 1 - group
                    pl.when(other < blocks)(lambda: skip(other))
                    return carry

                carry = lax.fori_loop(0, mine, pair, carry)
                pl.when((group == 1) & (rem(blocks, 2) == 1))(lambda: skip(blocks - 1))
                self.store_part(carry, item, head, group)
            else:
                end = jnp.minimum(position + tokens, kv_len)
                mine = jnp.where(position < kv_len, cdiv(end - begin, t.block), 0)
                carry = lax.fori_loop(0, mine, step, carry)
                lax.fori_loop(mine, blocks, lambda n, _: skip(n), None)
                self.store_tile(carry, item, head, group)
            return blocks

        self.each_item(visit)
        plgpu.wait_smem_to_gmem(0)

    def start(self):
        t, p = self.t, self.p
        row = self.unit.LAYOUT.reduce(1)
        peak = plgpu.layout_cast(jnp.full((t.rows,), FLOOR, jnp.float32), row)
        total = plgpu.layout_cast(jnp.full((t.rows,), 0.0, jnp.float32), row)
        acc = plgpu.layout_cast(jnp.full((t.rows, p.H), 0.0, jnp.float32), self.unit.LAYOUT)
        return acc, peak, total

    def operand(self, ref, group):
        """Keys or values as the matrix unit takes them."""
        if not self.quantized:
            return ref
        wide = self.scratch["wide_smem"].at[group]
        if ref.dtype == jnp.uint8:
            half = self.p.H // 2
            packed = ref[...]
            low = lax.bitcast_convert_type((packed & 15) ^ 8, jnp.int8)
            high = lax.bitcast_convert_type(packed & 240, jnp.int8)
            wide[:, :half] = low.astype(jnp.bfloat16) - 8
            wide[:, half:] = high.astype(jnp.bfloat16) * 0.0625
        elif ref.dtype == jnp.int8:
            wide[...] = ref[...].astype(jnp.bfloat16)
        else:
            wide[...] = ref[...].astype(jnp.float32).astype(jnp.bfloat16)
        plgpu.commit_smem()
        return wide

    def fold(self, carry, group, slot, start, position, kv_len):
        p, t, sc = self.p, self.t, self.scratch
        acc, peak, total = carry
        shape = (t.rows, t.block)
        k_ref = self.operand(sc["k_smem"].at[slot], group)

        s = self.unit.scores(sc["q_smem"].at[group], k_ref)
        column = self.unit.LAYOUT.reduce(0)
        if self.quantized:
            ks = plgpu.load(sc["ks_smem"].at[slot], layout=column)
            s = s * lax.broadcast_in_dim(ks * (p.scale * (1 if p.soft_cap else LOG2E)), shape, [1])
        else:
            s = s * (p.scale * (1 if p.soft_cap else LOG2E))
        if p.soft_cap is not None:
            bend = jnp.exp2(s * (2 * LOG2E / p.soft_cap))
            s = (p.soft_cap * LOG2E) - (2 * p.soft_cap * LOG2E) / (bend + 1)
        s = self.mask(s, start, position, kv_len)
        new_peak = jnp.maximum(peak, s.max(axis=1))
        shrink = jnp.exp2(peak - new_peak)
        w = jnp.exp2(s - lax.broadcast_in_dim(new_peak, shape, [0]))
        total = total * shrink + w.sum(axis=1)
        if self.quantized:
            vs = plgpu.load(sc["vs_smem"].at[slot], layout=column)
            at = plgpu.broadcasted_iota(jnp.int32, (t.block,), 0, layout=column)
            vs = jnp.where(at < kv_len - start, vs, 0.0)
            w = w * lax.broadcast_in_dim(vs, shape, [1])
        w = w.astype(jnp.bfloat16)
        acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
        v_ref = self.operand(sc["v_smem"].at[slot], group)

        @pl.when(start + t.block > kv_len)
        def _():
            v = v_ref[...]
            at = plgpu.broadcasted_iota(jnp.int32, v.shape, 0, layout=self.unit.LAYOUT)
            v_ref[...] = jnp.where(at < kv_len - start, v, 0)
            plgpu.commit_smem()

        return self.unit.weigh(acc, w, v_ref), new_peak, total

    def mask(self, s, start, position, kv_len):
        p, t = self.p, self.t
        tokens = p.tokens(t)
        last = jnp.minimum(position + tokens, kv_len) - 1
        inner = start + t.block <= jnp.minimum(position, last) + 1
        if p.window is not None:
            inner &= start > last - p.window

        def hide(s):
            row = plgpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=self.unit.LAYOUT)
            col = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=self.unit.LAYOUT)
            limit = jnp.minimum(position + lax.div(row, jnp.int32(p.G)), last) - start
            seen = col <= limit
            if p.window is not None:
                seen &= col > limit - p.window
            return jnp.where(seen, s, -jnp.inf)

        return lax.cond(inner, lambda s: s, hide, s)

    def store_tile(self, carry, item, head, group):
        acc, peak, total = carry
        if "sinks" in self.ins:
            sink = plgpu.load(self.ins["sinks"].at[head], layout=self.unit.LAYOUT.reduce(1), optimized=False)
            new_peak = jnp.maximum(peak, sink)
            shrink = jnp.exp2(peak - new_peak)
            total = total * shrink + jnp.exp2(sink - new_peak)
            acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
        total = jnp.where(total == 0, 1.0, total)
        out = acc * lax.broadcast_in_dim(1 / total, acc.shape, [0])
        q_smem = self.scratch["q_smem"].at[group]
        q_smem[...] = out.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem, self.outs[0].at[item, head, group])

    def store_part(self, carry, item, head, group):
        acc, peak, total = carry
        p = self.p
        stat = self.scratch["stat_smem"].at[group]
        stat[0] = peak
        stat[1] = total
        acc_smem = self.scratch["acc_smem"].at[group]
        cols = acc_smem.shape[1]
        for c in range(0, p.H, cols):
            if c:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            acc_smem[...] = acc[:, c : c + cols]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(
                acc_smem.at[pl.ds(0, p.padded)],
                self.outs[0].at[item, head, group, :, pl.ds(c, cols)],
            )
        plgpu.copy_smem_to_gmem(stat, self.outs[1].at[item, head, group])
