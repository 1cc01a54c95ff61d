"""The kernel of attention over pages on TPU: what one core does.

The work is cut into blocks: some pages of one row for one tile of its queries.  A tile is one
position of a row of one token, or several of a longer row; with the G query heads of a KV head it
makes one matrix, so each page is read once for all of them.  Blocks are worked off in one flat
loop, while the next ones, of this tile, row or another, are being copied from HBM.  Tiles, pages
and rows that the batch does not have are not visited.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxinfer.kernels.paged_attention import capped
from jaxinfer.kernels.tpu import FOUR_BITS, LANES, across, divide, in_chunks, planes
from jaxinfer.kernels.write_pages import Pool

# Instead of -inf, which would make NaN of a difference.  Where it is all that a query has seen, its
# weights are wrong, but the first visible score shrinks them to zero.
MASKED = -1e30
# Page tables in fast memory: of the row whose pages are being copied, and of the next two.
TABLES = 3


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


class Scratch(NamedTuple):
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


def scratch(blocks: Blocks, q_TKGH: Any, pool: Pool, table_chunks: int) -> Scratch:
    (_, K, G, H), (*_, S, stored_width) = q_TKGH.shape, pool.k_PKSH.shape
    depth, heads, lines, f32 = blocks.depth, blocks.heads, blocks.queries * G, jnp.float32
    slots, folded = blocks.pages * S, (heads, H // stored_width, lines, stored_width)
    pages = pltpu.VMEM((depth, blocks.pages, heads, S, stored_width), pool.k_PKSH.dtype)
    scales = pltpu.VMEM((depth, blocks.pages, K, S), f32)
    scaled = pool.k_scale_PKS is not None
    return Scratch(
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


class Cursor(NamedTuple):
    """A place in the work of a core: a block of a tile of a row."""

    row: Array
    tile: Array
    block: Array


@dataclass(frozen=True)
class Options:
    """What is known when the kernel is compiled."""

    blocks: Blocks
    scale: float
    window: int | None
    soft_cap: float | None


class _Core:
    """The kernel: what one core does for its KV heads and its rows."""

    def __init__(
        self, starts_B, lens_B, kv_lens_B, q_TKGH, tables, pool, sinks, _, out_TKGH,
        scratch, *, options: Options,
    ):  # fmt: skip
        self.starts_B, self.lens_B, self.kv_lens_B = starts_B, lens_B, kv_lens_B
        self.q_TKGH, self.tables, self.pool, self.sinks = q_TKGH, tables, pool, sinks
        self.out_TKGH, self.scratch, self.options = out_TKGH, scratch, options
        self.blocks, self.page_size = options.blocks, pool.k_PKSH.shape[2]
        group, self.part = divide(pl.program_id(0), options.blocks.parts)
        self.heads = pl.ds(group * options.blocks.heads, options.blocks.heads)

    def run(self, begin: Array, end: Array) -> None:
        """Work off this core's share of the rows [begin, end).  The first turns only copy."""
        depth, first_row, self.end_row = self.blocks.depth, begin + self.part, end
        self.scratch.sent[0] = 0
        for ahead in range(TABLES - 1):
            self.table(first_row + ahead * self.blocks.parts, "start")
        zero = jnp.int32(0)
        start = Cursor(first_row, zero, zero)

        def step(state):
            here, ahead, count = state
            ahead = self.fetch(ahead, lax.rem(count, depth))
            buffer = lax.rem(count + 1, depth)
            here = lax.cond(count + 1 < depth, lambda: here, lambda: self.attend(here, buffer))
            return here, ahead, count + 1

        lax.while_loop(lambda state: state[0].row < end, step, (start, start, zero))
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

    def span(self, row: Array, tile: Array) -> tuple[Array, Array]:
        """The positions of a tile's first and last query; a row of no tokens has one, too."""
        kv_len, queries = self.kv_lens_B[row], self.blocks.queries
        first = kv_len - self.lens_B[row] + tile * queries
        return first, jnp.maximum(jnp.minimum(first + queries, kv_len) - 1, 0)

    def begin(self, first: Array) -> Array:
        """The first table entry that a tile looks at whose first query is at `first`."""
        if self.options.window is None:
            return jnp.int32(0)
        return lax.div(jnp.maximum(first - self.options.window + 1, 0), self.page_size)

    def entries(self, here: Cursor) -> tuple[Array, Array, Array]:
        """The table entries [begin, end) of a block, and whether it is the tile's last."""
        first, last = self.span(here.row, here.tile)
        begin, tile_end = self.begin(first), lax.div(last, self.page_size) + 1
        begin += here.block * self.blocks.pages
        end = jnp.minimum(begin + self.blocks.pages, tile_end)
        return begin, end, end == tile_end

    def following(self, here: Cursor) -> Cursor:
        """The next block: of this tile, the next tile, or the next row of this core."""
        _, _, next_tile = self.entries(here)
        next_row = next_tile & ((here.tile + 1) * self.blocks.queries >= self.lens_B[here.row])
        return Cursor(
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
            first = self.span(row, jnp.int32(0))[0]
            last = lax.div(jnp.maximum(self.kv_lens_B[row] - 1, 0), self.page_size)

            @pl.loop(lax.div(self.begin(first), LANES), lax.div(last, LANES) + 1)
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

    def tokens(self, here: Cursor) -> tuple[Array, Array]:
        """The first token of a tile, and how many it has: a row's last tile may be short."""
        done = here.tile * self.blocks.queries
        count = jnp.minimum(self.lens_B[here.row] - done, self.blocks.queries)
        return self.starts_B[here.row] + done, count

    def queries(self, here: Cursor, buffer: Array, action: str) -> None:
        """Start or await the copy of a tile's queries."""
        token, count = self.tokens(here)

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

    def fetch(self, ahead: Cursor, buffer: Array) -> Cursor:
        """Start the copies of a block, if there is one, and return the place of the next."""
        slot = self.slot(ahead.row)

        def start():
            @pl.when((ahead.tile == 0) & (ahead.block == 0))
            def _():
                self.table(ahead.row, "wait")
                self.table(ahead.row + (TABLES - 1) * self.blocks.parts, "start")

            begin, end = self.entries(ahead)[:2]

            @pl.loop(begin, end)
            def _(entry):
                chunk, lane = divide(entry, LANES)
                page = self.scratch.tables[slot, chunk, 0, lane]
                self.page(page, buffer, entry - begin, "start")

            @pl.when(ahead.block == 0)
            def _():
                self.queries(ahead, buffer, "start")

            return self.following(ahead)

        return lax.cond(ahead.row < self.end_row, start, lambda: ahead)

    def attend(self, here: Cursor, buffer: Array) -> Cursor:
        """Fold a block into its tile, which its last one finishes; returns the next one's place."""
        first, last = self.span(here.row, here.tile)
        begin, end, finished = self.entries(here)

        @pl.when(here.block == 0)
        def _():
            self.queries(here, buffer, "wait")
            self.begin_tile(buffer)

        @pl.loop(0, end - begin)
        def _(index):
            self.page(jnp.int32(0), buffer, index, "wait")

        scratch = self.scratch
        if scratch.scales is not None:
            unit = 1 / FOUR_BITS if scratch.k.dtype == jnp.uint8 else 1.0
            for kind, scales in enumerate((scratch.k_scale, scratch.v_scale)):
                in_line = [scales[buffer, page] for page in range(self.blocks.pages)]
                scratch.scales[kind] = jnp.concatenate(in_line, axis=1) * unit
        for head in range(self.blocks.heads):
            self.fold(head, buffer, first, last, begin * self.page_size)

        @pl.when(finished)
        def _():
            self.send(scratch.sent[0], jnp.int32(0), "wait")
            self.finish_tile()
            token, scratch.sent[0] = self.tokens(here)
            self.send(scratch.sent[0], token, "start")

        return self.following(here)

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

    def fold(self, head: int, buffer: Array, first: Array, last: Array, position: Array) -> None:
        """Fold a block's pages of one head into the running maximum, sum and weighted values.

        first, last: positions of the tile's queries; position: of the block's first slot.
        """
        scratch, window = self.scratch, self.options.window
        (_, _, lines, width), (_, pages, _, S, _) = scratch.matrix.shape, scratch.k.shape
        slots, G, dtype = pages * S, lines // self.blocks.queries, scratch.matrix.dtype
        exact = lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
        product = partial(lax.dot_general, precision=exact, preferred_element_type=jnp.float32)
        which = pl.ds(self.heads.start + head, 1)

        products = [
            product(scratch.matrix[head, plane], k.reshape(slots, width), (((1,), (1,)), ((), ())))
            for plane, k in enumerate(planes(scratch.k[buffer, :, head], dtype))
        ]
        scores = reduce(jnp.add, products) * self.options.scale
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
        weights = jnp.exp(scores - across(peak, slots))
        shrink = jnp.exp(old_peak - peak)
        scratch.peak[head] = peak
        scratch.total[head] = scratch.total[head] * shrink + jnp.sum(weights, 1, keepdims=True)
        if scratch.scales is not None:
            weights = jnp.where(seen, weights * scratch.scales[1, which], 0.0)
        copied = position + lax.broadcasted_iota(jnp.int32, (slots, 1), 0) <= last
        for plane, v in enumerate(planes(scratch.v[buffer, :, head], dtype)):
            # A NaN that nobody may see would survive its zero weight: 0 · NaN = NaN.
            v = jnp.where(copied, v.reshape(slots, width), jnp.zeros((), dtype))
            update = product(weights.astype(dtype), v, (((1,), (0,)), ((), ())))
            scratch.acc[head, plane] = scratch.acc[head, plane] * across(shrink, width) + update

    def finish_tile(self) -> None:
        scratch = self.scratch
        Q, _, G, width = scratch.out.shape
        for head in range(self.blocks.heads):
            acc = jnp.concatenate(
                [scratch.acc[head, plane] for plane in range(scratch.acc.shape[1])], axis=1
            )
            result = acc / across(scratch.total[head], width)
            scratch.out[:, head] = result.reshape(Q, G, width).astype(scratch.out.dtype)


def attend(*refs, options: Options) -> None:
    """The kernel's body."""
    bounds, *refs = refs
    core = _Core(*refs, options=options)
    core.run(bounds[0], bounds[1])
    core.clear(bounds[2], bounds[3])
