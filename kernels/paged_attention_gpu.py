"""Attention over pages on Hopper and Blackwell: contract and semantics as in `paged_attention`.

Two kernels share the work.  Rows of one token are memory-bound: the G query heads of a KV head form
one tile of the matrix unit (what NVIDIA calls XQA), each page is read once, and a long context is
split over multiprocessors, whose parts a third, small kernel merges in a fixed order.  Rows of many
tokens are compute-bound: tiles of (token, head) pairs walk over the pages as in FlashAttention-3
(arXiv:2407.08608).  How a row is split depends on its length and on how many rows the program has
room for, not on the other rows: its result does not depend on the company it is in (but where rows
share so many pages that their parts have no room).
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxinfer.errors import ConfigError
from jaxinfer.kernels import blocks as tuned
from jaxinfer.kernels import paged_attention_gpu_body as body
from jaxinfer.kernels.gpu import Gpu
from jaxinfer.kernels.paged_attention_gpu_merge import merge
from jaxinfer.kernels.paged_attention_gpu_units import (
    UNITS,
    choose_unit,
    exchanged,
    keys_in_registers,
)
from jaxinfer.kernels.paged_attention_gpu_work import FLOAT16_LARGEST, LOG2E, Problem, Tiling
from jaxinfer.kernels.rows import Rows
from jaxinfer.kernels.write_pages import LARGEST, Pool
from jaxinfer.shapes import dims

# Slots of a part of a context: so many that merging costs little.  If a program has room for so few
# rows that they would not keep a chip busy, a fraction of that, down to this one.
SHORTEST_PART = 2048
SMALLEST_FRACTION = 1 / 8
# Computing warpgroups; three of them were slower on H100, also where pages must be converted.
GROUPS = 2


def why_not(gpu: Gpu, q_TKGH: Array, pool: Pool) -> str | None:
    """What keeps these kernels from these arguments on this chip; None if nothing does."""
    sizes = dims(q_TKGH=q_TKGH, pool_PKSH=pool)
    stored = jnp.dtype(pool.k_PKSH.dtype)
    quantized = stored.name in LARGEST
    if gpu.refusal:
        return gpu.refusal
    if q_TKGH.dtype != jnp.bfloat16:
        return f"queries are {q_TKGH.dtype}, not bfloat16"
    if stored != jnp.bfloat16 and not quantized:
        return f"pages are {stored}, not bfloat16 or quantised"
    widest = UNITS[gpu.capability[0]].WIDEST
    if sizes["H"] % 16 or sizes["H"] > widest:
        return f"head size {sizes['H']} is not a multiple of 16 up to {widest}"
    slot_bytes = pool.k_PKSH.shape[-1] * stored.itemsize
    if slot_bytes % 16:
        return f"a slot has {slot_bytes} bytes, not a multiple of 16"
    if sizes["G"] > 64:
        return f"{sizes['G']} query heads of a KV head are more than a tile of 64 holds"
    smallest = 32 if quantized else 16  # the scales of a page must fill 128 bytes
    if sizes["S"] not in (smallest, 32, 64, 128):
        return f"page size {sizes['S']} is not a power of two from {smallest} to 128"
    problem = Problem(*(sizes[letter] for letter in "KGHS"), stored.name, 1.0, None, None)
    try:
        for split in (True, False):
            choose_tiling(gpu, problem, split=split)
    except ConfigError as error:
        return str(error)
    return None


def choose_tiling(gpu: Gpu, problem: Problem, *, split: bool) -> Tiling:
    """Tile and ring for a chip's shared memory.

    Decoding waits for memory: small blocks, many of them on their way.  Prompts wait for products:
    blocks as large as registers hold.
    """
    unit, rows = choose_unit(gpu, problem, split=split)
    block = 128 if not split and problem.H <= 128 and rows == 64 else 64
    for stages in range(6, 1, -GROUPS if split else -1):
        tiling = Tiling(split, rows, GROUPS, block, stages)
        if body.shared_bytes(problem, tiling, unit) <= gpu.shared_bytes:
            return tiling
    raise ConfigError(
        f"{gpu.shared_bytes} bytes of shared memory hold no ring for {problem.G} heads of "
        f"{problem.H}"
    )


def check_tiling(tiling: Tiling, gpu: Gpu, problem: Problem, *, split: bool) -> None:
    """Raise `ShapeError` unless a tiling is for the problem on such a chip."""
    unit, rows = choose_unit(gpu, problem, split=split)
    whole = tiling.block in (64, 128) and tiling.stages >= 2 and tiling.groups in (1, GROUPS)
    owned = not split or tiling.stages % tiling.groups == 0
    converted = keys_in_registers(problem, unit)
    needed = body.shared_bytes(problem, tiling, unit) if whole else 0
    # A thread's registers hold its share of the sums and of a block's scores, both float32.
    registers = (problem.H + tiling.block) * rows // 128
    tuned.require(
        {
            f"split must be {split}": tiling.split == split,
            f"rows must be {rows}": tiling.rows == rows,
            f"block must be 64 or 128, stages 2 or more, groups 1 or {GROUPS}": whole,
            "the stages must be the groups', equally many of each": owned,
            "block must be 64 where keys are converted": tiling.block == 64 or not converted,
            f"{registers} registers of a thread hold sums and scores, at most 192": registers
            <= 192,
            f"{needed} bytes do not fit {gpu.shared_bytes}": needed <= gpu.shared_bytes,
        },
        tiling,
    )


@partial(jax.jit, static_argnames=("gpu", "scale", "window", "soft_cap", "chip", "single", "tiles"))
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
    chip: str | None = None,
    single: Tiling | None = None,
    tiles: Tiling | None = None,
) -> Array:
    """As `jaxinfer.kernels.paged_attention.paged_attention`, for arguments that `why_not` passes.

    single, tiles: how rows of one token and longer ones are cut; None: as tuned for the chip (the
    name of its sheet), else `choose_tiling` decides.

    scale is positive.  Weights are rounded to bfloat16 before they meet the values; over quantised
    pages queries and weights are float16, with their larger magnitudes clipped, and results of rows
    of many tokens pass through it.  Values of 0.01 and more are then weighed more precisely than in
    bfloat16, those of 1e-4 to 1 %.
    """
    if scale <= 0:
        raise ConfigError(f"scale={scale} is not positive: negate the queries instead")
    sizes = dims(q_TKGH=q_TKGH, pool_PKSH=pool, page_table_BM=rows.page_table_BM)
    T, K, G, H, S, B = (sizes[letter] for letter in "TKGHSB")
    stored = jnp.dtype(pool.k_PKSH.dtype).name
    problem = Problem(K, G, H, S, stored, scale, window, soft_cap)
    key = tuned.pages_key("", q_TKGH, pool, window)
    if sinks_KG is not None:
        sinks_KG = sinks_KG.astype(jnp.float32) * LOG2E
    if problem.quantized:
        q_TKGH = jnp.clip(q_TKGH, -FLOAT16_LARGEST, FLOAT16_LARGEST).astype(jnp.float16)

    def choose(split: bool) -> Tiling:
        return tuned.choose(
            "paged_attention",
            chip,
            key | {"part": "single" if split else "tiles"},
            Tiling,
            lambda tiling: check_tiling(tiling, gpu, problem, split=split),
            lambda: choose_tiling(gpu, problem, split=split),
        )

    single = single or choose(split=True)
    single_BKGH = _attend_single(q_TKGH, pool, rows, gpu, problem, single, sinks_KG)
    if B == T:
        return single_BKGH
    tiles = tiles or choose(split=False)
    many_TKGH = _attend_many(q_TKGH, pool, rows, gpu, problem, tiles, sinks_KG)
    single_TKGH = jnp.pad(single_BKGH, [(0, T - B), (0, 0), (0, 0), (0, 0)])
    token_T = jnp.arange(T)[:, None, None, None]
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


def _begin(first: Array, problem: Problem, tiling: Tiling) -> Array:
    """The first slot that a query at position `first` looks at, rounded down to a block's begin:
    a row's blocks are the same wherever its tiles begin."""
    if problem.window is None:
        return jnp.zeros_like(first)
    return jnp.maximum(first - problem.window + 1, 0) // tiling.block * tiling.block


def _attend_single(
    q_TKGH: Array,
    pool: Pool,
    rows: Rows,
    gpu: Gpu,
    problem: Problem,
    tiling: Tiling,
    sinks_KG: Array | None,
) -> Array:
    """Rows of one token; the others come out as zeros: `[B, K, G, H]`."""
    B, M = rows.page_table_BM.shape
    kv_lens_B = jnp.where(jnp.arange(B) < rows.num_single, rows.kv_lens_B, 0)
    begin_B = _begin(kv_lens_B - 1, problem, tiling)
    span_B = kv_lens_B - begin_B
    # A long row alone should keep the chip busy; more parts than that cost their begin and end.
    items = problem.K // tiling.heads(problem)  # of each part
    most = min(max(gpu.multiprocessors // items, 1), 64)
    part_B = -(-span_B // (most * tiling.block)) * tiling.block
    busy = max(min(B * items / gpu.multiprocessors, 1), SMALLEST_FRACTION)
    shortest = int(SHORTEST_PART * 2 ** math.ceil(math.log2(busy)))
    part_B = jnp.maximum(part_B, shortest)
    # Room for every page of the pool once.  Only rows that share many pages need more: the parts
    # of all rows are then doubled until they fit.
    capacity = B + min(pool.shape[0], B * M) * problem.S // shortest
    longest = max(M * problem.S // shortest, 1)
    factors = 2 ** jnp.arange(longest.bit_length() + 1)[:, None]
    fits = jnp.sum(-(-span_B[None] // (part_B[None] * factors)), axis=1) <= capacity
    part_B *= factors[jnp.argmax(fits), 0]
    row_I, index_I, starts, count = _items(-(-span_B // part_B), capacity)
    begin_I = begin_B[row_I] + index_I * part_B[row_I]
    kv_len_I = kv_lens_B[row_I]
    end_I = jnp.minimum(begin_I + part_B[row_I], kv_len_I)
    token_I = rows.query_starts_B[row_I]
    last_I = kv_len_I - 1
    work = jnp.stack([row_I, token_I, last_I, kv_len_I, begin_I, end_I, last_I], axis=1)
    # Rows of one token come first, and so do their tokens.
    q = jnp.pad(q_TKGH[:B], [(0, 0), (0, 0), (0, problem.padded - problem.G), (0, 0)])
    unit, _ = choose_unit(gpu, problem, split=True)
    if keys_in_registers(problem, unit):
        q = exchanged(q)
    acc, stat = body.attend(
        q, pool, rows.page_table_BM, work, count, None, problem=problem, tiling=tiling, unit=unit,
        multiprocessors=gpu.multiprocessors,
    )  # fmt: skip
    return merge(acc, stat, starts, sinks_KG, problem.G)


def _attend_many(
    q_TKGH: Array,
    pool: Pool,
    rows: Rows,
    gpu: Gpu,
    problem: Problem,
    tiling: Tiling,
    sinks_KG: Array | None,
) -> Array:
    """Rows of several tokens: `[T, K, G, H]`; the other tokens' results are undefined.

    Tiles lie at multiples of their length, wherever rows begin: cutting the queries into them moves
    no token past another, and XLA does it while it rotates them.  A tile in which rows meet is an
    item of each; only the results are gathered.
    """
    T, K, G, H = q_TKGH.shape
    B = rows.page_table_BM.shape[0]
    each = tiling.tokens(problem)
    step = each * tiling.groups
    tiles = -(-T // step)
    starts_B, lens_B, kv_lens_B = rows.query_starts_B, rows.query_lens_B, rows.kv_lens_B
    first_B = starts_B // step
    several_B = (jnp.arange(B) >= rows.num_single) & (jnp.arange(B) < rows.num_rows) & (lens_B > 0)
    touched_B = jnp.where(several_B, (starts_B + lens_B - 1) // step - first_B + 1, 0)
    row_I, index_I, _, count = _items(touched_B, tiles + B)
    tile_I = jnp.minimum(first_B[row_I] + index_I, tiles - 1)
    kv_len_I = kv_lens_B[row_I]
    first_I = kv_len_I - lens_B[row_I]
    position_I = first_I + tile_I * step - starts_B[row_I]
    begin_I = _begin(jnp.maximum(position_I, first_I), problem, tiling)
    end_I = jnp.minimum(position_I + step, kv_len_I)
    work = jnp.stack([row_I, tile_I, position_I, kv_len_I, begin_I, end_I, first_I], axis=1)
    # A tile's (token, head) pairs lie end to end; its last rows may stay empty.
    q = jnp.pad(q_TKGH, [(0, tiles * step - T), (0, 0), (0, 0), (0, 0)])
    q = q.reshape(tiles, tiling.groups, each, K, G, H).transpose(0, 3, 1, 2, 4, 5)
    q = q.reshape(tiles, K, tiling.groups, each * G, H)
    rest = tiling.rows - each * G
    q = jnp.pad(q, [(0, 0), (0, 0), (0, 0), (0, rest), (0, 0)])
    if sinks_KG is not None:
        sinks_KG = jnp.pad(jnp.tile(sinks_KG, (1, each)), [(0, 0), (0, rest)])
    (out,) = body.attend(
        q, pool, rows.page_table_BM, work, count, sinks_KG, problem=problem, tiling=tiling,
        unit=choose_unit(gpu, problem, split=False)[0], multiprocessors=gpu.multiprocessors,
    )  # fmt: skip
    out = out[..., : each * G, :].reshape(*out.shape[:3], each, G, H).transpose(0, 2, 3, 1, 4, 5)
    row = jnp.pad(rows.rows_T, (0, tiles * step - T)).reshape(tiles, tiling.groups, each)
    tile, *inside = jnp.ogrid[:tiles, : tiling.groups, :each]
    out = out.at[row + tile, *inside].get(mode="promise_in_bounds")
    return out.reshape(tiles * step, K, G, H)[:T].astype(jnp.bfloat16)
