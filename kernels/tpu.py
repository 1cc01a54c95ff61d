"""What the TPU kernels over pages share: how arrays lie in tiles, copies of varying length."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# A vector register is this many lanes of 32 bits wide, and as many rows high as SUBLANES.
LANES = 128
SUBLANES = 8
# The high half of each byte of a word, and what a number is multiplied by when it stands there.
HIGH_HALVES = -0x0F0F0F10
FOUR_BITS = 16.0


def round_up(count: int, step: int) -> int:
    return -(-count // step) * step


def packing(dtype: Any) -> int:
    """How many rows of a dtype share a row of 32-bit lanes."""
    return 4 // jnp.dtype(dtype).itemsize


def padded_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Bytes that an array takes in a TPU's memory.

    The last axis is padded to whole rows of lanes.  The one before is padded to a tile of rows; a
    tile is 8, 16 or 32 rows high, or less (a power of two) where the axis is shorter.
    """
    *outer, rows, width = (1, *shape)
    tile = SUBLANES * packing(dtype)
    tile = min(tile, max(1 << (rows - 1).bit_length(), packing(dtype)))
    padded = round_up(rows, tile) * round_up(width, LANES)
    return math.prod(outer) * padded * jnp.dtype(dtype).itemsize


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
