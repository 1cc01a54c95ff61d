"""How Hopper and Blackwell multiply a tile of tokens with blocks of a weight, and sum.

A unit serves a thread block of one warpgroup.  `sums` gives the product of a whole tile, piece by
piece: the first column of each piece and its sums in registers, float32 or (of int8) int32.  It is
given a `pipeline`, which calls `multiply(step, x_ref, weight_ref, *carry)` for one block of D after
the other, both operands being in shared memory; a block must stay there for `lag` more steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ACC = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage] (exported from JAX 0.11 on)


class Wgmma:
    """Hopper (sm_90a): sums are in registers.

    Of 8-bit numbers it takes weights only with D innermost.  It sums products of fp8 to some 14
    bits, so these sums are added up in float32 after each block (arXiv:2412.19437, 3.3.2).
    """

    TOKENS: ClassVar[tuple[int, ...]] = (64, 128)

    @staticmethod
    def holds(tokens: int, width: int, per_sm: int, operand: Any) -> bool:
        """Whether sums fit: into half of what registers a thread block has."""
        sums = tokens * width * (2 if operand == jnp.float8_e4m3fn else 1)
        return sums <= 2**14 and per_sm * sums <= 2**15

    @staticmethod
    def scratch(shape: tuple[int, int], dtype: Any) -> dict[str, Any]:
        """Memory that the unit needs beside its operands."""
        return {}

    @staticmethod
    def sums(
        pipeline: Callable[..., Any],
        shape: tuple[int, int],
        dtype: Any,
        *,
        operand: Any,
        lag: int,
        steps: int,
        refs: dict[str, Any],
    ) -> Iterator[tuple[int, Array]]:
        def sum_blocks(step, x_ref, weight_ref, total):
            def multiply(sums_ref):
                plgpu.wgmma(sums_ref, x_ref, weight_ref)
                return sums_ref[...]

            return total + pl.run_scoped(multiply, ACC(shape, dtype))

        def sum_all(sums_ref):
            def multiply(step, x_ref, weight_ref):
                plgpu.wgmma(sums_ref, x_ref, weight_ref)
                plgpu.wgmma_wait(lag)

            pipeline(multiply)
            return sums_ref[...]

        if operand == jnp.float8_e4m3fn:
            yield 0, pipeline(sum_blocks, jnp.zeros(shape, dtype))
        else:
            yield 0, pl.run_scoped(sum_all, ACC(shape, dtype))


class Tcgen05:
    """Blackwell (sm_100a): sums are in tensor memory, 128 rows of them; weights lie either way."""

    TOKENS: ClassVar[tuple[int, ...]] = (128,)
    # Columns that come into registers at once.
    PIECE: ClassVar[int] = 64

    @staticmethod
    def holds(tokens: int, width: int, per_sm: int, operand: Any) -> bool:
        """Whether sums fit: an SM has 512 columns, and gives them out in powers of two."""
        return per_sm << (width - 1).bit_length() <= 512

    @staticmethod
    def scratch(shape: tuple[int, int], dtype: Any) -> dict[str, Any]:
        return dict(
            sums_tmem=plgpu.TMEM(shape, dtype),
            done=plgpu.Barrier(num_barriers=2, orders_tensor_core=True),
        )

    @staticmethod
    def sums(
        pipeline: Callable[..., Any],
        shape: tuple[int, int],
        dtype: Any,
        *,
        operand: Any,
        lag: int,
        steps: int,
        refs: dict[str, Any],
    ) -> Iterator[tuple[int, Array]]:
        sums_ref, done = refs["sums_tmem"], refs["done"]

        def multiply(step, x_ref, weight_ref):
            this = lax.rem(step, 2)
            plgpu.tcgen05_mma(sums_ref, x_ref, weight_ref, done.at[this], accumulate=step > 0)
            if lag:
                pl.when(step > 0)(lambda: plgpu.barrier_wait(done.at[1 - this]))
            else:
                plgpu.barrier_wait(done.at[this])

        pipeline(multiply)
        if lag:
            plgpu.barrier_wait(done.at[(steps - 1) % 2])
        for column in range(0, shape[1], Tcgen05.PIECE):
            piece_ref = sums_ref.at[:, pl.ds(column, Tcgen05.PIECE)]
            yield column, plgpu.async_load_tmem(piece_ref, layout=plgpu.Layout.TCGEN05)
        plgpu.wait_load_tmem()  # before the next tile's products


# By the major number of the compute capability.
UNITS = {9: Wgmma, 10: Tcgen05}
