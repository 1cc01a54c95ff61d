"""A step's inputs: packs a plan into padded shapes, in one array.  The buckets are those shapes.

The array is freshly made for its step and never written again: on CPU the device may read a NumPy
argument after the call that passed it has returned.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import numpy as np
from flax import struct

from jaxinfer.errors import BucketError
from jaxinfer.kernels.rows import Rows
from jaxinfer.layout import Layout
from jaxinfer.sampling import SamplingRows, SamplingTable
from jaxinfer.scheduler import Limits, Plan
from jaxinfer.shapes import Leaf

# Up to how many tokens of a step, and rows of its head, there are powers of two only: while reading
# the weights takes longer than computing with them (FLOP/s over twice the weights that arrive in a
# second), padding should cost little.  On a GPU it does cost: from 64 tokens to 256 a step of
# Llama-3.1-8B on an H100 grows by a third, attention aside.  On the CPU sizes are also the widths
# of the tiles in which products are computed: 24 tokens take longer than 32.
FINEST = {"cpu": (16, 32), "gpu": (64, 256)}
# On a GPU one token takes longer than two: a norm of it is two kernels, and of two tokens one.
# (Where one row is all there may be, two tokens are taken for a prompt's, so that 1 it is.)
SMALLEST = {"gpu": 2}


@struct.dataclass
class Selection:
    """For whom head and sampler choose tokens: an entry for each row that a step may have, those
    beyond the selected ones for the dump slot; see `sampling.sample`."""

    slots_B: Leaf
    positions_B: Leaf
    targets_B: Leaf
    features: Leaf


@struct.dataclass
class Inputs:
    """All that a step reads of its plan; the tokens themselves are in the history.

    slots_B: each row's row in the history.  selected_B: tokens whose hidden state the head reads.
    """

    slots_B: Leaf
    selected_B: Leaf
    rows: Rows
    selection: Selection


@dataclass(frozen=True)
class Batch:
    """A packed plan.

    joined: `Inputs` as one array, laid out by `inputs_layout`.  num_tokens: of the backbone,
    padding included.  num_selected: rows of the head, likewise.  table: the sampling parameters, on
    the device.  Both None if the step samples nothing (a chunk inside a prompt).
    """

    joined: np.ndarray
    num_tokens: int
    num_selected: int | None
    table: SamplingTable | None


@dataclass(frozen=True)
class Buckets:
    """The compiled shapes: numbers of tokens for the backbone, of rows for head and sampler.

    max_rows: rows of a backbone with more tokens than that; one with fewer has a row per token.
    """

    tokens: tuple[int, ...]
    rows: tuple[int, ...]
    max_rows: int

    @classmethod
    def for_limits(cls, limits: Limits, platform: str, deterministic: bool = False) -> Buckets:
        """All sizes up to the limits; if deterministic one alone, and a row per token, so that
        every token goes through the same operations whatever else is in the step."""
        rows = limits.max_batch_size
        tokens = min(limits.max_num_tokens, rows * limits.max_seq_len)  # no step can have more
        if deterministic:
            return cls((tokens,), (rows,), max_rows=tokens)
        finest_tokens, finest_rows = FINEST.get(platform, (256, 256))
        smallest = min(SMALLEST.get(platform, 1), rows)
        return cls(
            bucket_sizes(tokens, finest_tokens, smallest),
            bucket_sizes(rows, finest_rows, smallest),
            rows,
        )

    def num_tokens(self, count: int) -> int:
        """Tokens of the smallest backbone that holds `count`."""
        return _fit(self.tokens, count, "tokens")

    def num_rows(self, num_tokens: int) -> int:
        """Rows of the backbone that is compiled for this many tokens."""
        return min(num_tokens, self.max_rows)


def bucket_sizes(limit: int, finest: int, smallest: int = 1) -> tuple[int, ...]:
    """Sizes from `smallest` to `limit`: powers of two to `finest`, then four steps an octave, but
    none smaller than `finest`: every size is a program to compile.

    Powers of two alone waste a quarter of the rows; four steps an octave waste under 8 %.
    """
    sizes, size = [], smallest
    while size < limit:
        sizes.append(size)
        size += size if size < finest else max(2 ** (size.bit_length() - 1) // 4, finest)
    return (*sizes, limit)


def _fit(sizes: tuple[int, ...], count: int, what: str) -> int:
    """The smallest compiled size that holds `count`."""
    index = bisect_left(sizes, count)
    if index == len(sizes):
        raise BucketError(f"no program was compiled for {count} {what}; the nearest is {sizes[-1]}")
    return sizes[index]


def _ints(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, np.int32)


def selection_shapes(max_batch_size: int) -> Selection:
    rows = _ints(max_batch_size)
    return Selection(slots_B=rows, positions_B=rows, targets_B=rows, features=_ints())


@cache
def inputs_layout(num_tokens: int, buckets: Buckets, limits: Limits) -> Layout:
    """How the inputs of the backbone for this many tokens lie in one array."""
    rows, most = buckets.num_rows(num_tokens), limits.max_batch_size
    return Layout(
        Inputs(
            slots_B=_ints(rows),
            selected_B=_ints(min(num_tokens, most)),
            rows=Rows(
                positions_T=_ints(num_tokens),
                rows_T=_ints(num_tokens),
                query_starts_B=_ints(rows),
                query_lens_B=_ints(rows),
                kv_lens_B=_ints(rows),
                page_table_BM=_ints(rows, limits.pages_per_row),
                num_tokens=_ints(),
                num_rows=_ints(),
                num_single=_ints(),
            ),
            selection=selection_shapes(most),
        )
    )


def _fill(out: np.ndarray, values: np.ndarray, padding: int = 0) -> None:
    out[: len(values)] = values
    out[len(values) :] = padding


def pack(plan: Plan, buckets: Buckets, limits: Limits, sampling: SamplingRows) -> Batch:
    """Pad a plan to the smallest buckets that hold it.

    Padding rows use the dump slot, one past the last; padding tokens belong to the last row and are
    told apart by `num_tokens`.
    """
    num_tokens = buckets.num_tokens(plan.num_tokens)
    num_rows = buckets.num_rows(num_tokens)
    dump = limits.max_batch_size
    offsets_B = plan.lens_B.cumsum() - plan.lens_B
    rows_T, positions_T = plan.rows_T, plan.positions_T
    if num_rows == num_tokens and plan.num_single < len(plan.slots_B):  # a row per token
        which, offsets_B, lens_B = rows_T, np.arange(plan.num_tokens), np.ones_like(rows_T)
        rows_T, kv_lens_B, num_single = offsets_B, positions_T + 1, plan.num_tokens
    else:
        which, lens_B, num_single = slice(None), plan.lens_B, plan.num_single
        kv_lens_B = plan.starts_B + plan.lens_B
    layout = inputs_layout(num_tokens, buckets, limits)
    joined = np.empty(layout.size, np.int32)
    inputs, count = layout.split(joined), len(plan.selected_B)
    _fill(inputs.slots_B, plan.slots_B[which], dump)
    _fill(inputs.selected_B, plan.selected_B)
    rows = inputs.rows
    _fill(rows.positions_T, positions_T)
    _fill(rows.rows_T, rows_T, num_rows - 1)
    _fill(rows.query_starts_B, offsets_B)
    _fill(rows.query_lens_B, lens_B)
    _fill(rows.kv_lens_B, kv_lens_B)
    _fill(rows.page_table_BM, plan.tables_BM[which])
    rows.num_tokens[...] = plan.num_tokens
    rows.num_rows[...] = len(kv_lens_B)
    rows.num_single[...] = num_single
    selection = inputs.selection
    _fill(selection.slots_B, plan.selected_slots_B, dump)
    _fill(selection.positions_B, plan.selected_positions_B)
    _fill(selection.targets_B, plan.targets_B)
    features = sampling.features_B.take(plan.selected_slots_B)
    selection.features[...] = np.bitwise_or.reduce(features)
    if count == 0:
        return Batch(joined, num_tokens, num_selected=None, table=None)
    return Batch(joined, num_tokens, _fit(buckets.rows, count, "rows"), sampling.table())


def idle(num_tokens: int, buckets: Buckets, limits: Limits, sampling: SamplingRows) -> Batch:
    """A batch of compiled shapes that is nobody's: it reads and writes the dump slot and page only.

    It has as many rows to sample for as a step may have, and a row of one token beside longer ones.
    """
    longest, most = limits.max_seq_len, min(limits.max_batch_size, num_tokens)
    single = int(most > -(-num_tokens // longest))
    whole, rest = divmod(num_tokens - single, longest)
    lens = sorted([1] * single + [longest] * whole + [rest] * (rest > 0))
    lens_B, dump = np.array(lens), limits.max_batch_size
    plan = Plan(
        number=0,
        slots_B=np.full(len(lens), dump),
        starts_B=np.zeros_like(lens_B),
        lens_B=lens_B,
        num_single=lens.count(1),
        tables_BM=np.zeros((len(lens), limits.pages_per_row), np.int32),
        rows_T=np.repeat(np.arange(len(lens)), lens_B),
        positions_T=np.concatenate([np.arange(length) for length in lens]),
        num_tokens=num_tokens,
        selected_B=np.zeros(most, np.int32),
        selected_slots_B=np.full(most, dump),
        selected_positions_B=np.zeros(most, np.int32),
        targets_B=np.full(most, -1),
        admitted=[],
    )
    return pack(plan, buckets, limits, sampling)
