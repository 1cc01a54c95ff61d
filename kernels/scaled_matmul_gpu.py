"""Products of 8-bit numbers that are scaled before they leave the chip, for Hopper.

A thread block for each multiprocessor takes one tile of the result after the other.  One warpgroup
copies blocks of both operands into a ring in shared memory, and runs ahead, across tiles, as far as
the ring goes; two others multiply, half of the tokens each, keep the sums in registers, and scale
them on the way out.  Pairs of thread blocks (a cluster) have tiles that share a weight's block:
each loads half of it for both, for what comes out of L2 is what limits the speed.

Sums of fp8 products are those of the matrix unit, as the library's are: some 14 bits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from jaxinfer.kernels import blocks as tuned
from jaxinfer.kernels.gpu import Gpu, load, tiled
from jaxinfer.shapes import dims

ACC = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage] (exported from JAX 0.11 on)

# Bytes of D in a block: as long as the widest swizzle.
DEPTH = 128
# Warpgroups that multiply, and registers of a thread of the one that loads and of these.
GROUPS, LOAD_REGISTERS, REGISTERS = 2, 24, 240
# Rows and columns of the result that leave at once, and for how many such pieces a warpgroup has
# room.
PIECE, PIECES = (64, 64), 2
# Bytes for barriers.
REST = 1024
# What share of the multiprocessors' time must have a tile.  With less (the tiles are large, so of
# few tokens) the library's product was faster on H200.
BUSY = 3 / 4


@dataclass(frozen=True)
class Blocks:
    """How the work is cut: tokens and width (along F) of a thread block's tile, blocks of D in
    flight, thread blocks that share a weight's block, and how many tiles of tokens (of a cluster)
    pass before the next width: what runs at once then shares what is in L2."""

    tokens: int = 128
    width: int = 256
    stages: int = 4
    cluster: int = 2
    group: int = 8


def check_blocks(blocks: Blocks, depth: int, gpu: Gpu) -> None:
    """Raise `ShapeError` unless blocks are for weights of such a depth on such a chip."""
    needed, rows, columns = _shared_bytes(blocks), GROUPS * PIECE[0], PIECE[1]
    pieces = blocks.tokens // rows * (blocks.width // columns)
    tuned.require(
        {
            f"tokens must be a multiple of {rows} up to 256": blocks.tokens
            in range(rows, 257, rows),
            f"width must be a multiple of {columns} up to 256": blocks.width
            in range(columns, 257, columns),
            "the sums are more than a multiprocessor holds": blocks.tokens * blocks.width <= 2**15,
            # Else a tile's first piece would overwrite the last of the tile before while it leaves.
            f"a warpgroup's pieces, {pieces}, must be a multiple of {PIECES}": pieces % PIECES == 0,
            f"stages must be from 2 to {depth // DEPTH - 1}": 2 <= blocks.stages < depth // DEPTH,
            "cluster must be 1, 2 or 4": blocks.cluster in (1, 2, 4),
            f"{needed} bytes do not fit {gpu.shared_bytes}": needed <= gpu.shared_bytes,
        },
        blocks,
    )


def _shared_bytes(blocks: Blocks) -> int:
    each = blocks.tokens + blocks.width
    out_bytes = 2 * GROUPS * PIECES * math.prod(PIECE)
    return blocks.stages * DEPTH * each + out_bytes + 4 * each + REST


def block_sizes(depth: int) -> Blocks:
    """Blocks for weights of such a depth."""
    return Blocks(stages=min(4, depth // DEPTH - 1))


def refusal(x_TD: Any, values_DF: Any, gpu: Gpu) -> str | None:
    """Why the kernel is not for tokens (quantised or not yet) and values, abstract or not, on such
    a chip; None if it is."""
    T, (D, F) = len(x_TD), values_DF.shape
    if gpu.capability != (9, 0):
        return f"it is for compute capability (9, 0), not {gpu.capability}"
    if values_DF.dtype not in ("float8_e4m3fn", "int8"):
        return f"it multiplies float8_e4m3fn and int8, not {values_DF.dtype}"
    if T % 8 or not T:
        return f"{T} tokens are none or no multiple of 8"
    if D % DEPTH or D < 3 * DEPTH or F % PIECE[1]:
        return (
            f"D = {D} is less than 3 · {DEPTH} or no multiple of {DEPTH}, or F = {F} of {PIECE[1]}"
        )
    blocks, there = block_sizes(D), gpu.multiprocessors
    tiles = blocks.cluster * math.prod(_clusters(blocks, T, F))
    if tiles < BUSY * there * -(-tiles // there):
        return (
            f"{tiles} tiles keep {there} multiprocessors busy for less than {BUSY:.0%} of the time"
        )
    return None


def _clusters(blocks: Blocks, T: int, F: int) -> tuple[int, int]:
    """How many clusters have a tile each, along tokens and F."""
    return -(-T // (blocks.tokens * blocks.cluster)), -(-F // blocks.width)


def scaled_matmul(
    x: Array,
    scale_T1: Array,
    values_DF: Array,
    scale_1F: Array,
    *,
    gpu: Gpu,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> Array:
    """x `[T, D]` times `values_DF`, times the scales: bfloat16 `[T, F]`; for what `refusal` passes,
    or with blocks of one's own for fewer tokens.

    x, values_DF: both fp8 (e4m3) or both int8, the values with D innermost in memory.

    Raises `ShapeError` if the blocks do not fit.
    """
    sizes = dims(x_TD=x, values_DF=values_DF)
    T, D, F = (sizes[letter] for letter in "TDF")
    b = blocks or block_sizes(D)
    check_blocks(b, D, gpu)
    tiles = _clusters(b, T, F)
    sums = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    clusters = min(gpu.multiprocessors // b.cluster, tiles[0] * tiles[1])

    def body(*refs, **scratch):
        group = lax.axis_index("warpgroup")
        work = _Work(b, D // DEPTH, tiles, clusters, sums, *refs, scratch)
        pl.when(group == GROUPS)(work.load)
        pl.when(group < GROUPS)(partial(work.multiply, group))

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((T, F), jnp.bfloat16),
        scratch_types=dict(
            x_smem=tiled((b.stages, b.tokens, DEPTH), x.dtype),
            values_smem=tiled((b.stages, b.width, DEPTH), x.dtype),
            out_smem=tiled((GROUPS, PIECES, *PIECE), jnp.bfloat16),
            scale_T_smem=plgpu.SMEM((b.tokens,), jnp.float32),
            scale_F_smem=plgpu.SMEM((b.width,), jnp.float32),
            full=plgpu.Barrier(num_arrivals=2, num_barriers=b.stages),
            free=plgpu.ClusterBarrier(
                collective_axes=("member",), num_arrivals=GROUPS, num_barriers=b.stages
            ),
            scaled=plgpu.Barrier(num_arrivals=2),
        ),
        grid=(clusters,),
        grid_names=("cluster",),
        cluster=(b.cluster,),
        cluster_names=("member",),
        num_threads=GROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
    )(x, scale_T1[:, 0], values_DF.T, scale_1F[0])


@dataclass
class _Work:
    """What the warpgroups of a thread block do; `steps`: blocks of D, `tiles`: of a cluster."""

    blocks: Blocks
    steps: int
    tiles: tuple[int, int]
    clusters: int
    sums: Any
    x: Any
    scale_T: Any
    values: Any
    scale_F: Any
    out: Any
    scratch: dict[str, Any]

    def _each_tile(self, visit: Callable[[Array, Any, Any], None]) -> Array:
        """Call `visit(steps before, tokens, columns)` for each tile in turn; returns the steps of
        all."""
        b, here = self.blocks, lax.axis_index("cluster")

        def turn(n, before):
            row, column = plgpu.planar_snake(here + n * self.clusters, self.tiles, 0, b.group)
            row = row * b.cluster + lax.axis_index("member")
            visit(before, pl.ds(row * b.tokens, b.tokens), pl.ds(column * b.width, b.width))
            return before + self.steps

        count = self.tiles[0] * self.tiles[1]
        turns = lax.div(count - here + self.clusters - 1, self.clusters)
        return lax.fori_loop(0, turns, turn, jnp.int32(0))

    def _slot(self, step: Array) -> Array:
        return lax.rem(step, jnp.int32(self.blocks.stages))

    def load(self) -> None:
        plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")
        steps = self._each_tile(self._load_tile)
        # A barrier must not go before what arrives at it.
        for n in range(self.blocks.stages):
            plgpu.barrier_wait(self.scratch["free"].at[self._slot(steps + n)])

    def _load_tile(self, before: Array, tokens: Any, columns: Any) -> None:
        b, scratch = self.blocks, self.scratch

        def step(n, _):
            slot = self._slot(before + n)
            full, free = scratch["full"].at[slot], scratch["free"].at[slot]
            pl.when(before + n >= b.stages)(lambda: plgpu.barrier_wait(free))
            depth = pl.ds(n * DEPTH, DEPTH)
            plgpu.copy_gmem_to_smem(self.x.at[tokens, depth], scratch["x_smem"].at[slot], full)
            plgpu.copy_gmem_to_smem(
                self.values.at[columns, depth], scratch["values_smem"].at[slot], full,
                collective_axes="member" if b.cluster > 1 else None,
            )  # fmt: skip

        lax.fori_loop(0, self.steps, step, None)
        # There are more steps than stages: the scales of the tile before are not needed any more.
        scaled = scratch["scaled"]
        plgpu.copy_gmem_to_smem(self.scale_T.at[tokens], scratch["scale_T_smem"], scaled)
        plgpu.copy_gmem_to_smem(self.scale_F.at[columns], scratch["scale_F_smem"], scaled)

    def multiply(self, group: Array) -> None:
        plgpu.set_max_registers(REGISTERS, action="increase")
        self._each_tile(partial(self._multiply_tile, group))
        plgpu.wait_smem_to_gmem(0)

    def _multiply_tile(self, group: Array, before: Array, tokens: Any, columns: Any) -> None:
        scratch, each = self.scratch, self.blocks.tokens // GROUPS
        mine = pl.ds(group * each, each)

        def release(step):
            plgpu.barrier_arrive(scratch["free"].at[self._slot(step)])

        def multiply(sums_ref):
            def step(n, _):
                slot = self._slot(before + n)
                plgpu.barrier_wait(scratch["full"].at[slot])
                values_ref = scratch["values_smem"].at[slot].transpose((1, 0))
                plgpu.wgmma(sums_ref, scratch["x_smem"].at[slot, mine], values_ref)
                plgpu.wgmma_wait(1)  # so the step before has read what it multiplied
                pl.when(n > 0)(lambda: release(before + n - 1))

            lax.fori_loop(0, self.steps, step, None)
            return sums_ref[...]

        sums = pl.run_scoped(multiply, ACC((each, self.blocks.width), self.sums))
        release(before + self.steps - 1)
        plgpu.barrier_wait(scratch["scaled"])
        self._leave(group, sums, self.out.at[tokens, columns].at[mine], mine)

    def _leave(self, group: Array, sums: Array, out: Any, mine: Any) -> None:
        """Scale a warpgroup's sums and store them, piece by piece."""
        scratch, layout = self.scratch, plgpu.Layout.WGMMA
        scale_T_ref, scale_F_ref = scratch["scale_T_smem"].at[mine], scratch["scale_F_smem"]
        rows, columns = (
            range(0, size, at_once) for size, at_once in zip(sums.shape, PIECE, strict=True)
        )
        for number, (row, column) in enumerate(itertools.product(rows, columns)):
            these = pl.ds(row, PIECE[0]), pl.ds(column, PIECE[1])
            scale_T = load(scale_T_ref.at[these[0]], layout.reduce(1), optimized=False)
            scale_F = load(scale_F_ref.at[these[1]], layout.reduce(0), optimized=False)
            scale = lax.broadcast_in_dim(scale_T, PIECE, [0]) * lax.broadcast_in_dim(
                scale_F, PIECE, [1]
            )
            piece = sums[row : row + PIECE[0], column : column + PIECE[1]]
            out_ref = scratch["out_smem"].at[group, number % PIECES]
            plgpu.wait_smem_to_gmem(PIECES - 1, wait_read_only=True)
            out_ref[...] = (piece.astype(jnp.float32) * scale).astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_ref, out.at[these])
