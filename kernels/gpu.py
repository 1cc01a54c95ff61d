"""What the kernels for NVIDIA GPUs share: facts of a chip, and how data gets into registers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jax import Array
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

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


def load(ref: Any, layout: Any = None, *, optimized: bool = True) -> Array:
    """What a reference holds, in registers; `optimized`: refuse to do it slowly."""
    # JAX 0.10, which these kernels do not run with, had one argument more.
    return plgpu.load(ref, layout=layout, optimized=optimized)  # pyright: ignore[reportCallIssue]


def meet() -> None:
    """The threads of a warpgroup await each other: what any of them stored in shared memory, all
    can load afterwards.  For kernels in which Pallas puts no barriers around stores."""
    plgpu.inline_mgpu()(lambda _: mgpu.warpgroup_barrier())()


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
