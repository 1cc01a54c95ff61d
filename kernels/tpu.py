"""What the TPU kernels over pages share: how arrays lie in tiles, copies of varying length."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxinfer.kernels.write_pages import LARGEST, Pool

# A vector register is this many lanes of 32 bits wide, and as many rows high as SUBLANES.
LANES = 128
SUBLANES = 8
# The high half of each byte of a word, and what a number is multiplied by when it stands there.
HIGH_HALVES = -0x0F0F0F10
FOUR_BITS = 16.0


# Chips that the kernels were compiled for, by the names of their sheets in configs/hardware.
CHIPS = ("tpu-v5e", "tpu-v5p", "tpu-v6e", "tpu7x")


def unsupported(chip: str, q_dtype: Any, pool: Pool) -> str | None:
    """Why the kernels cannot serve a pool on a chip; None if they can.

    Formats that a chip has no arithmetic for (all of eight bits and less on v5e, say) are converted
    in registers, so none is missing anywhere.
    """
    if chip not in CHIPS:
        return f"the TPU kernels were not compiled for {chip}, but for {', '.join(CHIPS)}"
    if jnp.dtype(q_dtype) not in (jnp.bfloat16, jnp.float32):
        return f"queries must be bfloat16 or float32, not {jnp.dtype(q_dtype).name}"
    known = ("bfloat16", "float32", *LARGEST)
    if pool.k_PKSH.dtype.name not in known:
        return f"pages must be of {', '.join(known)}, not {pool.k_PKSH.dtype.name}"
    if pool.shape[2] % (2 * SUBLANES) != 0:
        return f"page_size must be a multiple of {2 * SUBLANES}, not {pool.shape[2]}"
    return None


def round_up(count: int, step: int) -> int:
    return -(-count // step) * step


def packing(dtype: Any) -> int:
    """How many rows of a dtype share a row of 32-bit lanes."""
    return 4 // jnp.dtype(dtype).itemsize


def padded_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Bytes that an array takes in a TPU's memory when it lies there in the order of its axes.

    The last axis is padded to whole rows of lanes.  The one before is padded to a tile of rows; a
    tile is 8, 16 or 32 rows high, or less (a power of two) where the axis is shorter.
    """
    *outer, rows, width = (1, *shape)
    tile = SUBLANES * packing(dtype)
    tile = min(tile, max(1 << (rows - 1).bit_length(), packing(dtype)))
    padded = round_up(rows, tile) * round_up(width, LANES)
    return math.prod(outer) * padded * jnp.dtype(dtype).itemsize


def divide(number: Array, divisor: int) -> tuple[Array, Array]:
    """Quotient and remainder of what is not negative."""
    return lax.div(number, divisor), lax.rem(number, divisor)


def across(column: Array, width: int) -> Array:
    """A column that is repeated in LANES lanes, in `width` of them."""
    return jnp.concatenate([column] * pl.cdiv(width, LANES), axis=1)[:, :width]


def in_chunks(count: Array, most: int, copy: Callable[[Array, int], None]) -> None:
    """Call `copy(offset, size)` for chunks that make up `count` (0 … most) things.

    A copy has a fixed size, so there is one for each bit of `count`; `most` is a power of two.
    """
    for bit in reversed(range(most.bit_length())):
        size = 1 << bit

        @pl.when((count & size) != 0)
        def _(size=size):
            copy(count & -(2 * size), size)


def planes(stored: Array, dtype: Any) -> list[Array]:
    """Stored numbers `[…, S, H]` in `dtype`, before their scales; of four bits, times FOUR_BITS.

    Those come as two arrays of half the width, low halves of the bytes first: to put them side by
    side would take a rotation of every register.
    """
    if stored.dtype != jnp.uint8:
        return [stored.astype(dtype)]
    # Four rows at once; a byte with its number in the high half is FOUR_BITS times that number.
    words = pltpu.bitcast(stored, jnp.int32)
    halves = (words << 4) & HIGH_HALVES, words & HIGH_HALVES
    return [pltpu.bitcast(half, jnp.int8).astype(dtype) for half in halves]
