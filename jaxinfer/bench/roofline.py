"""What a run had to read and compute at least (`jaxinfer.work`) beside what the device can: MBU and
MFU."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxinfer.configs import find_chip
from jaxinfer.work import Work

READ_BYTES = 2**28


@dataclass(frozen=True)
class Peaks:
    """One device's limits.  flops is None where nothing is known about it; sources are words."""

    bytes_per_second: float
    bytes_source: str
    flops: float | None
    flops_source: str


def peaks(device: Any, dtype: str) -> Peaks:
    """A device's limits: from its fact sheet, or else measured now."""
    chip = find_chip(device.device_kind)
    if chip is None:
        return Peaks(
            read_bandwidth(device, READ_BYTES),
            f"a vector times {READ_BYTES >> 20} MiB, measured in this run",
            None,
            f"no peak is known for {device.device_kind!r}",
        )
    flops = chip.flops.get(dtype)
    return Peaks(
        chip.bytes_per_second / chip.devices_per_chip,
        f"configs/hardware/{chip.name}.yaml",
        None if flops is None else flops / chip.devices_per_chip,
        f"configs/hardware/{chip.name}.yaml, {dtype}",
    )


def read_bandwidth(device: Any, size: int, rounds: int = 5) -> float:
    """Bytes per second of the fastest of several products of a matrix of `size` bytes and a vector,
    which is what decoding one token does with a weight.

    A run whose weights or pages stay in a cache of the processor can exceed it.
    """
    import jax

    matrix = jax.device_put(np.ones((size // 2**14, 2**12), np.float32), device)
    product = jax.jit(lambda matrix: matrix @ matrix[0])
    product(matrix).block_until_ready()
    fastest = math.inf
    for _ in range(rounds):
        started = time.perf_counter()
        product(matrix).block_until_ready()
        fastest = min(fastest, time.perf_counter() - started)
    return matrix.nbytes / fastest


def utilisation(work: Work, seconds: float, limits: Peaks) -> dict[str, Any]:
    """MBU and MFU over the whole run, arrivals' pauses included."""
    return {
        "mbu": work.bytes / seconds / limits.bytes_per_second,
        "achieved_bytes_per_s": work.bytes / seconds,
        "peak_bytes_per_s": limits.bytes_per_second,
        "peak_bytes_source": limits.bytes_source,
        "mfu": None if limits.flops is None else work.flops / seconds / limits.flops,
        "achieved_flops_per_s": work.flops / seconds,
        "peak_flops_per_s": limits.flops,
        "peak_flops_source": limits.flops_source,
    }
