"""Attention of a ragged batch over a paged KV cache: contract and reference.

A step carries T tokens end to end.  Row b owns the `query_lens_B[b]` tokens from
`query_starts_B[b]` on; they are the last ones of a sequence of `kv_lens_B[b]` tokens whose keys and
values lie in the pages `page_table_BM[b]`, position p in slot p % S of entry p // S.  A decode is a
row of one token, a prefill a row of many; rows of one token come first (`num_single` of them).
Where there are as many rows as tokens (B = T), every row has one token; a prompt's tokens may come
as such rows too, since all are written before any is read.

The order of the calls is part of the contract: `write_pages` stores the step's own keys and values,
`paged_attention` then reads everything from the pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxinfer.kernels.rows import Rows
from jaxinfer.kernels.write_pages import Pool, unpack
from jaxinfer.shapes import dims

# Query positions that one step of the reference's prefill loop works on.
QUERY_TILE = 64


# For those who call it alone; in a model the whole layer is traced once (`models/decoder.py`).
@partial(jax.jit, static_argnames=("scale", "window", "soft_cap"))
def paged_attention(
    q_TKGH: Array,
    pool: Pool,
    rows: Rows,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_KG: Array | None = None,
) -> Array:
    """Causal softmax attention of every token over its own sequence: returns `[T, K, G, H]`.

    scale: multiplies the scores.  window: a token sees this many latest positions, itself included.
    soft_cap: the scaled scores are bent into (-soft_cap, soft_cap): see `capped`.
    sinks_KG: for each query head a score, neither scaled nor capped, that takes part in the softmax
        as if of one more position whose value is zero (arXiv:2508.10925).
    Slots beyond a row's length and padding tokens may hold anything, NaN included; the result of a
    padding token is unspecified but finite.

    This is the reference, and the CPU's real path: an online softmax (arXiv:1805.02867) over pages,
    with trip counts that depend on the data, so nothing is spent on the width of the table.
    """
    sizes = dims(q_TKGH=q_TKGH, pool_PKSH=pool, page_table_BM=rows.page_table_BM)
    options = _Options(scale, window, soft_cap, sinks_KG)
    single_BKGH = _attend_single(q_TKGH[: sizes["B"]], pool, rows, options)
    if sizes["B"] == sizes["T"]:
        return single_BKGH
    tile = min(QUERY_TILE, sizes["T"])
    # A tile may overhang its row; what follows is written later, by the next rows' own tiles.
    out_TKGH = jnp.pad(single_BKGH, [(0, sizes["T"] - sizes["B"] + tile), (0, 0), (0, 0), (0, 0)])
    return _attend_tiles(out_TKGH, q_TKGH, pool, rows, tile, options)[: sizes["T"]]


def capped(scores: Array, soft_cap: float | None) -> Array:
    """Scores bent smoothly into (-soft_cap, soft_cap) (arXiv:2408.00118); unchanged if None."""
    return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)


@dataclass(frozen=True)
class _Options:
    """The keyword arguments of `paged_attention`."""

    scale: float
    window: int | None
    soft_cap: float | None
    sinks_KG: Array | None


def _page_range(first: Array, last: Array, page_size: int, window: int | None):
    """Table entries that queries at positions first … last look at: [begin, end)."""
    begin = 0 if window is None else jnp.maximum(first - window + 1, 0) // page_size
    return begin, last // page_size + 1


def _fold_page(carry, q, k, v, k_scale, v_scale, visible, score: str, combine: str, options):
    """Fold one page into the running (maximum, sum, weighted values) of an online softmax.

    score, combine: the einsums of queries with keys and of weights with values.  k_scale, v_scale:
    of each slot, in the shape of the scores; None if there are none.
    """
    peak, total, acc = carry
    scores = jnp.einsum(score, q, unpack(k, q.dtype), preferred_element_type=jnp.float32)
    scores = scores * options.scale if k_scale is None else scores * (options.scale * k_scale)
    scores = jnp.where(visible, capped(scores, options.soft_cap), -jnp.inf)
    new_peak = jnp.maximum(peak, jnp.max(scores, axis=-1))
    # Before the first visible slot the peak is -inf; 0 instead keeps exp() free of NaN.
    safe_peak = jnp.where(jnp.isneginf(new_peak), 0.0, new_peak)
    weights = jnp.exp(scores - safe_peak[..., None])
    shrink = jnp.exp(peak - safe_peak)
    total = total * shrink + jnp.sum(weights, -1)
    if v_scale is not None:
        weights = jnp.where(visible, weights * v_scale, 0)  # an unwritten scale may be NaN
    v = unpack(v, q.dtype)
    update = jnp.einsum(combine, weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return new_peak, total, acc * shrink[..., None] + update


def _start(shape: tuple[int, ...], sinks: Array | None) -> tuple[Array, Array, Array]:
    """Nothing seen yet but the sinks: scores without values, in a shape that fits the maxima."""
    peak = jnp.full(shape[:-1], -jnp.inf) if sinks is None else jnp.broadcast_to(sinks, shape[:-1])
    total = jnp.full(shape[:-1], 0.0 if sinks is None else 1.0, jnp.float32)
    return peak.astype(jnp.float32), total, jnp.zeros(shape, jnp.float32)


def _finish(carry, dtype: jnp.dtype) -> Array:
    _, total, acc = carry
    return (acc / jnp.where(total == 0, 1.0, total)[..., None]).astype(dtype)


def _attend_single(q_BKGH: Array, pool: Pool, rows: Rows, options: _Options) -> Array:
    """All rows of one token at once, a page of each per iteration; other rows get zeros."""
    sizes, window = dims(q_BKGH=q_BKGH, pool_PKSH=pool), options.window
    slots = sizes["S"]
    single_B = jnp.arange(sizes["B"]) < rows.num_single
    kv_lens_B = jnp.where(single_B, rows.kv_lens_B, 0)
    shortest = jnp.min(jnp.where(single_B, kv_lens_B, jnp.iinfo(jnp.int32).max))
    begin, end = _page_range(shortest - 1, jnp.max(kv_lens_B) - 1, slots, window)

    def attend_page(index, carry):
        page_B = rows.page_table_BM[:, index]
        position_S = index * slots + jnp.arange(slots)
        seen_BS = position_S[None] < kv_lens_B[:, None]
        if window is not None:
            seen_BS &= position_S[None] >= kv_lens_B[:, None] - window
        # A NaN that nobody may see would survive its zero weight: 0 · NaN = NaN.
        v_BKSH = jnp.where(seen_BS[:, None, :, None], pool.v_PKSH[page_B], 0)
        return _fold_page(
            carry, q_BKGH, pool.k_PKSH[page_B], v_BKSH,
            None if pool.k_scale_PKS is None else pool.k_scale_PKS[page_B][:, :, None],
            None if pool.v_scale_PKS is None else pool.v_scale_PKS[page_B][:, :, None],
            seen_BS[:, None, None], "BKGH,BKSH->BKGS", "BKGS,BKSH->BKGH", options,
        )  # fmt: skip

    sinks = None if options.sinks_KG is None else options.sinks_KG[None]
    carry = lax.fori_loop(begin, end, attend_page, _start(q_BKGH.shape, sinks))
    return _finish(carry, q_BKGH.dtype)


def _attend_tiles(
    out_TKGH: Array, q_TKGH: Array, pool: Pool, rows: Rows, tile: int, options: _Options
) -> Array:
    """The rows of several tokens, one after the other, in tiles of `tile` query positions."""
    sizes, window = dims(q_TKGH=q_TKGH, pool_PKSH=pool), options.window
    slots = sizes["S"]
    padded_q_TKGH = jnp.pad(q_TKGH, [(0, tile), (0, 0), (0, 0), (0, 0)])

    def attend_tile(row, index, out_TKGH):
        offset = rows.query_starts_B[row] + index * tile
        first = rows.kv_lens_B[row] - rows.query_lens_B[row] + index * tile
        q_QKGH = lax.dynamic_slice_in_dim(padded_q_TKGH, offset, tile)
        position_Q = first + jnp.arange(tile)
        last = jnp.minimum(first + tile, rows.kv_lens_B[row]) - 1
        begin, end = _page_range(first, last, slots, window)

        def attend_page(entry, carry):
            page = rows.page_table_BM[row, entry]
            position_S = entry * slots + jnp.arange(slots)
            seen_QS = position_S[None] <= position_Q[:, None]
            if window is not None:
                seen_QS &= position_S[None] > position_Q[:, None] - window
            written_S = position_S < rows.kv_lens_B[row]
            v_KSH = jnp.where(written_S[None, :, None], pool.v_PKSH[page], 0)
            return _fold_page(
                carry, q_QKGH, pool.k_PKSH[page], v_KSH,
                None if pool.k_scale_PKS is None else pool.k_scale_PKS[page][:, None, None],
                None if pool.v_scale_PKS is None else pool.v_scale_PKS[page][:, None, None],
                (seen_QS & written_S[None])[None, None], "QKGH,KSH->KGQS", "KGQS,KSH->KGQH",
                options,
            )  # fmt: skip

        shape = (sizes["K"], sizes["G"], tile, sizes["H"])
        sinks = None if options.sinks_KG is None else options.sinks_KG[:, :, None]
        carry = lax.fori_loop(begin, end, attend_page, _start(shape, sinks))
        out_QKGH = _finish(carry, q_TKGH.dtype).transpose(2, 0, 1, 3)
        return lax.dynamic_update_slice_in_dim(out_TKGH, out_QKGH, offset, axis=0)

    def attend_row(row, out_TKGH):
        tiles = -(-rows.query_lens_B[row] // tile)
        return lax.fori_loop(0, tiles, lambda i, out: attend_tile(row, i, out), out_TKGH)

    return lax.fori_loop(rows.num_single, rows.num_rows, attend_row, out_TKGH)
