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

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from jaxinfer.shapes import Leaf, dims

# Query positions that one step of the reference's prefill loop works on.
QUERY_TILE = 64


@struct.dataclass
class Rows:
    """Which tokens of the step belong to which sequence; all int32.

    positions_T: each token's position in its sequence.  rows_T: the row it belongs to.
    num_tokens, num_rows: how many are real; the rest is padding.
    num_single: how many leading rows have exactly one token.
    page_table_BM: unused entries are 0, the dump page.
    """

    positions_T: Leaf
    rows_T: Leaf
    query_starts_B: Leaf
    query_lens_B: Leaf
    kv_lens_B: Leaf
    page_table_BM: Leaf
    num_tokens: Leaf
    num_rows: Leaf
    num_single: Leaf


def write_pages(
    k_pages_PKSH: Array, v_pages_PKSH: Array, k_TKH: Array, v_TKH: Array, rows: Rows
) -> tuple[Array, Array]:
    """Store each token's key and value at its position; padding goes to page 0.

    The pages are updated in place when their buffers are donated.
    """
    sizes = dims(k_pages_PKSH=k_pages_PKSH, v_pages_PKSH=v_pages_PKSH, k_TKH=k_TKH, v_TKH=v_TKH)
    real_T = jnp.arange(sizes["T"]) < rows.num_tokens
    page_T = rows.page_table_BM[rows.rows_T, rows.positions_T // sizes["S"]]
    page_T = jnp.where(real_T, page_T, 0)
    slot_T = rows.positions_T % sizes["S"]
    k_TKH, v_TKH = k_TKH.astype(k_pages_PKSH.dtype), v_TKH.astype(v_pages_PKSH.dtype)
    return (
        k_pages_PKSH.at[page_T, :, slot_T].set(k_TKH),
        v_pages_PKSH.at[page_T, :, slot_T].set(v_TKH),
    )


# Traced once for all layers of a kind: this halves the time that a model takes to lower.
@partial(jax.jit, static_argnames=("scale", "window", "soft_cap"))
def paged_attention(
    q_TKGH: Array,
    k_pages_PKSH: Array,
    v_pages_PKSH: Array,
    rows: Rows,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Array:
    """Causal softmax attention of every token over its own sequence: returns `[T, K, G, H]`.

    scale: multiplies the scores.  window: a token sees this many latest positions, itself included.
    soft_cap: the scaled scores are bent into (-soft_cap, soft_cap): see `capped`.
    Slots beyond a row's length and padding tokens may hold anything, NaN included; the result of a
    padding token is unspecified but finite.

    This is the reference, and the CPU's real path: an online softmax (arXiv:1805.02867) over pages,
    with trip counts that depend on the data, so nothing is spent on the width of the table.
    """
    sizes = dims(
        q_TKGH=q_TKGH, k_pages_PKSH=k_pages_PKSH, v_pages_PKSH=v_pages_PKSH,
        page_table_BM=rows.page_table_BM,
    )  # fmt: skip
    single_BKGH = _attend_single(
        q_TKGH[: sizes["B"]], k_pages_PKSH, v_pages_PKSH, rows, scale, window, soft_cap
    )
    if sizes["B"] == sizes["T"]:
        return single_BKGH
    tile = min(QUERY_TILE, sizes["T"])
    # A tile may overhang its row; what follows is written later, by the next rows' own tiles.
    out_TKGH = jnp.pad(single_BKGH, [(0, sizes["T"] - sizes["B"] + tile), (0, 0), (0, 0), (0, 0)])
    out_TKGH = _attend_tiles(
        out_TKGH, q_TKGH, k_pages_PKSH, v_pages_PKSH, rows, tile, scale, window, soft_cap
    )
    return out_TKGH[: sizes["T"]]


def capped(scores: Array, soft_cap: float | None) -> Array:
    """Scores bent smoothly into (-soft_cap, soft_cap) (arXiv:2408.00118); unchanged if None."""
    return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)


def _page_range(first: Array, last: Array, page_size: int, window: int | None):
    """Table entries that queries at positions first … last look at: [begin, end)."""
    begin = 0 if window is None else jnp.maximum(first - window + 1, 0) // page_size
    return begin, last // page_size + 1


def _online_softmax(carry, scores, visible, values, combine: str):
    """Fold one page into the running (maximum, sum, weighted values); `combine` is the einsum."""
    peak, total, acc = carry
    scores = jnp.where(visible, scores, -jnp.inf)
    new_peak = jnp.maximum(peak, jnp.max(scores, axis=-1))
    # Before the first visible slot the peak is -inf; 0 instead keeps exp() free of NaN.
    safe_peak = jnp.where(jnp.isneginf(new_peak), 0.0, new_peak)
    weights = jnp.exp(scores - safe_peak[..., None])
    shrink = jnp.exp(peak - safe_peak)
    update = jnp.einsum(
        combine, weights.astype(values.dtype), values, preferred_element_type=jnp.float32
    )
    return new_peak, total * shrink + jnp.sum(weights, -1), acc * shrink[..., None] + update


def _start(shape: tuple[int, ...]) -> tuple[Array, Array, Array]:
    return (
        jnp.full(shape[:-1], -jnp.inf, jnp.float32),
        jnp.zeros(shape[:-1], jnp.float32),
        jnp.zeros(shape, jnp.float32),
    )


def _finish(carry, dtype: jnp.dtype) -> Array:
    _, total, acc = carry
    return (acc / jnp.where(total == 0, 1.0, total)[..., None]).astype(dtype)


def _attend_single(q_BKGH, k_pages_PKSH, v_pages_PKSH, rows, scale, window, soft_cap) -> Array:
    """All rows of one token at once, a page of each per iteration; other rows get zeros."""
    sizes = dims(q_BKGH=q_BKGH, k_pages_PKSH=k_pages_PKSH)
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
        k_BKSH = k_pages_PKSH[page_B]
        # A NaN that nobody may see would survive its zero weight: 0 · NaN = NaN.
        v_BKSH = jnp.where(seen_BS[:, None, :, None], v_pages_PKSH[page_B], 0)
        scores_BKGS = scale * jnp.einsum(
            "BKGH,BKSH->BKGS", q_BKGH, k_BKSH, preferred_element_type=jnp.float32
        )
        scores_BKGS = capped(scores_BKGS, soft_cap)
        return _online_softmax(
            carry, scores_BKGS, seen_BS[:, None, None], v_BKSH, "BKGS,BKSH->BKGH"
        )

    carry = lax.fori_loop(begin, end, attend_page, _start(q_BKGH.shape))
    return _finish(carry, q_BKGH.dtype)


def _attend_tiles(
    out_TKGH, q_TKGH, k_pages_PKSH, v_pages_PKSH, rows, tile, scale, window, soft_cap
) -> Array:
    """The rows of several tokens, one after the other, in tiles of `tile` query positions."""
    sizes = dims(q_TKGH=q_TKGH, k_pages_PKSH=k_pages_PKSH)
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
            k_KSH = k_pages_PKSH[page]
            v_KSH = jnp.where(written_S[None, :, None], v_pages_PKSH[page], 0)
            scores_KGQS = scale * jnp.einsum(
                "QKGH,KSH->KGQS", q_QKGH, k_KSH, preferred_element_type=jnp.float32
            )
            scores_KGQS = capped(scores_KGQS, soft_cap)
            seen_QS &= written_S[None]
            return _online_softmax(carry, scores_KGQS, seen_QS[None, None], v_KSH, "KGQS,KSH->KGQH")

        shape = (sizes["K"], sizes["G"], tile, sizes["H"])
        out_KGQH = _finish(lax.fori_loop(begin, end, attend_page, _start(shape)), q_TKGH.dtype)
        out_QKGH = out_KGQH.transpose(2, 0, 1, 3)
        return lax.dynamic_update_slice_in_dim(out_TKGH, out_QKGH, offset, axis=0)

    def attend_row(row, out_TKGH):
        tiles = -(-rows.query_lens_B[row] // tile)
        return lax.fori_loop(0, tiles, lambda i, out: attend_tile(row, i, out), out_TKGH)

    return lax.fori_loop(rows.num_single, rows.num_rows, attend_row, out_TKGH)
