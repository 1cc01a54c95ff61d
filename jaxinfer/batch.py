"""A step's inputs as arrays: packs a plan into padded shapes.  The buckets are those shapes.

Every array is freshly made for its step and never written again: on CPU the device may read a
NumPy argument after the call that passed it has returned.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
from flax import struct

from jaxinfer.errors import BucketError
from jaxinfer.kernels.rows import Rows
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
class Inputs:
    """What the backbone reads: rows and positions; the tokens themselves are in the history.

    slots_B: each row's row in the history.  selected_B: tokens whose hidden state is returned.
    """

    slots_B: Leaf
    selected_B: Leaf
    rows: Rows


@struct.dataclass
class Selection:
    """What head and sampler read, one entry per selected token; see `sampling.sample`."""

    slots_B: Leaf
    positions_B: Leaf
    targets_B: Leaf
    features: Leaf
    table: SamplingTable


@dataclass(frozen=True)
class Batch:
    """A packed plan.  `selection` is None if the step samples nothing (a chunk inside a prompt)."""

    inputs: Inputs
    selection: Selection | None

    @property
    def num_tokens(self) -> int:
        """Tokens of the step, padding included."""
        return len(self.inputs.rows.positions_T)


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


def _padded(values: np.ndarray, size: int, fill: int = 0) -> np.ndarray:
    count = len(values)
    if count == size:
        return values.astype(np.int32)
    out = np.empty((size, *values.shape[1:]), np.int32)
    out[:count] = values
    out[count:] = fill
    return out


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
    inputs = Inputs(
        slots_B=_padded(plan.slots_B[which], num_rows, dump),
        selected_B=_padded(plan.selected_B, min(num_tokens, limits.max_batch_size)),
        rows=Rows(
            positions_T=_padded(positions_T, num_tokens),
            rows_T=_padded(rows_T, num_tokens, num_rows - 1),
            query_starts_B=_padded(offsets_B, num_rows),
            query_lens_B=_padded(lens_B, num_rows),
            kv_lens_B=_padded(kv_lens_B, num_rows),
            page_table_BM=_padded(plan.tables_BM[which], num_rows),
            num_tokens=np.int32(plan.num_tokens),
            num_rows=np.int32(len(kv_lens_B)),
            num_single=np.int32(num_single),
        ),
    )
    if len(plan.selected_B) == 0:
        return Batch(inputs, None)
    num_selected = _fit(buckets.rows, len(plan.selected_B), "rows")
    selection = Selection(
        slots_B=_padded(plan.selected_slots_B, num_selected, dump),
        positions_B=_padded(plan.selected_positions_B, num_selected),
        targets_B=_padded(plan.targets_B, num_selected, 0),
        features=np.bitwise_or.reduce(sampling.features_B.take(plan.selected_slots_B)),
        table=sampling.table(),
    )
    return Batch(inputs, selection)


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
