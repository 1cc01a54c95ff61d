"""Attention over pages on TPU: the contract of `paged_attention`, and how the work is cut.

Rows of one token and longer ones take one kernel call each, which differ in their block sizes only.
Cores of one device share the KV heads, or else the rows; a context is not split between them: with
at most two cores, heads or rows are enough to keep both busy, and the sums keep their order.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxinfer.errors import ShapeError
from jaxinfer.kernels import blocks as tuned
from jaxinfer.kernels.paged_attention_tpu_body import Blocks, Options, attend, scratch
from jaxinfer.kernels.rows import Rows
from jaxinfer.kernels.tpu import LANES, padded_bytes, round_up
from jaxinfer.kernels.write_pages import Pool
from jaxinfer.shapes import dims

# Blocks of this many bytes, as many of them in flight, keep the memory busy.
BLOCK_BYTES = 2 * 2**20
IN_FLIGHT_BYTES = 4 * 2**20
# More KV heads than these are worked off one group after the other: code is unrolled over heads.
MOST_HEADS = 8


def block_sizes(
    q_TKGH: Any, pool: Pool, rows: Rows, *, single: bool, vmem_bytes: int, num_cores: int = 1
) -> Blocks:
    """Block sizes for arrays of these shapes and dtypes, on a chip with these many bytes of vector
    memory, and cores that act as one device.

    single: for rows of one token.  Raises `ShapeError` if nothing fits.
    """
    sizes = dims(q_TKGH=q_TKGH, pool_PKSH=pool, page_table_BM=rows.page_table_BM)
    K, G, S = sizes["K"], sizes["G"], sizes["S"]
    share = K // num_cores if K % num_cores == 0 else K
    heads = max(h for h in range(1, min(share, MOST_HEADS) + 1) if share % h == 0)
    parts = 1 if (K // heads) % num_cores == 0 else num_cores
    queries = 1 if single else 1 << max(min(512 // G, sizes["T"], 256).bit_length() - 1, 0)
    page_bytes = 2 * padded_bytes((heads, *pool.k_PKSH.shape[2:]), pool.k_PKSH.dtype)
    slots = max(BLOCK_BYTES // page_bytes, 1) * S if single else 512
    slots = min(max(slots, LANES), 2048, round_up(sizes["M"] * S, LANES))
    while True:
        pages = max(slots // S, 1)
        depth = 2
        if single:
            depth = min(1 + pl.cdiv(IN_FLIGHT_BYTES, pages * page_bytes), 8)
        blocks = Blocks(queries, pages, heads, parts, depth)
        if vmem_needed(blocks, q_TKGH, pool) <= vmem_bytes:
            return blocks
        if slots > LANES:
            slots //= 2
        elif queries > 1:
            queries //= 2
        else:
            raise ShapeError(f"pages {pool.k_PKSH.shape}: two do not fit {vmem_bytes} bytes")


def check_blocks(
    blocks: Blocks, q_TKGH: Any, pool: Pool, *, single: bool, vmem_bytes: int, num_cores: int = 1
) -> None:
    """Raise `ShapeError` unless blocks are for arrays of these shapes and dtypes on such a chip."""
    K = pool.shape[1]
    whole = min(dataclasses.astuple(blocks)) >= 1
    needed = vmem_needed(blocks, q_TKGH, pool) if whole else 0
    tuned.require(
        {
            "all must be at least 1": whole,
            "queries must be 1 for rows of one token": not single or blocks.queries == 1,
            "queries must be a power of two": blocks.queries & (blocks.queries - 1) == 0,
            f"heads must divide K = {K}": whole and K % blocks.heads == 0,
            f"the cores, {num_cores}, must have equal shares": whole
            and K // blocks.heads * blocks.parts % num_cores == 0,
            "depth must be at least 2": blocks.depth >= 2,
            f"{needed} bytes do not fit {vmem_bytes}": needed <= vmem_bytes,
        },
        blocks,
    )


def vmem_needed(blocks: Blocks, q_TKGH: Any, pool: Pool) -> int:
    """Bytes of vector memory that a call takes: its buffers, and scores in a few versions."""
    buffers = [
        padded_bytes(ref.shape, ref.dtype)
        for ref in scratch(blocks, q_TKGH, pool, 1)
        if ref is not None and ref.memory_space == pltpu.VMEM
    ]
    lines, slots = blocks.queries * q_TKGH.shape[2], blocks.pages * pool.shape[2]
    wide = padded_bytes((slots, pool.shape[3]), jnp.float32)
    return sum(buffers) + 4 * padded_bytes((lines, slots), jnp.float32) + 6 * wide


@partial(
    jax.jit,
    static_argnames=(
        "scale", "window", "soft_cap", "vmem_bytes", "num_cores", "chip", "single", "tiles",
        "interpret",
    ),
)  # fmt: skip
def paged_attention(
    q_TKGH: Array,
    pool: Pool,
    rows: Rows,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_KG: Array | None = None,
    vmem_bytes: int,
    num_cores: int = 1,
    chip: str | None = None,
    single: Blocks | None = None,
    tiles: Blocks | None = None,
    interpret: Any = False,
) -> Array:
    """As `jaxinfer.kernels.paged_attention.paged_attention`, on TPU.

    vmem_bytes: vector memory that the kernel may use.  num_cores: cores that act as one device.
    single, tiles: how rows of one token and longer ones are cut; None: as tuned for the chip (the
    name of its sheet), else `block_sizes` decides.
    interpret: False, or a `pltpu.InterpretParams`.
    """
    sizes = dims(q_TKGH=q_TKGH, pool_PKSH=pool, page_table_BM=rows.page_table_BM)

    def choose(single: bool) -> Blocks:
        facts = {"single": single, "num_cores": num_cores}
        return tuned.choose(
            "paged_attention",
            chip,
            tuned.pages_key("single" if single else "tiles", q_TKGH, pool, window),
            Blocks,
            lambda blocks: check_blocks(blocks, q_TKGH, pool, vmem_bytes=vmem_bytes, **facts),
            lambda: block_sizes(q_TKGH, pool, rows, vmem_bytes=vmem_bytes * 3 // 4, **facts),
        )

    # Each row is in one of the calls: what all of them read is shared between these.
    calls = 1 if sizes["B"] == sizes["T"] else 2
    cost = _cost(q_TKGH, pool, rows, window, calls)

    def call(blocks: Blocks, begin, end, clear, out_TKGH):
        options = Options(blocks, scale, window, soft_cap)
        bounds = jnp.stack([jnp.int32(begin), end, clear, jnp.int32(sizes["T"])])
        return _call(
            q_TKGH, pool, rows, sinks_KG, out_TKGH, bounds, options, cost, vmem_bytes, interpret
        )

    single = single or choose(single=True)
    if sizes["B"] == sizes["T"]:
        return call(single, 0, rows.num_rows, rows.num_tokens, None)
    out_TKGH = call(single, 0, rows.num_single, jnp.int32(sizes["T"]), None)
    tiles = tiles or choose(single=False)
    return call(tiles, rows.num_single, rows.num_rows, rows.num_tokens, out_TKGH)


def _cost(q_TKGH: Array, pool: Pool, rows: Rows, window: int | None, calls: int) -> pl.CostEstimate:
    """What one of `calls` that share the work costs if all pages are in use: those that rows can
    see are read once, queries are read and results written."""
    sizes = dims(q_TKGH=q_TKGH, pool_PKSH=pool, page_table_BM=rows.page_table_BM)
    T, B, S = sizes["T"], sizes["B"], sizes["S"]
    pages = min(sizes["P"], B * sizes["M"])
    if window is not None:
        pages = min(pages, B * (pl.cdiv(window, S) + 1) + T // S)
    page_bytes = sum(padded_bytes(leaf.shape[1:], leaf.dtype) for leaf in jax.tree.leaves(pool))
    scores = T * sizes["K"] * sizes["G"] * pages * S // B
    tokens = 2 * padded_bytes(q_TKGH.shape, q_TKGH.dtype)
    return pl.CostEstimate(
        flops=4 * scores * sizes["H"] // calls,
        transcendentals=scores // calls,
        bytes_accessed=(pages * page_bytes + tokens) // calls,
    )


def _call(
    q_TKGH, pool, rows, sinks_KG, out_TKGH, bounds, options, cost, vmem_bytes, interpret
) -> Array:
    """One kernel over the rows [bounds[0], bounds[1]); what it does not write is `out_TKGH`'s.

    The tokens [bounds[2], bounds[3]) become zero.
    """
    blocks: Blocks = options.blocks
    (B, M), (_, K, G, _) = rows.page_table_BM.shape, q_TKGH.shape
    chunks = pl.cdiv(M, LANES)
    # A line of lanes can be copied from anywhere if it is an axis' only row.
    tables = jnp.pad(rows.page_table_BM, [(0, 0), (0, chunks * LANES - M)])
    tables = tables.reshape(B, chunks, 1, LANES)
    sinks = None
    if sinks_KG is not None:
        sinks = jnp.broadcast_to(sinks_KG.astype(jnp.float32)[..., None], (K, G, LANES))
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    arguments = (
        bounds, rows.query_starts_B, rows.query_lens_B, rows.kv_lens_B,
        q_TKGH, tables, pool, sinks, out_TKGH,
    )  # fmt: skip
    aliases = {} if out_TKGH is None else {len(jax.tree.leaves(arguments)) - 1: 0}
    specs = jax.tree.map(lambda _: anywhere, arguments[4:])
    in_vmem = None if sinks is None else pl.BlockSpec(memory_space=pltpu.VMEM)
    specs = (*specs[:3], in_vmem, specs[4])
    return pl.pallas_call(
        partial(attend, options=options),
        out_shape=jax.ShapeDtypeStruct(q_TKGH.shape, q_TKGH.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(K // blocks.heads * blocks.parts,),
            in_specs=specs,
            out_specs=anywhere,
            scratch_shapes=[scratch(blocks, q_TKGH, pool, chunks)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=vmem_bytes
        ),
        input_output_aliases=aliases,
        cost_estimate=cost,
        interpret=interpret,
        name="paged_attention_single" if blocks.queries == 1 else "paged_attention_tiles",
    )(*arguments)
