"""Storing a step's keys and values in their pages on TPU, in place.

The tokens of a step that go to one page follow each other, so the work is a list of runs: some
tokens, the page that takes them, and the first slot.  No two runs share a page, so no two writes
meet.  A page is written in groups of as many slots as a tile of memory has rows; what a run leaves
of its first or last group is read before.  Padding is written nowhere.

Quantising is left to XLA, which fuses it into what computes the keys: the kernel moves bytes.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxinfer.kernels.rows import Rows
from jaxinfer.kernels.tpu import LANES, SUBLANES, in_chunks, packing, padded_bytes, round_up
from jaxinfer.kernels.write_pages import Pool, quantize
from jaxinfer.shapes import dims

# Runs in fast memory, and how many of them are being read ahead; the others are being written.
DEPTH, AHEAD = 4, 2


class _Scratch(NamedTuple):
    """Memory of one core; the leading axis is a ring of runs."""

    k_new: Any  # [DEPTH, S, K, H]: tokens at their slots
    v_new: Any
    k: Any  # [DEPTH, K, S, H]: pages
    v: Any
    k_scale: Any  # [DEPTH, K, S]
    v_scale: Any
    in_sems: Any
    out_sems: Any


class _Run(NamedTuple):
    """Tokens `first`, … of the step go to the slots [begin, end) of a page."""

    first: Array
    page: Array
    begin: Array
    end: Array


class _Core:
    """The kernel: what one core does for its share of the runs."""

    def __init__(self, firsts, pages, begins, new: Pool, _, pool: Pool, scratch: _Scratch):
        self.firsts, self.pages, self.begins = firsts, pages, begins
        self.new, self.pool, self.scratch = new, pool, scratch
        self.scales: list[tuple[Any, Any]] = []
        if scratch.k_scale is not None:
            self.scales += [(scratch.k_scale, pool.k_scale_PKS)]
            self.scales += [(scratch.v_scale, pool.v_scale_PKS)]
        self.group = _group(pool)

    def work(self, num_runs: Array) -> None:
        """Store the runs `part`, `part + parts`, … before `num_runs`."""
        part, parts = pl.program_id(0), pl.num_programs(0)
        for ahead in range(AHEAD):
            self.read(part + ahead * parts, num_runs, jnp.int32(ahead), "start")

        def step(state):
            run, buffer = state
            later = lax.rem(buffer + AHEAD, DEPTH)
            self.write(run - (DEPTH - AHEAD) * parts, later, "wait")
            self.read(run + AHEAD * parts, num_runs, later, "start")
            self.read(run, num_runs, buffer, "wait")
            self.merge(run, buffer)
            self.write(run, buffer, "start")
            return run + parts, lax.rem(buffer + 1, DEPTH)

        run, buffer = lax.while_loop(lambda state: state[0] < num_runs, step, (part, jnp.int32(0)))
        for behind in range(DEPTH - AHEAD, 0, -1):
            self.write(run - behind * parts, lax.rem(buffer + DEPTH - behind, DEPTH), "wait")

    def run(self, index: Array) -> _Run:
        first, begin = self.firsts[index], self.begins[index]
        return _Run(first, self.pages[index], begin, begin + self.firsts[index + 1] - first)

    def slots(self, group: Array) -> Any:
        return pl.ds(pl.multiple_of(group * self.group, self.group), self.group)

    def groups(self, run: _Run) -> tuple[Array, Array]:
        return lax.div(run.begin, self.group), lax.div(run.end + self.group - 1, self.group)

    def read(self, index: Array, num_runs: Array, buffer: Array, action: str) -> None:
        """Start or await the copies of a run's tokens, and of what its page keeps beside them."""
        scratch, sem = self.scratch, self.scratch.in_sems.at[buffer]

        def copy(source, target):
            getattr(pltpu.make_async_copy(source, target, sem), action)()

        @pl.when(index < num_runs)
        def _():
            run = self.run(index)

            def copy_tokens(offset, size):
                tokens = pl.ds(run.first + offset, size)
                slots = pl.ds(run.begin + offset, size)
                copy(self.new.k_PKSH.at[tokens], scratch.k_new.at[buffer, slots])
                copy(self.new.v_PKSH.at[tokens], scratch.v_new.at[buffer, slots])

            most = min(self.pool.k_PKSH.shape[2], self.new.k_PKSH.shape[0])
            in_chunks(run.end - run.begin, most, copy_tokens)
            for ring, scale_PKS in self.scales:
                copy(scale_PKS.at[run.page], ring.at[buffer])

            @pl.loop(*self.groups(run))
            def _(group):
                slots, begin = self.slots(group), group * self.group

                @pl.when((begin < run.begin) | (begin + self.group > run.end))
                def _():
                    copy(self.pool.k_PKSH.at[run.page, :, slots], scratch.k.at[buffer, :, slots])
                    copy(self.pool.v_PKSH.at[run.page, :, slots], scratch.v.at[buffer, :, slots])

    def write(self, index: Array, buffer: Array, action: str) -> None:
        """Start or await the copies of a run's groups to their page."""
        scratch, sem = self.scratch, self.scratch.out_sems.at[buffer]

        def copy(source, target):
            getattr(pltpu.make_async_copy(source, target, sem), action)()

        @pl.when(index >= 0)
        def _():
            run = self.run(index)
            for ring, scale_PKS in self.scales:
                copy(ring.at[buffer], scale_PKS.at[run.page])

            @pl.loop(*self.groups(run))
            def _(group):
                slots = self.slots(group)
                copy(scratch.k.at[buffer, :, slots], self.pool.k_PKSH.at[run.page, :, slots])
                copy(scratch.v.at[buffer, :, slots], self.pool.v_PKSH.at[run.page, :, slots])

    def merge(self, index: Array, buffer: Array) -> None:
        """Put a run's tokens into its page."""
        scratch, run = self.scratch, self.run(index)

        @pl.loop(*self.groups(run))
        def _(group):
            slots = self.slots(group)
            slot = group * self.group + lax.broadcasted_iota(jnp.int32, (1, self.group, 1), 1)
            taken = (run.begin <= slot) & (slot < run.end)
            for new, pages in ((scratch.k_new, scratch.k), (scratch.v_new, scratch.v)):
                new_KSH = jnp.swapaxes(_unpacked(new[buffer, slots]), 0, 1)
                old_KSH = _unpacked(pages[buffer, :, slots])
                merged = jnp.where(taken, new_KSH, old_KSH)
                pages[buffer, :, slots] = _packed(merged, pages.dtype)

        for (ring, _), new_KT in zip(self.scales, jax.tree.leaves(self.new)[2:], strict=True):
            self.merge_scales(run, new_KT, ring.at[buffer])

    def merge_scales(self, run: _Run, new_KT: Any, scale_KS: Any) -> None:
        """The same for scales, which lie in lanes: token after token, and slot after slot."""
        page_size = scale_KS.shape[1]
        width = _window(page_size)
        skipped = lax.rem(run.first, LANES)
        window = new_KT[:, pl.ds(pl.multiple_of(run.first - skipped, LANES), width)]
        moved = pltpu.roll(window, lax.rem(run.begin + width - skipped, width), axis=1)
        slot = lax.broadcasted_iota(jnp.int32, (1, page_size), 1)
        taken = (run.begin <= slot) & (slot < run.end)
        scale_KS[...] = jnp.where(taken, moved[:, :page_size], scale_KS[...])


def _group(pool: Pool) -> int:
    """Slots that are written together: those of a tile."""
    page_size, tile = pool.k_PKSH.shape[2], SUBLANES * packing(pool.k_PKSH.dtype)
    return tile if page_size % tile == 0 else page_size


def _window(page_size: int) -> int:
    """Lanes that hold a page's worth of tokens, wherever in a register these begin."""
    return LANES + round_up(page_size, LANES)


def _unpacked(stored: Array) -> Array:
    """The bits or the values in 32 bits each, where rows can be moved and chosen one by one."""
    if stored.dtype.itemsize == 1:
        return pltpu.bitcast(stored, jnp.int8).astype(jnp.int32)
    return stored.astype(jnp.float32)


def _packed(whole: Array, dtype: Any) -> Array:
    """The inverse of `_unpacked`."""
    if whole.dtype == jnp.int32:
        return pltpu.bitcast(whole.astype(jnp.int8), dtype)
    return whole.astype(dtype)


def _store(num_runs, *refs) -> None:
    """The kernel's body."""
    _Core(*refs).work(num_runs[0])


def _runs(rows: Rows, page_size: int) -> tuple[Array, Array, Array, Array]:
    """How many runs there are, and of each the first token, the page and the first slot.

    One more token than there are runs: where the last one ends.
    """
    (T,) = rows.positions_T.shape
    page_T = rows.page_table_BM[rows.rows_T, rows.positions_T // page_size]
    begins_T = jnp.concatenate([jnp.ones(1, bool), page_T[1:] != page_T[:-1]])
    begins_T &= jnp.arange(T) < rows.num_tokens
    (firsts,) = jnp.nonzero(begins_T, size=T + 1, fill_value=rows.num_tokens)
    slot_T = rows.positions_T % page_size
    return jnp.sum(begins_T, dtype=jnp.int32)[None], firsts, page_T[firsts[:T]], slot_T[firsts[:T]]


def _lines(scale_TK: Array, page_size: int) -> Array:
    """Scales with the tokens in lanes, and so many more lanes that every window is inside."""
    T, _ = scale_TK.shape
    width = round_up(T, LANES) + _window(page_size)
    return jnp.pad(scale_TK.T, [(0, 0), (0, width - T)])


def _cost(new: Pool, pool: Pool, rows: Rows) -> pl.CostEstimate:
    """What it costs to store as many tokens of as many rows as there can be.

    n tokens that begin anywhere touch 1 + (n - 1) / group groups on average, and as many pages with
    their size for the group's; the first and the last group of a row are read before.
    """
    T, K, width = new.k_PKSH.shape
    B, S, group, dtype = len(rows.kv_lens_B), pool.shape[2], _group(pool), pool.k_PKSH.dtype
    more = max(T - B, 0)
    written, runs = B + more // group, B + more // S
    groups = written + min(written, 2 * B)
    moved = 2 * groups * padded_bytes((K, group, width), dtype)
    if pool.k_scale_PKS is not None:  # those of a page, read and written
        moved += 2 * 2 * runs * padded_bytes((K, S), jnp.float32)
    moved += sum(padded_bytes(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(new))
    return pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=moved)


@partial(jax.jit, static_argnames=("vmem_bytes", "num_cores", "interpret"))
def write_pages(
    pool: Pool,
    k_TKH: Array,
    v_TKH: Array,
    rows: Rows,
    *,
    vmem_bytes: int,
    num_cores: int = 1,
    interpret: Any = False,
) -> Pool:
    """As `jaxinfer.kernels.write_pages.write_pages`, on TPU; padding goes nowhere.

    No two tokens of the step may have the same position of the same sequence, and the tokens of a
    sequence follow each other.  vmem_bytes: vector memory that the kernel may use.  num_cores:
    cores that act as one device.  interpret: False, or a `pltpu.InterpretParams`.
    """
    sizes = dims(pool_PKSH=pool, k_TKH=k_TKH, v_TKH=v_TKH)
    K, S, dtype = sizes["K"], sizes["S"], pool.k_PKSH.dtype
    if pool.k_scale_PKS is None:
        new = Pool(k_TKH.astype(dtype), v_TKH.astype(dtype))
    else:
        (k_TKH, k_scale), (v_TKH, v_scale) = quantize(k_TKH, dtype), quantize(v_TKH, dtype)
        new = Pool(k_TKH, v_TKH, _lines(k_scale, S), _lines(v_scale, S))
    width = pool.k_PKSH.shape[3]
    tokens, pages = pltpu.VMEM((DEPTH, S, K, width), dtype), pltpu.VMEM((DEPTH, K, S, width), dtype)
    scales = None if pool.k_scale_PKS is None else pltpu.VMEM((DEPTH, K, S), jnp.float32)
    sems = pltpu.SemaphoreType.DMA((DEPTH,))
    anywhere, vmem = pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pltpu.VMEM)
    in_lanes = None if scales is None else vmem
    arguments = (*_runs(rows, S), new, pool)
    leaves, first = len(jax.tree.leaves(pool)), len(jax.tree.leaves(arguments[:5]))
    return pl.pallas_call(
        _store,
        out_shape=jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), pool),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(num_cores,),
            in_specs=(
                Pool(anywhere, anywhere, in_lanes, in_lanes),
                jax.tree.map(lambda _: anywhere, pool),
            ),
            out_specs=jax.tree.map(lambda _: anywhere, pool),
            scratch_shapes=[_Scratch(tokens, tokens, pages, pages, scales, scales, sems, sems)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=vmem_bytes
        ),
        cost_estimate=_cost(new, pool, rows),
        input_output_aliases={first + leaf: leaf for leaf in range(leaves)},
        interpret=interpret,
        name="write_pages",
    )(*arguments)
