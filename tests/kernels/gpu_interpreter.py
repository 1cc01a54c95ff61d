"""Running GPU kernels in the interpreter, in memory that is full of NaN at first."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu


def parameters(*, detect_races: bool = False) -> Any:
    """Of the interpreter, which is public from JAX 0.11 on."""
    return plgpu.InterpretGPUParams(  # pyright: ignore[reportAttributeAccessIssue]
        detect_races=detect_races, uninitialized_memory="nan"
    )


def interpreting(how: Any) -> AbstractContextManager[Any]:
    """Kernels that are called meanwhile are interpreted; how: `parameters`."""
    return plgpu.force_gpu_interpret_mode(how)  # pyright: ignore[reportAttributeAccessIssue]


def races_found() -> bool:
    """Whether the last kernel raced, if races were looked for."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    return gpu_callbacks.get_races().races_found
