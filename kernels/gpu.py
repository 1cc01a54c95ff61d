"""What the kernels for NVIDIA GPUs share: facts of a chip, and how data gets into registers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, memref, vector

from jaxinfer.configs import Chip


@dataclass(frozen=True)
class Gpu:
    """Facts of a chip: compute capability, multiprocessors, bytes of shared memory of a block."""

    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int

    @classmethod
    def of(cls, chip: Chip) -> Gpu:
        """Those of the sheet of an NVIDIA GPU."""
        assert chip.gpu is not None, chip.name
        major, minor = chip.gpu.compute_capability.rstrip("a").split(".")
        return cls((int(major), int(minor)), chip.gpu.sm_count, chip.gpu.shared_memory_per_block)

    @property
    def refusal(self) -> str | None:
        """Why no kernel is for such a chip; None if there are some.

        To be asked before lowering: for chips that it does not know, Mosaic GPU ends the process.
        """
        if self.capability in {(9, 0), (10, 0)}:
            return None
        return f"compute capability {self.capability} has neither wgmma nor tcgen05"


def load(ref: Any, layout: Any = None, *, optimized: bool = True) -> Array:
    """What a reference holds, in registers; `optimized`: refuse to do it slowly."""
    # JAX 0.10, which these kernels do not run with, had one argument more.
    return plgpu.load(ref, layout=layout, optimized=optimized)  # pyright: ignore[reportCallIssue]


def tiled(shape: tuple[int, ...], dtype: Any, width: int | None = None) -> Any:
    """Shared memory for a matrix operand, swizzled over as much of `width` columns as possible."""
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle((width or shape[-1]) * bits)
    if swizzle == 16:
        return plgpu.SMEM(shape, dtype)  # rows of 16 bytes: nothing to swizzle
    tiling = plgpu.TilingTransform((8, swizzle * 8 // bits))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def meet() -> None:
    """The threads of a warpgroup await each other: what any of them stored in shared memory, all
    can load afterwards.  For kernels in which Pallas puts no barriers around stores."""
    plgpu.inline_mgpu()(lambda _: mgpu.warpgroup_barrier())()


def four_as_two_and_two(x: Array) -> Array:
    """What a warpgroup loaded in the layout `WGMMA_UPCAST_2X`, `[64 n, 16 m]` of 16 bits, as an
    operand of wgmma, no number moved: a thread's four neighbours of sixteen columns become the
    two and two that it has of them there.  So the columns are others:
    `paged_attention_gpu_units.exchanged` says which."""

    def relabel(_: Any, x: Any) -> Any:
        registers = np.empty(mgpu.WGMMA_LAYOUT.registers_shape(x.shape), object)
        for (row, sixteen, *rest, _), four in np.ndenumerate(x.registers):
            for half in (0, 1):
                pair = mgpu_utils.vector_slice(four, slice(2 * half, 2 * half + 2))
                registers[row, 2 * sixteen + half, *rest] = pair
        return mgpu.FragmentedArray(
            _registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=x.is_signed
        )

    given = plgpu.Layout.WGMMA_UPCAST_2X
    operand = plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=plgpu.Layout.WGMMA)
    return plgpu.inline_mgpu(arg_types=(given,), return_type=operand)(relabel)(x)


def float16_of_bytes(x: Array, bias: int, layout: Any) -> Array:
    """uint8 numbers less a bias, in float16 and in their layout, whose vectors are of fours.

    A byte behind that of 1024 is 1024 and the byte: two instructions for two numbers, where what
    the compiler has for integers takes six.
    """

    def convert(_: Any, x: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        two = ir.VectorType.get([2], ir.F16Type.get())
        of_1024, least = mgpu_utils.c(0x64646464, i32), mgpu_utils.c(1024.0 + bias, two)

        def pairs(some: Any) -> Any:
            for at in range(0, some.type.shape[0], 4):
                four = mgpu_utils.bitcast(mgpu_utils.vector_slice(some, slice(at, at + 4)), i32)
                for order in (0x4140, 0x4342):
                    above = mgpu_utils.prmt(four, of_1024, mgpu_utils.c(order, i32))
                    yield arith.subf(mgpu_utils.bitcast(above, two), least)

        registers = np.empty_like(x.registers)
        for place, some in np.ndenumerate(x.registers):
            registers[place] = mgpu_utils.vector_concat(list(pairs(some)))
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    result = plgpu.ShapeDtypeStruct(x.shape, jnp.float16, layout=layout)
    return plgpu.inline_mgpu(arg_types=(layout,), return_type=result)(convert)(x)


def store_turned(ref: Any, x: Array) -> None:
    """Store a result of wgmma `[m, n]` as `[n, m]`, in shared memory that nothing tiles.

    Number by number: threads that hold neighbours of a column store to neighbours in memory.
    """

    def store(_: Any, ref: Any, x: Any) -> None:
        x.foreach(lambda number, place: memref.store(number, ref, place[::-1]))

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))(store)(ref, x)


def load_vectors(ref: Any, shape: tuple[int, int], layout: Any) -> Array:
    """The first rows and columns of float32 numbers in shared memory that nothing tiles, in
    registers of a tiled layout; its vectors must begin at multiples of their size."""

    def load(_: Any, ref: Any) -> Any:
        tiles = layout.to_mgpu()
        some = ir.VectorType.get([tiles.vector_length], ir.F32Type.get())
        registers = np.empty(tiles.registers_shape(shape), object)
        registers.flat = [vector.load(some, ref, place) for place in tiles.thread_idxs(shape)]
        return mgpu.FragmentedArray(_registers=registers, _layout=tiles, _is_signed=None)

    result = plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout)
    return plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=result)(load)(ref)


def row_layout(width: int) -> Any:
    """Registers that hold eight neighbours of a row each: loads and stores of 8 and 16 bytes.

    width: of the rows, a multiple of 16; their number must be one of 16 (of 64 if width is no
    multiple of 64).
    """
    columns = next(n for n in (64, 32, 16) if width % n == 0)
    rows = 256 // columns
    return plgpu.Layout.TILED(
        plgpu.Tiling(((4 * rows, columns), (rows, columns), (8,))),
        warp_dims=(-5,),
        lane_dims=(-3, -2),
        vector_dim=-1,
    )
