"""Ragged batches over shuffled pages, and what attention over them must give, in NumPy alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.kernels.cases import Case
from jaxinfer.kernels.rows import Rows
from jaxinfer.kernels.write_pages import LARGEST, Pool


def build(lens, *, num_tokens, num_rows, K, G, H, S, dtype=jnp.float32, seed=0, M=24):
    """A ragged batch on shuffled pages, with NaN wherever nobody may look."""
    rng = np.random.default_rng(seed)
    pages = list(rng.permutation(np.arange(1, 1 + max(len(lens), 1) * M)))
    P = len(pages) + 1
    q = rng.normal(size=(num_tokens, K, G, H))
    k_pages = np.full((P, K, S, H), np.nan)
    v_pages = np.full((P, K, S, H), np.nan)
    k_new, v_new = np.zeros((num_tokens, K, H)), np.zeros((num_tokens, K, H))
    tables = np.zeros((num_rows, M), np.int32)
    positions, row_of = np.zeros(num_tokens, np.int32), np.full(num_tokens, num_rows - 1, np.int32)
    starts, query_lens, kv_lens = (np.zeros(num_rows, np.int32) for _ in range(3))
    contexts, offset = [], 0
    for row, (queries, length) in enumerate(lens):
        k, v = rng.normal(size=(2, length, K, H))
        contexts.append((k, v))
        need = -(-length // S)
        tables[row, :need] = [pages.pop() for _ in range(need)]
        for position in range(length - queries):
            page, slot = tables[row, position // S], position % S
            k_pages[page, :, slot], v_pages[page, :, slot] = k[position], v[position]
        span = slice(offset, offset + queries)
        k_new[span], v_new[span] = k[length - queries :], v[length - queries :]
        positions[span], row_of[span] = np.arange(length - queries, length), row
        starts[row], query_lens[row], kv_lens[row] = offset, queries, length
        offset += queries
    rows = Rows(
        positions_T=positions, rows_T=row_of, query_starts_B=starts, query_lens_B=query_lens,
        kv_lens_B=kv_lens, page_table_BM=tables, num_tokens=np.int32(offset),
        num_rows=np.int32(len(lens)), num_single=np.int32(sum(q == 1 for q, _ in lens)),
    )  # fmt: skip
    arrays = [jnp.asarray(a, dtype) for a in (q, k_pages, v_pages, k_new, v_new)]
    return arrays, jax.tree.map(jnp.asarray, rows), contexts


def expected(q, lens, contexts, scale, window, soft_cap=None, sinks=None):
    """A float64 softmax written out per token."""
    out, offset = np.zeros(q.shape), 0
    for (queries, length), (k, v) in zip(lens, contexts, strict=True):
        for index in range(queries):
            position = length - queries + index
            first = 0 if window is None else max(position - window + 1, 0)
            scores = scale * np.einsum("KGH,PKH->KGP", q[offset], k[first : position + 1])
            if soft_cap is not None:
                scores = soft_cap * np.tanh(scores / soft_cap)
            if sinks is not None:
                scores = np.concatenate([scores, sinks[..., None]], -1)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            weights = weights[..., : position + 1 - first]
            out[offset] = np.einsum("KGP,PKH->KGH", weights, v[first : position + 1])
            offset += 1
    return out


def split(rows: Rows) -> Rows:
    """The same tokens as rows of one token each."""
    T, num_tokens = len(rows.positions_T), int(rows.num_tokens)
    real_T = np.arange(T) < num_tokens
    return replace(
        rows,
        rows_T=np.arange(T, dtype=np.int32),
        query_starts_B=np.arange(T, dtype=np.int32),
        query_lens_B=real_T.astype(np.int32),
        kv_lens_B=np.where(real_T, np.asarray(rows.positions_T) + 1, 0).astype(np.int32),
        page_table_BM=np.asarray(rows.page_table_BM)[np.asarray(rows.rows_T)],
        num_rows=np.int32(num_tokens),
        num_single=np.int32(num_tokens),
    )


def stored(values: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray | None]:
    """What a slot stores of `values` `[…, H]`, and its scales; a NaN stays one where it can."""
    if dtype not in LARGEST:
        return values.astype(dtype), None
    values = values.astype(np.float32)
    scale = np.abs(values).max(-1) / np.float32(LARGEST[dtype])
    values = values / scale[..., None]
    if dtype not in ("int8", "uint8"):
        return values.astype(dtype), scale
    whole = np.nan_to_num(np.rint(values), nan=-1).astype(np.int8)
    if dtype == "uint8":
        low, high = np.split(whole.view(np.uint8), 2, axis=-1)
        whole = (low & 15) | (high << 4)
    return whole, scale


def restored(values: np.ndarray, dtype: str) -> np.ndarray:
    """`values` after having been stored, float64."""
    numbers, scale = stored(values, dtype)
    if dtype == "uint8":
        low, high = (numbers << 4).astype(np.int8) >> 4, numbers.view(np.int8) >> 4
        numbers = np.concatenate([low, high], -1)
    numbers = numbers.astype(np.float64)
    return numbers if scale is None else numbers * scale[..., None].astype(np.float64)


@dataclass
class Batch:
    """The arguments of both operations over pages for a case, and the attention's result."""

    q: np.ndarray
    k_new: np.ndarray
    v_new: np.ndarray
    before: Pool  # the pool without the step's own keys and values
    after: Pool
    rows: Rows
    sinks: np.ndarray | None
    want: np.ndarray  # [tokens, K, G, H], float64

    @classmethod
    def of(cls, case: Case, scale: float, padding: int = 3) -> Batch:
        """padding: tokens that belong to no row; rows, too, where each has one token, else one."""
        more = padding if all(queries == 1 for queries, _ in case.lens) else 1
        (q, *_), rows, contexts = build(
            case.lens, num_tokens=case.num_tokens + padding, num_rows=len(case.lens) + more,
            K=case.K, G=case.G, H=case.H, S=case.S, M=case.table_width + 1, dtype=case.dtype,
        )  # fmt: skip
        rows = jax.tree.map(np.asarray, rows)
        q, contexts = np.asarray(q), [[kv.astype(case.dtype) for kv in pair] for pair in contexts]
        new, before, after = _pages(case, rows, contexts, len(q))
        kept = [tuple(restored(np.asarray(kv), case.stored) for kv in pair) for pair in contexts]
        sinks = np.random.default_rng(1).normal(size=(case.K, case.G)) * 2 if case.sinks else None
        want = expected(
            q.astype(np.float64), case.lens, kept, scale, case.window, case.soft_cap, sinks
        )[: case.num_tokens]
        rows = split(rows) if case.row_per_token else rows
        return cls(q, *new, before, after, rows, sinks, want)

    def span(self, row: int) -> slice:
        """Where a row's tokens are."""
        start = int(self.rows.query_starts_B[row])
        return slice(start, start + int(self.rows.query_lens_B[row]))

    def alone(self, row: int) -> tuple[np.ndarray, Rows]:
        """Queries and rows of the same shapes: a row as the only one, its tokens the first."""
        span, rows = self.span(row), self.rows
        length = span.stop - span.start
        first_B = np.arange(len(rows.kv_lens_B)) == 0
        mine_T = np.arange(len(self.q)) < length
        only = Rows(
            positions_T=np.where(mine_T, np.roll(rows.positions_T, -span.start), 0),
            rows_T=np.where(mine_T, 0, len(first_B) - 1).astype(np.int32),
            query_starts_B=np.zeros_like(rows.query_starts_B),
            query_lens_B=np.where(first_B, rows.query_lens_B[row], 0),
            kv_lens_B=np.where(first_B, rows.kv_lens_B[row], 0),
            page_table_BM=np.roll(rows.page_table_BM, -row, axis=0),
            num_tokens=np.int32(length), num_rows=np.int32(1), num_single=np.int32(length == 1),
        )  # fmt: skip
        return np.roll(self.q, -span.start, axis=0), only


def _pages(case: Case, rows: Rows, contexts: list, num_tokens: int) -> Any:
    """New keys and values `[T, K, H]`, and the pools before and after they are stored."""
    P = int(max(rows.page_table_BM.max(), 0)) + 2
    new = np.zeros(
        (2, num_tokens, case.K, case.H), contexts[0][0].dtype if contexts else case.dtype
    )
    shape = (2, P, case.K, case.S, case.H)
    before, after = np.full(shape, np.nan), np.full(shape, np.nan)
    for row, ((queries, length), pair) in enumerate(zip(case.lens, contexts, strict=True)):
        position = np.arange(length)
        where = rows.page_table_BM[row, position // case.S], position % case.S
        old, first = length - queries, rows.query_starts_B[row]
        for kind, values in enumerate(pair):
            after[kind][where[0], :, where[1]] = values
            before[kind][where[0][:old], :, where[1][:old]] = values[:old]
            new[kind, first : first + queries] = values[old:]
    pools = []
    for pages in (before, after):
        (k, k_scale), (v, v_scale) = stored(pages[0], case.stored), stored(pages[1], case.stored)
        pools.append(Pool(k, v, k_scale, v_scale))
    return tuple(new), *pools
