"""Time on a device: how long a call takes, what the device can do at most, and what it is.

Compilation is never in a time: the first call is not timed.
"""

from __future__ import annotations

import math
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.configs import Chip

# Calls of one timing take about this long together, and no more than so many are queued at once.
SECONDS, MOST_CALLS, ROUNDS = 0.25, 200, 5
# A cache that is not known holds this much; what is read in turns is so many times larger.
CACHE_BYTES, CACHE_TIMES, MOST_COPIES = 2**25, 4, 8


def seconds_per_call(
    call: Callable[[int], Any],
    *,
    seconds: float | None = None,
    block: Callable[[Any], Any] = jax.block_until_ready,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Median over `ROUNDS` of the time that one of many calls takes.

    call: is given a number that grows by one with each call, and dispatches.  All calls of a round
    are dispatched before the last one's result is awaited, so that the host's time is hidden
    wherever a call takes longer on the device.  seconds: for all rounds together (None: `SECONDS`);
    three calls take what they take.
    """
    seconds = SECONDS if seconds is None else seconds
    block(call(0))
    started = clock()
    block(call(1))
    once = max(clock() - started, 1e-9)
    calls = max(1, min(int(seconds / ROUNDS / once), MOST_CALLS))
    rounds = ROUNDS if ROUNDS * once <= seconds else 3
    times, number = [], 2
    for _ in range(rounds):
        started = clock()
        result = None
        for _ in range(calls):
            result = call(number)
            number += 1
        block(result)
        times.append((clock() - started) / calls)
    return statistics.median(times)


def copies_needed(num_bytes: int, chip: Chip | None) -> int:
    """How many sets of arrays must take turns so that none is still in a cache of the chip."""
    cache = chip.gpu.l2_bytes if chip is not None and chip.gpu is not None else CACHE_BYTES
    return max(1, min(math.ceil(CACHE_TIMES * cache / max(num_bytes, 1)), MOST_COPIES))


# -- what the device can do -------------------------------------------------------------------


@dataclass(frozen=True)
class Ceilings:
    """Measured limits of a device.

    bytes_per_second: of a copy, read plus written.  flops_per_second: of a large square product in
    `dtype`.  dispatch_seconds: of a call that computes next to nothing: a shorter time than this
    is the host's.
    """

    bytes_per_second: float
    copy_bytes: int
    flops_per_second: float
    dtype: str
    matrix: int
    dispatch_seconds: float

    def floor(self, num_bytes: int, flops: int) -> float:
        """Seconds that no implementation can do without, if these are the limits."""
        return max(num_bytes / self.bytes_per_second, flops / self.flops_per_second)


def ceilings(platform: str, *, copy_bytes: int = 0, matrix: int = 0) -> Ceilings:
    """Measure the default device; sizes by platform unless given."""
    accelerator = platform != "cpu"
    copy_bytes = copy_bytes or (2**30 if accelerator else 2**27)
    matrix = matrix or (8192 if accelerator else 1024)
    dtype = jnp.bfloat16 if accelerator else jnp.float32
    source = jnp.zeros(copy_bytes // 4, jnp.float32)
    copy = jax.jit(lambda array: array + jnp.float32(1))
    copying = seconds_per_call(lambda _: copy(source))
    left, right = (
        jax.random.normal(jax.random.key(seed), (matrix, matrix), dtype) for seed in (0, 1)
    )
    multiply = jax.jit(jnp.dot)
    multiplying = seconds_per_call(lambda _: multiply(left, right))
    little = jnp.zeros(8, jnp.float32)
    dispatching = seconds_per_call(lambda _: copy(little))
    return Ceilings(
        bytes_per_second=2 * copy_bytes / copying,
        copy_bytes=copy_bytes,
        flops_per_second=2 * matrix**3 / multiplying,
        dtype=np.dtype(dtype).name,
        matrix=matrix,
        dispatch_seconds=dispatching,
    )


# -- what the device is -----------------------------------------------------------------------


def versions() -> dict[str, str | None]:
    """What a time depends on beside the chip: jax, jaxlib, the driver, libtpu or CUDA plugin."""
    return {
        "jax": jax.__version__,
        "jaxlib": _version("jaxlib"),
        "driver": driver(),
        "plugin": _version("libtpu") or _version("jax-cuda13-plugin"),
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def driver(proc: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """The version of NVIDIA's driver, None if there is none."""
    if proc.exists():
        found = re.search(r"Kernel Module.*?(\d+\.\d[\d.]*)", proc.read_text())
        if found:
            return found[1]
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    words = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, text=True, capture_output=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split("\n")[0].strip() or None if done.returncode == 0 else None
