"""Attention over pages on Hopper and Blackwell: contract and semantics as in `paged_attention`.

Two kernels share the work.  Rows of one token are memory-bound: the G query heads of a KV head form
one tile of the matrix unit (what NVIDIA calls XQA), each page is read once, and a long context is
split over multiprocessors, whose parts a third, small kernel merges in a fixed order.  Rows of many
tokens are compute-bound: tiles of (token, head) pairs walk over the pages as in FlashAttention-3
(arXiv:2407.08608).  How a row is split depends on the row alone, so its result does not depend on
the company it is in.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxinfer.kernels import paged_attention_gpu_body as body
from jaxinfer.kernels.paged_attention_gpu_body import LOG2E, Problem, Tiling
from jaxinfer.kernels.paged_attention_gpu_merge import merge
from jaxinfer.kernels.paged_attention_gpu_units import UNITS
from jaxinfer.kernels.rows import Rows
from jaxinfer.kernels.write_pages import LARGEST, Pool
from jaxinfer.shapes import dims

# Parts of a context: long enough that merging costs little, few enough to be merged quickly.
SHORTEST_PART, MOST_PARTS = 1024, 64


@dataclass(frozen=True)
class Gpu:
    """Facts of a chip: compute capability, multiprocessors, bytes of shared memory of a block."""

    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int


def why_not(gpu: Gpu, q_TKGH: Array, pool: Pool) -> str | None:
    """What keeps these kernels from these arguments on this chip; None if nothing does.

    To be asked before lowering: the compiler ends the process on chips that it does not know.
    """
    sizes = dims(q_TKGH=q_TKGH, pool_PKSH=pool)
    stored = jnp.dtype(pool.k_PKSH.dtype)
    if gpu.capability not in {(9, 0)}:
        return f"compute capability {gpu.capability} has neither wgmma nor tcgen05"
    if q_TKGH.dtype != jnp.bfloat16:
        return f"queries are {q_TKGH.dtype}, not bfloat16"
    if stored != jnp.bfloat16 and stored.name not in LARGEST:
        return f"pages are {stored}"
    if sizes["H"] % 16 or sizes["H"] > 256:
        return f"head size {sizes['H']} is no multiple of 16 up to 256"
    if pool.k_PKSH.shape[-1] * stored.itemsize % 16:
        return f"a slot of {pool.k_PKSH.shape[-1] * stored.itemsize} bytes is no multiple of 16"
    if sizes["G"] > 64:
        return f"{sizes['G']} query heads of a KV head do not fit into a tile of 64"
    smallest = 16 if pool.k_scale_PKS is None else 32  # scales of a page: at least 128 bytes
    if sizes["S"] not in (smallest, 32, 64, 128):
        return f"page size {sizes['S']} is not a power of two in {smallest} … 128"
    return None


def tiling(gpu: Gpu, problem: Problem, stored: jnp.dtype, *, split: bool) -> Tiling:
    """Slots of a block, and how many blocks may be on their way, for a chip's shared memory."""
    width = problem.H // 2 if stored == jnp.uint8 else problem.H
    block = 64 if split or problem.H > 128 else 128
    for stages in range(6, 0, -1):
        chosen = Tiling(block, stages, split)
        if body.shared_bytes(problem, chosen, width, stored) <= gpu.shared_bytes:
            return chosen
    raise ValueError(f"no tile of heads of {problem.H} fits into {gpu.shared_bytes} bytes")


@partial(jax.jit, static_argnames=("gpu", "scale", "window", "soft_cap"))
def paged_attention(
    q_TKGH: Array,
    pool: Pool,
    rows: Rows,
    *,
    gpu: Gpu,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_KG: Array | None = None,
) -> Array:
    """As `jaxinfer.kernels.paged_attention.paged_attention`, for arguments that `why_not` passes.

    bfloat16 queries; weights are rounded to bfloat16 before they meet the values.
    """
    sizes = dims(q_TKGH=q_TKGH, pool_PKSH=pool, page_table_BM=rows.page_table_BM)
    T, K, G, H, S, B = (sizes[letter] for letter in "TKGHSB")
    problem = Problem(K, G, H, S, scale, window, soft_cap)
    if sinks_KG is not None:
        sinks_KG = sinks_KG.astype(jnp.float32) * LOG2E
    single_BKGH = _attend_single(q_TKGH, pool, rows, gpu, problem, sinks_KG)
    if B == T:
        return single_BKGH
    many_TKGH = _attend_many(q_TKGH, pool, rows, gpu, problem, sinks_KG)
    token_T = jnp.arange(T)[:, None, None, None]
    single_TKGH = jnp.pad(single_BKGH, [(0, T - B), (0, 0), (0, 0), (0, 0)])
    out_TKGH = jnp.where(token_T < rows.num_single, single_TKGH, many_TKGH)
    return jnp.where(token_T < rows.num_tokens, out_TKGH, 0)


def _items(per_row_B: Array, capacity: int) -> tuple[Array, Array, Array, Array]:
    """Lay out `per_row_B` items of each row end to end: the row of each item and its index in it,
    where each row's items begin (`[B + 1]`), and their number `[1]`."""
    ends_B = jnp.cumsum(per_row_B)
    starts = jnp.concatenate([jnp.zeros(1, ends_B.dtype), ends_B]).astype(jnp.int32)
    item_I = jnp.arange(capacity, dtype=jnp.int32)
    row_I = jnp.searchsorted(ends_B, item_I, side="right", method="compare_all").astype(jnp.int32)
    row_I = jnp.minimum(row_I, len(per_row_B) - 1)
    return row_I, item_I - starts[row_I], starts, starts[-1:]


def _begin(first: Array, window: int | None, step: int) -> Array:
    """The first slot that a query at position `first` looks at, rounded down to whole steps."""
    return jnp.zeros_like(first) if window is None else jnp.maximum(first - window + 1, 0) // step * step


def _attend_single(q_TKGH, pool, rows, gpu, problem, sinks_KG) -> Array:
    """Rows of one token; the others come out as zeros: `[B, K, G, H]`."""
    tile = tiling(gpu, problem, pool.k_PKSH.dtype, split=True)
    B, M = rows.page_table_BM.shape
    P = pool.shape[0]
    kv_lens_B = jnp.where(jnp.arange(B) < rows.num_single, rows.kv_lens_B, 0)
    begin_B = _begin(kv_lens_B - 1, problem.window, min(tile.block, problem.S))
    span_B = kv_lens_B - begin_B
    part_B = jnp.maximum(SHORTEST_PART, -(-span_B // (MOST_PARTS * tile.block)) * tile.block)
    # Room for all pages of the pool once.  Rows that share more of them get longer parts.
    capacity = B + min(P, B * M) * problem.S // SHORTEST_PART
    doublings = max(M * problem.S // SHORTEST_PART, 1).bit_length()
    factor_X = 2 ** jnp.arange(doublings + 1)
    totals_X = jnp.sum(-(-span_B // (part_B * factor_X[:, None])), axis=1)
    part_B = part_B * factor_X[jnp.argmax(totals_X <= capacity)]
    row_I, index_I, starts, count = _items(-(-span_B // part_B), capacity)
    begin_I = begin_B[row_I] + index_I * part_B[row_I]
    end_I = jnp.minimum(begin_I + part_B[row_I], kv_lens_B[row_I])
    kv_len_I = kv_lens_B[row_I]
    work_IW = jnp.stack([row_I, rows.query_starts_B[row_I], kv_len_I - 1, kv_len_I, begin_I, end_I], 1)
    q = jnp.pad(q_TKGH, [(0, 0), (0, 0), (0, problem.padded - problem.G), (0, 0)])
    acc, stat = body.attend(
        q, pool, rows.page_table_BM, work_IW, count, None,
        problem=problem, tiling=tile, unit=UNITS[gpu.capability[0]], multiprocessors=gpu.multiprocessors,
    )  # fmt: skip
    return merge(acc, stat, starts, sinks_KG, problem.G)


def _attend_many(q_TKGH, pool, rows, gpu, problem, sinks_KG) -> Array:
    """Rows of several tokens: `[T, K, G, H]`; the other tokens' results are undefined."""
    tile = tiling(gpu, problem, pool.k_PKSH.dtype, split=False)
    B = rows.page_table_BM.shape[0]
    T, K, G, H = q_TKGH.shape
    each = tile.rows // G  # tokens of one warpgroup's tile
    step = each * body.COMPUTE
    row_B = jnp.arange(B)
    many_B = (row_B >= rows.num_single) & (row_B < rows.num_rows)
    lens_B = jnp.where(many_B, rows.query_lens_B, 0)
    row_I, index_I, starts, count = _items(-(-lens_B // step), T // step + min(B, T))
    token_I = rows.query_starts_B[row_I] + index_I * step
    kv_len_I = rows.kv_lens_B[row_I]
    position_I = kv_len_I - lens_B[row_I] + index_I * step
    begin_I = _begin(position_I, problem.window, min(tile.block, problem.S))
    end_I = jnp.minimum(position_I + step, kv_len_I)
    work_IW = jnp.stack([row_I, token_I, position_I, kv_len_I, begin_I, end_I], 1)
    # (token, head) pairs of a tile end to end, and nothing in the rest of it
    token_IWQ = token_I[:, None, None] + jnp.arange(step).reshape(1, body.COMPUTE, each)
    q = q_TKGH[jnp.minimum(token_IWQ, T - 1)].transpose(0, 3, 1, 2, 4, 5)
    q = q.reshape(*q.shape[:3], each * G, H)
    q = jnp.pad(q, [(0, 0)] * 3 + [(0, tile.rows - each * G), (0, 0)])
    if sinks_KG is not None:
        sinks_KG = jnp.pad(jnp.tile(sinks_KG, (1, each)), [(0, 0), (0, tile.rows - each * G)])
    (out,) = body.attend(
        q, pool, rows.page_table_BM, work_IW, count, sinks_KG,
        problem=problem, tiling=tile, unit=UNITS[gpu.capability[0]], multiprocessors=gpu.multiprocessors,
    )  # fmt: skip
    out = out[..., : each * G, :].reshape(*out.shape[:3], each, G, H).transpose(0, 2, 3, 1, 4, 5)
    offset_T = jnp.arange(T) - rows.query_starts_B[rows.rows_T]
    item_T = starts[rows.rows_T] + offset_T // step
    return out[item_T, offset_T % step // each, offset_T % each]
