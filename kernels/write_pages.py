"""One layer's pool of pages, and how a step's keys and values get into it: contract and reference.

A pool holds keys and values as `[P, K, S, H]`: P pages of S token slots for each KV head.  It may
be quantised; then each slot of each head has a scale of its own, and what is stored times the scale
is the value.  (One scale for a whole tensor, not calibrated, is how FP8 caches broke models.)

| `kv_cache_dtype`    | stored as       | largest | how                                        |
|---------------------|-----------------|---------|--------------------------------------------|
| float32, bfloat16 … | itself          |         | no scales                                  |
| fp8_e4m3            | float8_e4m3fn   | 448     | rounded by the cast                        |
| fp8_e5m2            | float8_e5m2     | 57344   | the same                                   |
| int8                | int8            | 127     | to the nearest, halves to even             |
| int4                | uint8 `[…, H/2]`| 7       | the same; byte i has element i in its low  |
|                     |                 |         | half, element i + H/2 in its high one      |

A scale is the largest magnitude in the slot over the largest number of the format.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import struct
from jax import Array

from jaxinfer.kernels.rows import Rows
from jaxinfer.shapes import Leaf, dims

# Largest magnitude of each number format that needs scales.
LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0, "int8": 127.0, "uint8": 7.0}
# A slot without a larger magnitude than this is as good as zero; its scale must not be.
SMALLEST = 1e-30


@struct.dataclass
class Pool:
    """Keys and values of one layer; `k_scale_PKS` and `v_scale_PKS`: float32, None if it is not
    quantised.  A uint8 pool has two values of four bits a byte, so its last axis is half of H."""

    k_PKSH: Leaf
    v_PKSH: Leaf
    k_scale_PKS: Leaf | None = None
    v_scale_PKS: Leaf | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """P, K, S and H, the last as attention sees it."""
        *outer, width = self.k_PKSH.shape
        return (*outer, 2 * width if self.k_PKSH.dtype == jnp.uint8 else width)


def quantize(values: Array, dtype: Any) -> tuple[Array, Array]:
    """What a slot stores of `values` `[…, H]`, and its scales `[…]`, float32."""
    dtype = jnp.dtype(dtype)
    largest = LARGEST[dtype.name]
    values = values.astype(jnp.float32)
    peak = jnp.max(jnp.abs(values), axis=-1)
    scale = jnp.maximum(peak, SMALLEST) / largest
    values = values / scale[..., None]
    if dtype.kind in "iu":
        values = jnp.round(values)
    if dtype == jnp.uint8:
        low, high = jnp.split(values.astype(jnp.int8), 2, axis=-1)
        return ((low & 15) | (high << 4)).astype(jnp.uint8), scale
    return values.astype(dtype), scale


def unpack(stored: Array, dtype: Any) -> Array:
    """Stored numbers `[…, H]` in `dtype`, before their scales; exact in bfloat16 and wider."""
    if stored.dtype == jnp.uint8:
        signed = stored.astype(jnp.int8)
        stored = jnp.concatenate([(signed << 4) >> 4, signed >> 4], axis=-1)
    return stored.astype(dtype)


def write_pages(pool: Pool, k_TKH: Array, v_TKH: Array, rows: Rows) -> Pool:
    """Store each token's key and value at its position; padding goes nowhere.

    No two tokens of the step may go to the same slot of the same page, but of page 0, which holds
    nothing that is read.  The pool is updated in place when its buffers are donated.
    """
    sizes = dims(pool_PKSH=pool, k_TKH=k_TKH, v_TKH=v_TKH)
    token_T = jnp.arange(sizes["T"])
    page_T = rows.page_table_BM[rows.rows_T, rows.positions_T // sizes["S"]]
    # Beyond the pool nothing is written; each padding token has a page of its own there, for XLA is
    # told that no two writes meet: else, on GPUs, a loop of atomic exchanges stores each number.
    page_T = jnp.where(token_T < rows.num_tokens, page_T, sizes["P"] + token_T)
    slot_T = rows.positions_T % sizes["S"]

    def write(pages: Array, values: Array) -> Array:
        return pages.at[page_T, :, slot_T].set(values, mode="drop", unique_indices=True)

    dtype = pool.k_PKSH.dtype
    if pool.k_scale_PKS is None or pool.v_scale_PKS is None:
        return Pool(
            write(pool.k_PKSH, k_TKH.astype(dtype)), write(pool.v_PKSH, v_TKH.astype(dtype))
        )
    (k_TKH, k_scale_TK), (v_TKH, v_scale_TK) = quantize(k_TKH, dtype), quantize(v_TKH, dtype)
    return Pool(
        write(pool.k_PKSH, k_TKH),
        write(pool.v_PKSH, v_TKH),
        write(pool.k_scale_PKS, k_scale_TK),
        write(pool.v_scale_PKS, v_scale_TK),
    )
