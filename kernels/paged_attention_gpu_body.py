"""Tiles of queries over pages: the kernel that `paged_attention_gpu` launches twice.

A block of threads takes one item of work after the other, an item being a tile of queries of one KV
head and a range of slots.  One warpgroup loads blocks of slots, page by page, into a ring in shared
memory; the others compute.  Either each has queries of its own and all see every block, or
(`Tiling.split`) they take turns at the blocks, each at those of a KV head of its own if it can be.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from jaxinfer.kernels.gpu import tiled
from jaxinfer.kernels.paged_attention_gpu_compute import Computer, columns_at_once
from jaxinfer.kernels.paged_attention_gpu_work import (
    QUERY_STAGES,
    Loader,
    Problem,
    Tiling,
)
from jaxinfer.kernels.write_pages import Pool


def scratch_types(problem: Problem, tiling: Tiling, unit: Any) -> dict[str, Any]:
    """Shared memory, barriers, and what the matrix unit needs."""
    p, t = problem, tiling
    ring = columns_at_once(p.width) if p.quantized else p.width  # converted piece by piece
    copies = (4 if p.quantized else 2) * (t.block // min(t.block, p.S))
    queries, heads = QUERY_STAGES if t.split else t.groups, t.heads(p)
    types = dict(
        q_smem=tiled((queries * heads, t.rows, p.H), p.operand, p.swizzled),
        k_smem=tiled((t.stages, t.block, p.width), p.stored, ring),
        v_smem=tiled((t.stages, t.block, p.width), p.stored, ring),
        full=plgpu.Barrier(num_arrivals=copies, num_barriers=t.stages),
        free=plgpu.Barrier(num_arrivals=1 if t.split else t.groups, num_barriers=t.stages),
        q_full=plgpu.Barrier(num_arrivals=heads, num_barriers=queries),
    )
    if p.quantized:
        types |= dict(
            k_scale_smem=plgpu.SMEM((t.stages, t.block), jnp.float32),
            v_scale_smem=plgpu.SMEM((t.stages, t.block), jnp.float32),
            wide_smem=tiled((t.groups, t.block, p.H), p.operand, p.swizzled),
        )
    if t.split:
        # Parts leave a few columns at a time, the fewer the less room there is.
        crowded = p.H % 32 == 0 and t.rows > 64
        columns = 32 if crowded else columns_at_once(p.H)
        types |= dict(
            q_free=plgpu.Barrier(num_arrivals=t.groups, num_barriers=queries),
            acc_smem=unit.room(t.groups, t.rows, columns),
            stat_smem=plgpu.SMEM((t.groups, 2, t.rows), jnp.float32),
        )
    return types | unit.scratch(p, t)


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
    """Attention of the first `count[0]` items of `work` `[items, 7]`.

    q: of dtype `problem.operand`; if split `[T, K, padded G, H]`, else `[tiles, K, groups, rows,
        H]`, a tile's (token, head) pairs end to end.  sinks: `[K, rows]`, in base 2; not if split.
    Returns, if split, parts of results: sums of weighted values `[items, K, parts, padded G, H]`
    and `[items, K, parts, 2, rows]`, the maxima (base 2) that the weights are relative to and the
    sums of the weights, all float32, a part for each group that has no head of its own.  Else
    results `[items, K, groups, rows, H]` in q's dtype, of the tile's queries that are the row's, at
    the sum of the row and the tile.
    """
    p, t = problem, tiling
    # A page in pieces of at most a block: the copy engine takes whole pieces.
    piece = min(t.block, p.S)
    inputs: dict[str, Any] = dict(q=q, k=pool.k_PKSH, v=pool.v_PKSH)
    if p.quantized:
        inputs |= dict(k_scale=pool.k_scale_PKS, v_scale=pool.v_scale_PKS)
    for name in set(inputs) - {"q"}:
        pages = inputs[name]
        inputs[name] = pages.reshape(-1, piece, *pages.shape[3:])
    inputs |= dict(table=page_table_BM, work=work, count=count)
    if sinks is not None:
        inputs |= dict(sinks=sinks)
    lead = (work.shape[0], p.K, t.groups // t.heads(p))
    if t.split:
        out_type = [
            jax.ShapeDtypeStruct((*lead, p.padded, p.H), jnp.float32),
            jax.ShapeDtypeStruct((*lead, 2, t.rows), jnp.float32),
        ]
    else:
        out_type = [jax.ShapeDtypeStruct((*lead, t.rows, p.H), p.operand)]

    def body(*refs, **scratch):
        named = dict(zip(inputs, refs, strict=False))
        outs = refs[len(inputs) :]
        group = lax.axis_index("warpgroup")

        @pl.when(group == t.groups)
        def _():
            Loader(p, t, multiprocessors, named, scratch).run()

        @pl.when(group < t.groups)
        def _():
            matrix_unit = unit(scratch, group)
            Computer(p, t, multiprocessors, named, scratch, outs, group, matrix_unit).run()

    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch_types(p, t, unit),
        grid=(multiprocessors,),
        grid_names=("multiprocessor",),
        num_threads=t.groups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=not unit.BARRIERS
        ),
    )(*inputs.values())
