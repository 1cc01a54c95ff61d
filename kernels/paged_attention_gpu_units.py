"""The two matrix products of attention on the matrix units of Hopper and Blackwell.

A unit serves one warpgroup, whose tile has `ROWS` rows; `LAYOUT` is how such a tile lies in its
registers.  `scores` multiplies queries with keys, `weigh` adds weighted values to an accumulator in
registers; both have their result when they return.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array


class Wgmma:
    """Hopper (sm_90a): the products of a warpgroup, accumulated in its registers."""

    ROWS: ClassVar[int] = 64
    LAYOUT: ClassVar[Any] = plgpu.Layout.WGMMA

    @staticmethod
    def scratch(warpgroups: int, block: int, width: int) -> dict[str, Any]:
        """Memory that the unit needs beside its operands."""
        return {}

    def __init__(self, scratch: dict[str, Any], group: Array):
        pass

    def scores(self, q_ref: Any, k_ref: Any) -> Array:
        """Queries `[rows, H]` times keys `[block, H]`, both in shared memory: `[rows, block]`."""

        def multiply(acc_ref):
            plgpu.wgmma(acc_ref, q_ref, k_ref.transpose((1, 0)))
            return acc_ref[...]

        return pl.run_scoped(multiply, plgpu.ACC((q_ref.shape[0], k_ref.shape[0]), jnp.float32))

    def weigh(self, acc: Array, weights: Array, v_ref: Any) -> Array:
        """`[rows, H]`: acc plus weights `[rows, block]` times values `[block, H]`."""

        def multiply(acc_ref):
            plgpu.wgmma(acc_ref, weights, v_ref)

        return pl.run_state(multiply)(plgpu.ACC.init(acc))


UNITS = {9: Wgmma}
