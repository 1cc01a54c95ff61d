"""The two matrix products of attention on the matrix units of Hopper and Blackwell.

A unit serves one warpgroup, whose tile has `rows` query rows; `LAYOUT` is how a tile lies in its
registers, and `KEYS` how keys do that come from there (None: they come from shared memory).
`scores` multiplies queries with keys, `weigh` adds weighted values to an accumulator that `start`
made (in registers, on Blackwell in tensor memory); both have their result when they return.
`columns` and `leave` take the accumulator out, some columns at a time.

`BARRIERS`: Pallas puts barriers of the warpgroup around each store to shared memory.  `COMMITS`:
`weigh` makes what the warpgroup stored there visible to the matrix unit, values included.
`SUMS_LATE`: a tile's registers have room for a sum of weights for each column; it is summed over
the columns, which takes exchanges between threads, only at the end of an item.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from jaxinfer.kernels.gpu import (
    Gpu,
    four_as_two_and_two,
    load,
    load_vectors,
    meet,
    store_turned,
    tiled,
)
from jaxinfer.kernels.paged_attention_gpu_work import Problem, Tiling


def full(value: float, layout: Any, *shape: int) -> Array:
    """The same number everywhere, in registers."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def over_columns(x: Array, shape: tuple[int, ...]) -> Array:
    """A number for each row, beside every column."""
    return lax.broadcast_in_dim(x, shape, [0])


def exchanged(x: Array) -> Array:
    """The columns in the order in which `Turned.keys` has them: of each sixteen, the second and the
    third pair of each half change places across the halves."""
    sixteens = x.reshape(*x.shape[:-1], -1, 2, 2, 2, 2)
    return sixteens.swapaxes(-4, -2).reshape(x.shape)


class Wgmma:
    """Hopper (sm_90a): the products of a warpgroup, accumulated in its registers."""

    ROWS: ClassVar[int] = 64
    LAYOUT: ClassVar[Any] = plgpu.Layout.WGMMA
    KEYS: ClassVar[Any] = None
    BARRIERS: ClassVar[bool] = True
    COMMITS: ClassVar[bool] = False
    SUMS_LATE: ClassVar[bool] = False
    WIDEST: ClassVar[int] = 256

    @staticmethod
    def scratch(p: Problem, t: Tiling) -> dict[str, Any]:
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

    def start(self, rows: int, width: int) -> Array:
        """An accumulator of zeros."""
        return full(0, self.LAYOUT, rows, width)

    def weigh(self, acc: Array, shrink: Array, weights: Array, v_ref: Any) -> Array:
        """`[rows, H]`: acc times shrink `[rows]` plus weights `[rows, block]` times values
        `[block, H]`."""

        def multiply(acc_ref):
            plgpu.wgmma(acc_ref, weights, v_ref)

        start: Any = plgpu.WGMMAAccumulatorRef.init(acc * over_columns(shrink, acc.shape))
        return pl.run_state(multiply)(start)

    @staticmethod
    def room(*shape: int) -> Any:
        """Shared memory for some columns of the accumulators of all groups."""
        return tiled(shape, jnp.float32)

    @staticmethod
    def piece(width: int) -> int:
        """Columns of an accumulator that lie in one array."""
        return width

    def columns(self, acc: Array, at: int, count: int) -> Array:
        """Some columns of an accumulator, all of one piece."""
        return acc[:, at : at + count]

    def leave(self, some: Array, ref: Any) -> None:
        """Store columns in their room, `[rows, columns]`."""
        ref[...] = some


class Turned:
    """Hopper, for few query rows, a multiple of eight: those of keys and values are the unit's 64.
    For rows of one token only: it leaves parts of a context (by 64 columns), no results.

    A tile of eight rows would fill an eighth of the unit's rows, and of the registers.  Scores
    come out transposed, and go through shared memory into rows; so do the weights on their way
    back.  A block takes two barriers, one after its scores and one after its weights were stored:
    whatever is stored in shared memory is loaded behind the next of them, and stored anew behind
    the one after that.  A third keeps values that are converted early from the product before.
    """

    # Two rows a warp, four neighbours a thread.
    LAYOUT: ClassVar[Any] = plgpu.Layout.TILED(
        plgpu.Tiling(((8, 64), (2, 64), (4,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
    )
    KEYS: ClassVar[Any] = plgpu.Layout.WGMMA_UPCAST_2X
    BARRIERS: ClassVar[bool] = False
    COMMITS: ClassVar[bool] = True
    SUMS_LATE: ClassVar[bool] = True

    @staticmethod
    def scratch(p: Problem, t: Tiling) -> dict[str, Any]:
        return dict(
            # Four further columns: the two rows of four threads each lie in banks of their own.
            scores_smem=Turned.room(t.groups, t.rows, t.block + 4),
            weights_smem=tiled((t.groups, t.rows, t.block), p.operand, p.swizzled),
            shrink_smem=plgpu.SMEM((t.groups, t.rows), jnp.float32),
        )

    def __init__(self, scratch: dict[str, Any], group: Array):
        names = ("scores_smem", "weights_smem", "shrink_smem")
        self.scores_ref, self.weights_ref, self.shrink_ref = (scratch[n].at[group] for n in names)

    @staticmethod
    def keys(part: Array) -> Array:
        """Columns of keys, as they were loaded, as an operand: not in their order, but `exchanged`.

        A thread holds four neighbours of sixteen columns, where the matrix unit expects two and
        two.  The order does not matter if queries have the same.
        """
        return four_as_two_and_two(part)

    def scores(self, q_ref: Any, *keys: Any, meanwhile: Callable[[], Any] | None = None) -> Array:
        """Queries `[rows, H]` times keys `[block, H]`: `[rows, block]`; the keys in shared memory,
        or some columns after the other in registers.  meanwhile: called while they are
        multiplied; may overwrite what the product before read."""
        width, block = q_ref.shape[1] // len(keys), keys[0].shape[0]

        def multiply(acc_ref):
            for n, part in enumerate(keys):
                some = q_ref.at[:, pl.ds(n * width, width)] if len(keys) > 1 else q_ref
                plgpu.wgmma(acc_ref, part, some.transpose((1, 0)))
            if meanwhile is not None:
                meet()  # a warp knows of its own share of that product only
                meanwhile()
            return acc_ref[...]

        turned = pl.run_scoped(
            multiply, plgpu.WGMMAAccumulatorRef((block, q_ref.shape[0]), jnp.float32)
        )
        store_turned(self.scores_ref, turned)
        meet()
        return load_vectors(self.scores_ref, turned.shape[::-1], self.LAYOUT)

    @staticmethod
    def room(*shape: int) -> Any:
        return plgpu.SMEM(shape, jnp.float32)

    def start(self, rows: int, width: int) -> Array:
        return full(0, plgpu.Layout.WGMMA, width, rows)

    def weigh(self, acc: Array, shrink: Array, weights: Array, v_ref: Any) -> Array:
        """`[H, rows]`: as `Wgmma.weigh`, transposed."""
        self.weights_ref[...] = plgpu.layout_cast(weights, self.LAYOUT)
        self.shrink_ref[...] = plgpu.layout_cast(shrink, self.LAYOUT.reduce(1))
        plgpu.commit_smem()
        shrink = load(self.shrink_ref, plgpu.Layout.WGMMA.reduce(0), optimized=False)

        def multiply(acc_ref):
            turned = (ref.transpose((1, 0)) for ref in (v_ref, self.weights_ref))
            plgpu.wgmma(acc_ref, *turned)

        acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [1])
        start: Any = plgpu.WGMMAAccumulatorRef.init(plgpu.layout_cast(acc, plgpu.Layout.WGMMA))
        return plgpu.layout_cast(pl.run_state(multiply)(start), plgpu.Layout.WGMMA)

    def columns(self, acc: Array, at: int, count: int) -> Array:
        return acc[at : at + count]  # `[columns, rows]`

    def leave(self, some: Array, ref: Any) -> None:
        store_turned(ref, some)


class Tcgen05:
    """Blackwell (sm_100a): products land in tensor memory; weights go through shared memory.

    The accumulator stays there, too: beside scores it would not fit into registers.
    """

    ROWS: ClassVar[int] = 128
    LAYOUT: ClassVar[Any] = plgpu.Layout.TCGEN05
    KEYS: ClassVar[Any] = None
    BARRIERS: ClassVar[bool] = True
    COMMITS: ClassVar[bool] = True
    SUMS_LATE: ClassVar[bool] = False
    WIDEST: ClassVar[int] = 128  # that of a wider head for two warpgroups does not fit

    @staticmethod
    def scratch(p: Problem, t: Tiling) -> dict[str, Any]:
        return dict(
            scores_tmem=plgpu.TMEM((128, t.groups * t.block), jnp.float32),
            values_tmem=plgpu.TMEM((128, t.groups * p.H), jnp.float32),
            weights_smem=tiled((t.groups, 128, t.block), p.operand),
            product=plgpu.Barrier(num_barriers=t.groups, orders_tensor_core=True),
        )

    def __init__(self, scratch: dict[str, Any], group: Array):
        self.refs, self.group = scratch, group

    def _columns(self, name: str, of: int, at: int, count: int) -> Any:
        """Some of the `of` columns that a warpgroup has in tensor memory."""
        return self.refs[name].at[:, pl.ds(self.group * of + at, count)]

    def _multiply(self, out_tmem: Any, left_ref: Any, right_ref: Any, *, add: bool) -> None:
        done = self.refs["product"].at[self.group]
        plgpu.tcgen05_mma(out_tmem, left_ref, right_ref, done, accumulate=add)
        plgpu.barrier_wait(done)

    def _load(self, ref: Any) -> Array:
        out = plgpu.async_load_tmem(ref, layout=self.LAYOUT)
        plgpu.wait_load_tmem()
        return out

    def scores(self, q_ref: Any, k_ref: Any) -> Array:
        block = k_ref.shape[0]
        out_tmem = self._columns("scores_tmem", block, 0, block)
        self._multiply(out_tmem, q_ref, k_ref.transpose((1, 0)), add=False)
        return self._load(out_tmem)

    def start(self, rows: int, width: int) -> tuple[()]:
        self.width, each = width, self.piece(width)
        for at in range(0, width, each):
            ref = self._columns("values_tmem", width, at, each)
            plgpu.async_store_tmem(ref, full(0, self.LAYOUT, rows, each))
        plgpu.commit_tmem()
        return ()

    def weigh(self, acc: tuple[()], shrink: Array, weights: Array, v_ref: Any) -> tuple[()]:
        weights_ref = self.refs["weights_smem"].at[self.group]
        weights_ref[...] = weights
        plgpu.commit_smem()
        width, each = self.width, self.piece(self.width)
        for at in range(0, width, each):
            ref = self._columns("values_tmem", width, at, each)
            plgpu.async_store_tmem(ref, self._load(ref) * over_columns(shrink, ref.shape))
        plgpu.commit_tmem()
        self._multiply(self._columns("values_tmem", width, 0, width), weights_ref, v_ref, add=True)
        return acc

    @staticmethod
    def room(*shape: int) -> Any:
        return tiled(shape, jnp.float32)

    @staticmethod
    def piece(width: int) -> int:
        return next(columns for columns in (64, 32, 16) if width % columns == 0)

    def columns(self, acc: tuple[()], at: int, count: int) -> Array:
        return self._load(self._columns("values_tmem", self.width, at, count))

    def leave(self, some: Array, ref: Any) -> None:
        ref[...] = some


# By the major number of the compute capability: for tiles of any kind, and for few query rows.
UNITS: dict[int, Any] = {9: Wgmma, 10: Tcgen05}
FOR_FEW_ROWS: dict[int, Any] = {9: Turned}


def keys_in_registers(p: Problem, unit: Any) -> bool:
    """Whether a unit converts keys in registers, in the order in which `exchanged` has queries."""
    return p.quantized and unit.KEYS is not None


def choose_unit(gpu: Gpu, p: Problem, *, split: bool) -> tuple[Any, int]:
    """The unit for a problem on a chip, and the query rows of its tile."""
    major = gpu.capability[0]
    if split and major in FOR_FEW_ROWS and p.width % 64 == 0:
        return FOR_FEW_ROWS[major], p.padded
    return UNITS[major], UNITS[major].ROWS
