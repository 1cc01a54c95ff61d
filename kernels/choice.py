"""Which implementation of the operations over pages serves an engine: one function of the chip, the
shapes and the dtypes.

An engine asks once, at its start, and logs the answer.  A backend that was asked for by name serves
or raises; nothing falls back in silence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxinfer.configs import Chip
from jaxinfer.errors import ConfigError
from jaxinfer.kernels import paged_attention as reference_attention
from jaxinfer.kernels import write_pages as reference_write
from jaxinfer.kernels.write_pages import Pool

# Release of jax from which Pallas' Mosaic GPU backend has what the kernels use.
GPU_NEEDS_JAX = (0, 11)


def plain_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Bytes that an array takes in memory where nothing is padded, as on CPUs and GPUs."""
    return math.prod(shape) * jnp.dtype(dtype).itemsize


@dataclass(frozen=True)
class PageOps:
    """The operations over pages of one backend, with the facts of the hardware bound in.

    paged_attention, write_pages: as in the modules of these names.
    why: what decided for this backend, in words.
    row_major: pools must lie in memory in the order of their axes.  Where rows are shorter than a
        TPU's lanes XLA would rather have another order, and would copy the pool before each kernel;
        so a program must take and return its pool in this one.
    array_bytes: bytes that a pool's array of a shape and dtype takes there, padding included.
    """

    backend: str
    paged_attention: Callable[..., Array]
    write_pages: Callable[..., Pool]
    why: str = "asked for"
    row_major: bool = False
    array_bytes: Callable[[tuple[int, ...], Any], int] = plain_bytes


REFERENCE = PageOps("reference", reference_attention.paged_attention, reference_write.write_pages)


def choose(asked: str, chip: Chip | None, q_TKGH: Any, pool: Pool) -> PageOps:
    """The operations that serve queries and a pool of these shapes and dtypes.

    asked: a backend, or "auto": the chip's own if it can serve, else the reference.
    chip: its sheet; None for CPUs and chips without one.
    q_TKGH, pool: what one device has of them, as arrays or `jax.ShapeDtypeStruct`s.

    Raises `ConfigError` if the backend that was asked for cannot serve: says why, and which can.
    """
    refusals = {name: refusal(name, chip, q_TKGH, pool) for name in _KERNELS}
    serving = [name for name, why in refusals.items() if why is None]
    if asked == "auto":
        if chip is None or not serving:
            own = None if chip is None else refusals["mosaic_gpu" if chip.gpu else "mosaic_tpu"]
            return _reference(chip, own or "there are kernels for TPUs and NVIDIA GPUs only")
        return _KERNELS[serving[0]][1](chip, f"serves {chip.name}")
    if asked == "reference":
        return _reference(chip, "asked for")
    if refusals[asked] is not None:
        raise ConfigError(
            f"EngineConfig.attention_backend: {asked} cannot serve here: {refusals[asked]}; what "
            f"can: {', '.join(['reference', *serving])}"
        )
    assert chip is not None
    return _KERNELS[asked][1](chip, "asked for")


def refusal(backend: str, chip: Chip | None, q_TKGH: Any, pool: Pool) -> str | None:
    """Why a backend cannot serve queries and a pool on a chip; None if it can."""
    return None if backend == "reference" else _KERNELS[backend][0](chip, q_TKGH, pool)


def _reference(chip: Chip | None, why: str) -> PageOps:
    """On a TPU with the kernels' order of axes: what a pool takes there must be known before."""
    layout = {} if chip is None or chip.tpu is None else _tpu_layout()
    return replace(REFERENCE, why=why, **layout)


def _tpu_layout() -> dict[str, Any]:
    from jaxinfer.kernels.tpu import padded_bytes

    return {"row_major": True, "array_bytes": padded_bytes}


def _refuse_tpu(chip: Chip | None, q_TKGH: Any, pool: Pool) -> str | None:
    if chip is None or chip.tpu is None:
        return "the device is no TPU that has a sheet in configs/hardware"
    from jaxinfer.kernels import tpu

    return tpu.unsupported(chip.name, q_TKGH.dtype, pool)


def _make_tpu(chip: Chip, why: str) -> PageOps:
    from jaxinfer.kernels.paged_attention_tpu import paged_attention
    from jaxinfer.kernels.write_pages_tpu import write_pages

    assert chip.tpu is not None
    facts = {"vmem_bytes": chip.tpu.vmem_bytes, "num_cores": chip.tpu.cores}
    return PageOps(
        "mosaic_tpu", partial(paged_attention, **facts, chip=chip.name),
        partial(write_pages, **facts), why, **_tpu_layout(),
    )  # fmt: skip


def gpu_refusal(chip: Chip | None) -> str | None:
    """Why this jax has no kernels for a chip as a GPU, whatever they are to compute; None if it
    may."""
    if chip is None or chip.gpu is None:
        return "the device is no NVIDIA GPU that has a sheet in configs/hardware"
    if jax.__version_info__ < GPU_NEEDS_JAX:
        return (
            f"the GPU kernels need jax {'.'.join(map(str, GPU_NEEDS_JAX))}, found {jax.__version__}"
        )
    return None


def _refuse_gpu(chip: Chip | None, q_TKGH: Any, pool: Pool) -> str | None:
    if refused := gpu_refusal(chip):
        return refused
    assert chip is not None
    from jaxinfer.kernels.gpu import Gpu
    from jaxinfer.kernels.paged_attention_gpu import why_not

    return why_not(Gpu.of(chip), q_TKGH, pool)


def _make_gpu(chip: Chip, why: str) -> PageOps:
    from jaxinfer.kernels.gpu import Gpu
    from jaxinfer.kernels.paged_attention_gpu import paged_attention

    # XLA's own scatter writes a few slots in place, at no more than their bytes.
    return PageOps(
        "mosaic_gpu",
        partial(paged_attention, gpu=Gpu.of(chip), chip=chip.name),
        REFERENCE.write_pages,
        why,
    )


# Of each backend with kernels: why it cannot serve (None if it can), and its operations.
_KERNELS: dict[str, tuple[Callable[..., str | None], Callable[[Chip, str], PageOps]]] = {
    "mosaic_tpu": (_refuse_tpu, _make_tpu),
    "mosaic_gpu": (_refuse_gpu, _make_gpu),
}
