"""The two matrix products of attention on the matrix units of Hopper and Blackwell.

A unit serves one warpgroup, whose tile has `ROWS` rows; `LAYOUT` is how a tile lies in its
registers.  `scores` multiplies queries with keys, `weigh` adds weighted values to an accumulator in
registers; both have their result when they return.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array


def tiled(shape: tuple[int, ...], dtype: Any, width: int | None = None) -> Any:
    """Shared memory for a matrix operand, swizzled over as much of `width` columns as possible."""
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle((width or shape[-1]) * bits)
    if swizzle == 16:
        return plgpu.SMEM(shape, dtype)  # rows of 16 bytes: nothing to swizzle
    tiling = plgpu.TilingTransform((8, swizzle * 8 // bits))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


class Wgmma:
    """Hopper (sm_90a): the products of a warpgroup, accumulated in its registers."""

    ROWS: ClassVar[int] = 64
    LAYOUT: ClassVar[Any] = plgpu.Layout.WGMMA
    WIDEST: ClassVar[int] = 256

    @staticmethod
    def scratch(groups: int, block: int, width: int, dtype: str) -> dict[str, Any]:
        """Memory that the unit needs beside its operands."""
        return {}

    def __init__(self, scratch: dict[str, Any], group: Array):
        pass

    def scores(self, q_ref: Any, k_ref: Any) -> Array:
        """Queries `[rows, H]` times keys `[block, H]`, both in shared memory: `[rows, block]`."""

        def multiply(acc_ref):
            plgpu.wgmma(acc_ref, q_ref, k_ref.transpose((1, 0)))
            return acc_ref[...]

        return pl.run_scoped(
            multiply, plgpu.WGMMAAccumulatorRef((q_ref.shape[0], k_ref.shape[0]), jnp.float32)
        )

    def weigh(self, acc: Array, weights: Array, v_ref: Any) -> Array:
        """`[rows, H]`: acc plus weights `[rows, block]` times values `[block, H]`."""

        def multiply(acc_ref):
            plgpu.wgmma(acc_ref, weights, v_ref)

        start: Any = plgpu.WGMMAAccumulatorRef.init(acc)
        return pl.run_state(multiply)(start)


class Tcgen05:
    """Blackwell (sm_100a): products land in tensor memory; weights go through shared memory."""

    ROWS: ClassVar[int] = 128
    LAYOUT: ClassVar[Any] = plgpu.Layout.TCGEN05
    WIDEST: ClassVar[int] = 128  # the accumulator of a wider head does not fit into registers

    @staticmethod
    def scratch(groups: int, block: int, width: int, dtype: str) -> dict[str, Any]:
        return dict(
            scores_tmem=plgpu.TMEM((128, groups * block), jnp.float32),
            values_tmem=plgpu.TMEM((128, groups * width), jnp.float32),
            weights_smem=tiled((groups, 128, block), dtype),
            product=plgpu.Barrier(num_barriers=groups, orders_tensor_core=True),
        )

    def __init__(self, scratch: dict[str, Any], group: Array):
        self.refs, self.group = scratch, group

    def _multiply(self, name: str, left_ref: Any, right_ref: Any) -> Array:
        columns = right_ref.shape[1]
        out_tmem = self.refs[name].at[:, pl.ds(self.group * columns, columns)]
        done = self.refs["product"].at[self.group]
        plgpu.tcgen05_mma(out_tmem, left_ref, right_ref, done, accumulate=False)
        plgpu.barrier_wait(done)
        out = plgpu.async_load_tmem(out_tmem, layout=self.LAYOUT)
        plgpu.wait_load_tmem()
        return out

    def scores(self, q_ref: Any, k_ref: Any) -> Array:
        return self._multiply("scores_tmem", q_ref, k_ref.transpose((1, 0)))

    def weigh(self, acc: Array, weights: Array, v_ref: Any) -> Array:
        weights_ref = self.refs["weights_smem"].at[self.group]
        weights_ref[...] = weights
        plgpu.commit_smem()
        return acc + self._multiply("values_tmem", weights_ref, v_ref)


# By the major number of the compute capability.
UNITS = {9: Wgmma, 10: Tcgen05}
