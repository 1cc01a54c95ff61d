"""Running TPU kernels in the interpreter, where a mistake in their copies does not go unnoticed."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.pallas import tpu as pltpu


def parameters(num_cores: int = 1) -> pltpu.InterpretParams:
    """Copies happen as late as they may, memory begins as NaN, and races are looked for."""
    return pltpu.InterpretParams(
        detect_races=True,
        uninitialized_memory="nan",
        dma_execution_mode="on_wait",
        num_cores_or_threads=num_cores,
        vector_clock_size=num_cores + 64,  # copies that share a clock do not race
    )


def run(function: Callable, *arguments: Any) -> Any:
    """The result of a function of kernels, jitted; raises AssertionError if one of them races.

    The interpreter prints each race that it finds; its flag tells of the last kernel alone.
    """
    # Most of the time goes into compiling the interpreter's loop; it need not be good code.
    quick = jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        result = jax.block_until_ready(quick(*arguments))
    assert not said.getvalue(), said.getvalue()
    return result
