"""Attention over pages on TPU: the contract of `paged_attention`, in one kernel body.

The work is cut into blocks: some pages of one row for one tile of its queries.  A tile is one
position of a row of one token, or several of a longer row; with the G query heads of a KV head it
makes one matrix, so each page is read once for all of them.  Blocks are worked off in one flat
loop, while the next ones, of this tile, row or another, are being copied from HBM.  Tiles, pages
and rows that the batch does not have are not visited.

Cores of one device share the KV heads, or else the rows; a context is not split between them: with
at most two cores, heads or rows are enough to keep both busy, and the sums keep their order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxinfer.errors import ShapeError
from jaxinfer.kernels.paged_attention import capped
from jaxinfer.kernels.rows import Rows
from jaxinfer.kernels.tpu import FOUR_BITS, LANES, in_chunks, padded_bytes, planes, round_up
from jaxinfer.kernels.write_pages import Pool
from jaxinfer.shapes import dims

# Instead of -inf, which would make NaN of a difference.  Where it is all that a query has seen, its
# weights are wrong, but the first visible score shrinks them to zero.
MASKED = -1e30
# Page tables in fast memory: of the row whose pages are being copied, and of the next two.
TABLES = 3
# Blocks of this many bytes, as many of them in flight, keep the memory busy.
BLOCK_BYTES = 2 * 2**20
IN_FLIGHT_BYTES = 4 * 2**20
# More KV heads than these are worked off one group after the other: code is unrolled over heads.
MOST_HEADS = 8


@dataclass(frozen=True)
class Blocks:
    """How the work of one call is cut.

    queries: positions in a tile, a power of two; 1 for rows of one token.  pages: in a block.
    heads: KV heads that are worked on together; divides K.  parts: into how many the rows are
    dealt out.  depth: blocks in fast memory, of which all but one are being copied.
    """

    queries: int
    pages: int
    heads: int
    parts: int = 1
    depth: int = 2


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


class _Scratch(NamedTuple):
    """Memory of one core; the leading axis of what is copied ahead is a ring of blocks."""

    q: Any  # [depth, Q, heads, G, H], as it comes
    k: Any  # [depth, pages, heads, S, H], like the pool
    v: Any
    k_scale: Any  # [depth, pages, K, S]
    v_scale: Any
    matrix: Any  # [heads, planes, Q·G, H/planes]: the tile's queries
    peak: Any  # [heads, Q·G, LANES]: of each query the largest score, the same in all lanes
    total: Any  # the same, of the sum of weights
    acc: Any  # [heads, planes, Q·G, H/planes]: the weighted values
    scales: Any  # [2, K, slots]: the block's scales, slot after slot
    out: Any  # [Q, heads, G, H]
    tables: Any  # [TABLES, …, LANES]: entries of rows' page tables
    sent: Any  # how many tokens of `out` are on their way
    page_sems: Any
    q_sems: Any
    table_sems: Any
    out_sem: Any


def _scratch(blocks: Blocks, q_TKGH: Any, pool: Pool, table_chunks: int) -> _Scratch:
    (_, K, G, H), (*_, S, stored_width) = q_TKGH.shape, pool.k_PKSH.shape
    depth, heads, lines, f32 = blocks.depth, blocks.heads, blocks.queries * G, jnp.float32
    slots, folded = blocks.pages * S, (heads, H // stored_width, lines, stored_width)
    pages = pltpu.VMEM((depth, blocks.pages, heads, S, stored_width), pool.k_PKSH.dtype)
    scales = pltpu.VMEM((depth, blocks.pages, K, S), f32)
    scaled = pool.k_scale_PKS is not None
    return _Scratch(
        q=pltpu.VMEM((depth, blocks.queries, heads, G, H), q_TKGH.dtype),
        k=pages,
        v=pages,
        k_scale=scales if scaled else None,
        v_scale=scales if scaled else None,
        matrix=pltpu.VMEM(folded, q_TKGH.dtype),
        peak=pltpu.VMEM((heads, lines, LANES), f32),
        total=pltpu.VMEM((heads, lines, LANES), f32),
        acc=pltpu.VMEM(folded, f32),
        scales=pltpu.VMEM((2, K, slots), f32) if scaled else None,
        out=pltpu.VMEM((blocks.queries, heads, G, H), q_TKGH.dtype),
        tables=pltpu.SMEM((TABLES, table_chunks, 1, LANES), jnp.int32),
        sent=pltpu.SMEM((1,), jnp.int32),
        page_sems=pltpu.SemaphoreType.DMA((depth,)),
        q_sems=pltpu.SemaphoreType.DMA((depth,)),
        table_sems=pltpu.SemaphoreType.DMA((TABLES,)),
        out_sem=pltpu.SemaphoreType.DMA(()),
    )


def vmem_needed(blocks: Blocks, q_TKGH: Any, pool: Pool) -> int:
    """Bytes of vector memory that a call takes: its buffers, and scores in a few versions."""
    buffers = [
        padded_bytes(ref.shape, ref.dtype)
        for ref in _scratch(blocks, q_TKGH, pool, 1)
        if ref is not None and ref.memory_space == pltpu.VMEM
    ]
    lines, slots = blocks.queries * q_TKGH.shape[2], blocks.pages * pool.shape[2]
    wide = padded_bytes((slots, pool.shape[3]), jnp.float32)
    return sum(buffers) + 4 * padded_bytes((lines, slots), jnp.float32) + 6 * wide


class _Cursor(NamedTuple):
    """A place in the work of a core: a block of a tile of a row."""

    row: Array
    tile: Array
    block: Array


@dataclass(frozen=True)
class _Options:
    """What is known when the kernel is compiled."""

    blocks: Blocks
    scale: float
    window: int | None
    soft_cap: float | None


class _Core:
    """The kernel: what one core does for its KV heads and its rows."""

    def __init__(
        self, starts_B, lens_B, kv_lens_B, q_TKGH, tables, pool, sinks, _, out_TKGH,
        scratch, *, options: _Options,
    ):  # fmt: skip
        self.starts_B, self.lens_B, self.kv_lens_B = starts_B, lens_B, kv_lens_B
        self.q_TKGH, self.tables, self.pool, self.sinks = q_TKGH, tables, pool, sinks
        self.out_TKGH, self.scratch, self.options = out_TKGH, scratch, options
        self.blocks, self.page_size = options.blocks, pool.k_PKSH.shape[2]
        group, self.part = _divide(pl.program_id(0), options.blocks.parts)
        self.heads = pl.ds(group * options.blocks.heads, options.blocks.heads)

    def run(self, begin: Array, end: Array) -> None:
        """Work off this core's share of the rows [begin, end)."""
        depth, first_row = self.blocks.depth, begin + self.part
        self.end_row = end
        self.scratch.sent[0] = 0
        for ahead in range(TABLES - 1):
            self.table(first_row + ahead * self.blocks.parts, "start")
        zero = jnp.int32(0)
        ahead = start = _Cursor(first_row, zero, zero)
        for buffer in range(depth - 1):
            ahead = self.fetch(ahead, jnp.int32(buffer))

        def step(state):
            here, ahead, buffer = state
            last = jnp.where(buffer == 0, depth - 1, buffer - 1)
            ahead = self.fetch(ahead, last)
            self.attend(here, buffer)
            return self.following(here), ahead, jnp.where(buffer == depth - 1, 0, buffer + 1)

        lax.while_loop(lambda state: state[0].row < self.end_row, step, (start, ahead, zero))
        self.send(self.scratch.sent[0], zero, "wait")

    def clear(self, begin: Array, end: Array) -> None:
        """Zeros for the tokens [begin, end); one core of those that share the rows does it."""
        queries = self.blocks.queries
        end = jnp.where(self.part == 0, end, begin)
        self.scratch.out[...] = jnp.zeros_like(self.scratch.out)

        @pl.loop(0, lax.div(end - begin + queries - 1, queries))
        def _(tile):
            token = begin + tile * queries
            count = jnp.minimum(end - token, queries)
            self.send(count, token, "start")
            self.send(count, token, "wait")

    def span(self, row: Array, tile: Array) -> tuple[Array, Array, Array]:
        """The position of a tile's first query, and the table entries [begin, end) it looks at.

        A row of no tokens looks at one, for the sake of a simple loop.
        """
        kv_len, queries = self.kv_lens_B[row], self.blocks.queries
        first = kv_len - self.lens_B[row] + tile * queries
        last = jnp.maximum(jnp.minimum(first + queries, kv_len) - 1, 0)
        seen = 0 if self.options.window is None else jnp.maximum(first - self.options.window + 1, 0)
        return first, lax.div(jnp.int32(seen), self.page_size), lax.div(last, self.page_size) + 1

    def entries(self, here: _Cursor) -> tuple[Array, Array]:
        """The first table entry of a block, and how many it has."""
        _, begin, end = self.span(here.row, here.tile)
        begin += here.block * self.blocks.pages
        return begin, jnp.minimum(end - begin, self.blocks.pages)

    def following(self, here: _Cursor) -> _Cursor:
        """The next block: of this tile, the next tile, or the next row of this core."""
        begin, count = self.entries(here)
        _, _, end = self.span(here.row, here.tile)
        next_tile = begin + count == end
        next_row = next_tile & ((here.tile + 1) * self.blocks.queries >= self.lens_B[here.row])
        return _Cursor(
            jnp.where(next_row, here.row + self.blocks.parts, here.row),
            jnp.where(next_row, 0, jnp.where(next_tile, here.tile + 1, here.tile)),
            jnp.where(next_tile, 0, here.block + 1),
        )

    def slot(self, row: Array) -> Array:
        """Where in the ring a row's page table lies."""
        return lax.rem(lax.div(row, self.blocks.parts), TABLES)

    def table(self, row: Array, action: str) -> None:
        """Start or await the copy of what is needed of a row's page table."""
        slot = self.slot(row)

        @pl.when(row < self.end_row)
        def _():
            _, begin, _ = self.span(row, jnp.int32(0))
            last = lax.div(jnp.maximum(self.kv_lens_B[row] - 1, 0), self.page_size)

            @pl.loop(lax.div(begin, LANES), lax.div(last, LANES) + 1)
            def _(chunk):
                copy = pltpu.make_async_copy(
                    self.tables.at[row, chunk],
                    self.scratch.tables.at[slot, chunk],
                    self.scratch.table_sems.at[slot],
                )
                getattr(copy, action)()

    def page(self, page: Array, buffer: Array, index: Array, action: str) -> None:
        """Start or await the copies of one page of a block."""
        scratch, sem = self.scratch, self.scratch.page_sems.at[buffer]
        pages = [
            (self.pool.k_PKSH.at[page, self.heads], scratch.k),
            (self.pool.v_PKSH.at[page, self.heads], scratch.v),
        ]
        if self.pool.k_scale_PKS is not None:
            pages += [
                (self.pool.k_scale_PKS.at[page], scratch.k_scale),
                (self.pool.v_scale_PKS.at[page], scratch.v_scale),
            ]
        for source, target in pages:
            getattr(pltpu.make_async_copy(source, target.at[buffer, index], sem), action)()

    def queries(self, here: _Cursor, buffer: Array, action: str) -> None:
        """Start or await the copy of a tile's queries; a last one may be short."""
        done = here.tile * self.blocks.queries
        token = self.starts_B[here.row] + done
        count = jnp.minimum(self.lens_B[here.row] - done, self.blocks.queries)

        def copy(offset, size):
            source = self.q_TKGH.at[pl.ds(token + offset, size), self.heads]
            target = self.scratch.q.at[buffer, pl.ds(offset, size)]
            sem = self.scratch.q_sems.at[buffer]
            getattr(pltpu.make_async_copy(source, target, sem), action)()

        in_chunks(count, self.blocks.queries, copy)

    def send(self, count: Array, token: Array, action: str) -> None:
        """Start or await the copy of finished tokens to the result."""

        def copy(offset, size):
            source = self.scratch.out.at[pl.ds(offset, size)]
            target = self.out_TKGH.at[pl.ds(token + offset, size), self.heads]
            getattr(pltpu.make_async_copy(source, target, self.scratch.out_sem), action)()

        in_chunks(count, self.blocks.queries, copy)

    def fetch(self, ahead: _Cursor, buffer: Array) -> _Cursor:
        """Start the copies of a block, if there is one, and return the place of the next."""
        slot = self.slot(ahead.row)

        def start():
            @pl.when((ahead.tile == 0) & (ahead.block == 0))
            def _():
                self.table(ahead.row, "wait")
                self.table(ahead.row + (TABLES - 1) * self.blocks.parts, "start")

            begin, count = self.entries(ahead)

            @pl.loop(0, count)
            def _(index):
                entry = begin + index
                chunk, lane = _divide(entry, LANES)
                self.page(self.scratch.tables[slot, chunk, 0, lane], buffer, index, "start")

            @pl.when(ahead.block == 0)
            def _():
                self.queries(ahead, buffer, "start")

            return self.following(ahead)

        return lax.cond(ahead.row < self.end_row, start, lambda: ahead)

    def attend(self, here: _Cursor, buffer: Array) -> None:
        """Fold a block into its tile; the last one finishes the tile."""
        first, _, end = self.span(here.row, here.tile)
        begin, count = self.entries(here)

        @pl.when(here.block == 0)
        def _():
            self.queries(here, buffer, "wait")
            self.begin_tile(buffer)

        @pl.loop(0, count)
        def _(index):
            self.page(jnp.int32(0), buffer, index, "wait")

        scratch = self.scratch
        if self.pool.k_scale_PKS is not None:
            unit = 1 / FOUR_BITS if scratch.k.dtype == jnp.uint8 else 1.0
            for kind, scales in enumerate((scratch.k_scale, scratch.v_scale)):
                in_line = [scales[buffer, page] for page in range(self.blocks.pages)]
                scratch.scales[kind] = jnp.concatenate(in_line, axis=1) * unit
        for head in range(self.blocks.heads):
            self.fold(head, buffer, first, begin * self.page_size, self.kv_lens_B[here.row])

        @pl.when(begin + count == end)
        def _():
            self.send(scratch.sent[0], jnp.int32(0), "wait")
            self.finish_tile()
            done = here.tile * self.blocks.queries
            scratch.sent[0] = jnp.minimum(self.lens_B[here.row] - done, self.blocks.queries)
            self.send(scratch.sent[0], self.starts_B[here.row] + done, "start")

    def begin_tile(self, buffer: Array) -> None:
        """Queries as matrices, and nothing seen yet but the sinks."""
        scratch = self.scratch
        _, num_planes, lines, width = scratch.matrix.shape
        for head in range(self.blocks.heads):
            # Rows of a packed type cannot be moved one by one; those of float32 can.
            q_QGH = scratch.q[buffer, :, head].astype(jnp.float32)
            q = q_QGH.reshape(lines, num_planes * width)
            for plane in range(num_planes):
                part = q[:, plane * width : (plane + 1) * width]
                scratch.matrix[head, plane] = part.astype(scratch.matrix.dtype)
            if self.sinks is None:
                scratch.peak[head] = jnp.full((lines, LANES), MASKED, jnp.float32)
            else:
                sinks_GL = self.sinks[self.heads.start + head]
                tile = jnp.broadcast_to(sinks_GL[None], (self.blocks.queries, *sinks_GL.shape))
                scratch.peak[head] = tile.reshape(lines, LANES)
        scratch.total[...] = jnp.full_like(scratch.total, 0.0 if self.sinks is None else 1.0)
        scratch.acc[...] = jnp.zeros_like(scratch.acc)

    def fold(self, head: int, buffer: Array, first: Array, position: Array, kv_len: Array) -> None:
        """Fold a block's pages of one head into the running maximum, sum and weighted values.

        first: position of the tile's first query; position: of the block's first slot.
        """
        scratch, window = self.scratch, self.options.window
        (_, _, lines, width), (_, pages, _, S, _) = scratch.matrix.shape, scratch.k.shape
        slots, G, dtype = pages * S, lines // self.blocks.queries, scratch.matrix.dtype
        exact = lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
        product = partial(lax.dot_general, precision=exact, preferred_element_type=jnp.float32)
        which = pl.ds(self.heads.start + head, 1)

        scores = 0.0
        for plane, k in enumerate(planes(scratch.k[buffer, :, head], dtype)):
            k = k.reshape(slots, width)
            scores += product(scratch.matrix[head, plane], k, (((1,), (1,)), ((), ())))
        scores *= self.options.scale
        if scratch.scales is not None:
            scores *= scratch.scales[0, which]
        scores = capped(scores, self.options.soft_cap)
        slot = position + lax.broadcasted_iota(jnp.int32, (1, slots), 1)
        query = first + lax.div(lax.broadcasted_iota(jnp.int32, (lines, 1), 0), G)
        seen = slot <= query
        if window is not None:
            seen &= slot > query - window
        scores = jnp.where(seen, scores, MASKED)

        old_peak = scratch.peak[head]
        peak = jnp.maximum(old_peak, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp(scores - _lanes(peak, slots))
        shrink = jnp.exp(old_peak - peak)
        scratch.peak[head] = peak
        scratch.total[head] = scratch.total[head] * shrink + jnp.sum(weights, 1, keepdims=True)
        if scratch.scales is not None:
            weights = jnp.where(seen, weights * scratch.scales[1, which], 0.0)
        written = position + lax.broadcasted_iota(jnp.int32, (slots, 1), 0) < kv_len
        for plane, v in enumerate(planes(scratch.v[buffer, :, head], dtype)):
            # A NaN that nobody may see would survive its zero weight: 0 · NaN = NaN.
            v = jnp.where(written, v.reshape(slots, width), jnp.zeros((), dtype))
            update = product(weights.astype(dtype), v, (((1,), (0,)), ((), ())))
            scratch.acc[head, plane] = scratch.acc[head, plane] * _lanes(shrink, width) + update

    def finish_tile(self) -> None:
        scratch = self.scratch
        Q, _, G, width = scratch.out.shape
        for head in range(self.blocks.heads):
            acc = jnp.concatenate(
                [scratch.acc[head, plane] for plane in range(scratch.acc.shape[1])], axis=1
            )
            result = acc / _lanes(scratch.total[head], width)
            scratch.out[:, head] = result.reshape(Q, G, width).astype(scratch.out.dtype)


def _divide(number: Array, divisor: int) -> tuple[Array, Array]:
    """Quotient and remainder of what is not negative."""
    return lax.div(number, divisor), lax.rem(number, divisor)


def _attend(*refs, options: _Options) -> None:
    """The kernel's body."""
    bounds, *refs = refs
    core = _Core(*refs, options=options)
    core.run(bounds[0], bounds[1])
    core.clear(bounds[2], bounds[3])


def _lanes(column: Array, width: int) -> Array:
    """A column that is repeated in LANES lanes, in `width` of them."""
    return jnp.concatenate([column] * pl.cdiv(width, LANES), axis=1)[:, :width]


@partial(
    jax.jit,
    static_argnames=(
        "scale", "window", "soft_cap", "vmem_bytes", "num_cores", "single", "tiles", "interpret"
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
    single: Blocks | None = None,
    tiles: Blocks | None = None,
    interpret: Any = False,
) -> Array:
    """As `jaxinfer.kernels.paged_attention.paged_attention`, on TPU.

    vmem_bytes: vector memory that the kernel may use.  num_cores: cores that act as one device.
    single, tiles: how rows of one token and longer ones are cut; None: `block_sizes` decides.
    interpret: False, or a `pltpu.InterpretParams`.
    """
    sizes = dims(q_TKGH=q_TKGH, pool_PKSH=pool, page_table_BM=rows.page_table_BM)
    choose = partial(
        block_sizes, q_TKGH, pool, rows, vmem_bytes=vmem_bytes * 3 // 4, num_cores=num_cores
    )

    def call(blocks: Blocks, begin, end, clear, out_TKGH):
        options = _Options(blocks, scale, window, soft_cap)
        bounds = jnp.stack([jnp.int32(begin), end, clear, jnp.int32(sizes["T"])])
        return _call(q_TKGH, pool, rows, sinks_KG, out_TKGH, bounds, options, vmem_bytes, interpret)

    single = single or choose(single=True)
    if sizes["B"] == sizes["T"]:
        return call(single, 0, rows.num_rows, rows.num_tokens, None)
    out_TKGH = call(single, 0, rows.num_single, jnp.int32(sizes["T"]), None)
    tiles = tiles or choose(single=False)
    return call(tiles, rows.num_single, rows.num_rows, rows.num_tokens, out_TKGH)


def _call(q_TKGH, pool, rows, sinks_KG, out_TKGH, bounds, options, vmem_bytes, interpret) -> Array:
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
        partial(_attend, options=options),
        out_shape=jax.ShapeDtypeStruct(q_TKGH.shape, q_TKGH.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(K // blocks.heads * blocks.parts,),
            in_specs=specs,
            out_specs=anywhere,
            scratch_shapes=[_scratch(blocks, q_TKGH, pool, chunks)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=vmem_bytes
        ),
        input_output_aliases=aliases,
        interpret=interpret,
        name="paged_attention_single" if blocks.queries == 1 else "paged_attention_tiles",
    )(*arguments)
