"""Which tokens of a ragged step belong to which sequence: what every kernel over pages is told."""

from __future__ import annotations

from flax import struct

from jaxinfer.shapes import Leaf


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
