"""Attention over pages on the GPU at hand: right for every case, and how fast a loop of it is.

    python -m tests.kernels.attention_on_gpu          # both
    python -m tests.kernels.attention_on_gpu --check  # only whether it is right

Prints a line for each case; the exit code counts those that failed.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxinfer.configs import Chip, find_chip
from jaxinfer.kernels import cases, timing, workloads
from jaxinfer.kernels import paged_attention_gpu as attention
from jaxinfer.kernels.gpu import Gpu
from tests.kernels.ragged import Batch

SCALE = 0.2
CLOSE = 2e-2  # as under the interpreter
GROUP8 = dict(K=8, G=8, H=128, S=64)
# Contexts of several parts, the last one of few slots.
PLAIN = cases.Case(((1, 700), (1, 2), (1, 2600), (9, 1100)), K=2, G=4, H=128, S=64)
PARTED = {
    f"parted, {stored}, {window}": replace(PLAIN, stored=stored, window=window)
    for stored in ("bfloat16", "float8_e4m3fn", "int8", "uint8")
    for window in (None, 1500)
}
# 256 MiB of keys and values and more, by few rows and by many.
LONG = {
    "8x8x128, 128 x 512": cases.Case(((1, 512),) * 128, **GROUP8),
    "8x8x128, 64 x 1k": cases.Case(((1, 1024),) * 64, **GROUP8),
    "8x8x128, 16 x 8k": cases.Case(((1, 8192),) * 16, **GROUP8),
    "8x8x128, 4 x 32k": cases.Case(((1, 32768),) * 4, **GROUP8),
    "8x8x128, 1 x 128k": cases.Case(((1, 131072),), **GROUP8),
}
# As many bytes by pages of half the size.
TWICE = {
    "8x8x128, 128 x 1k": cases.Case(((1, 1024),) * 128, **GROUP8),
    "8x8x128, 16 x 8k": LONG["8x8x128, 16 x 8k"],
    "8x8x128, 8 x 32k": cases.Case(((1, 32768),) * 8, **GROUP8),
    "8x8x128, 1 x 128k": LONG["8x8x128, 1 x 128k"],
}
TIMED = LONG | {
    f"{name}, {stored}": replace(case, stored=stored)
    for stored in ("float8_e4m3fn", "int8", "uint8")
    for name, case in TWICE.items()
}
TIMED |= {
    name: cases.REAL[name]
    for name in (
        "llama-3.1-8b, decode 64 x 1k",
        "gpt-oss-20b, decode 64 x 1k",
        "llama-3.1-8b, prefill 2048",
        "llama-3.1-8b, prefill 2048, float8_e4m3fn",
        "llama-3.1-8b, mixed 32 x 1k + 1024",
    )
}
TIMED |= {"llama-3.1-8b, prefill 8192": cases.Case(((8192, 8192),), K=8, G=4, H=128, S=64)}


def failures(gpu: Gpu) -> int:
    """How many of the small cases come out wrong, or change from one run to the next, or with the
    rows beside a row."""
    wrong = 0
    for name, case in (cases.SMALL | PARTED).items():
        q_TKGH, pool, _ = cases.abstract(case)
        if attention.why_not(gpu, q_TKGH, pool) is None:
            wrong += not _good(gpu, name, case)
    return wrong


def _good(gpu: Gpu, name: str, case: cases.Case) -> bool:
    batch = Batch.of(case, SCALE)
    options: dict[str, Any] = dict(window=case.window, soft_cap=case.soft_cap)
    kernel = jax.jit(partial(attention.paged_attention, gpu=gpu, scale=SCALE, **options))

    def run(q, rows):
        return np.asarray(kernel(q, batch.after, rows, sinks_KG=batch.sinks), np.float64)

    runs = [run(batch.q, batch.rows) for _ in range(3)]
    try:
        np.testing.assert_allclose(runs[0][: case.num_tokens], batch.want, rtol=CLOSE, atol=CLOSE)
        assert np.isfinite(runs[0]).all(), "padding is not finite"
        assert all((one == runs[0]).all() for one in runs), "the runs differ"
        for row in range(int(batch.rows.num_rows)):
            alone, span = run(*batch.alone(row)), batch.span(row)
            same = alone[: span.stop - span.start] == runs[0][span]
            assert same.all(), f"row {row} is another alone"
        said = "good"
    except AssertionError as error:
        said = f"WRONG: {error}"
    print(name, said, flush=True)
    return said == "good"


def microseconds(chip: Chip, case: cases.Case, **tilings: Any) -> float:
    """Of one call among many of a step, in microseconds: what all layers share is done once."""
    op = "paged_attention"
    call = workloads.implementation(op, case, "mosaic_gpu", chip, tilings)
    program = workloads.in_one_program(op, case, call, [workloads.arguments(op, case)])
    return workloads.seconds_of_one(program) * 1e6


def report(chip: Chip) -> None:
    """Time, and its share of what copying the bytes or multiplying takes, of each case."""
    ceilings = timing.ceilings("gpu")
    print(jax.devices()[0].device_kind, ceilings, flush=True)
    for name, case in TIMED.items():
        num_bytes, flops = workloads.work("paged_attention", case)
        floor = ceilings.floor(num_bytes, flops) * 1e6
        taken = microseconds(chip, case)
        print(f"{name:48} {taken:9.1f} us, {floor / taken:6.1%} of {floor:.1f} us", flush=True)


if __name__ == "__main__":
    chip = find_chip(jax.devices()[0].device_kind)
    if chip is None or chip.gpu is None:
        sys.exit(f"no sheet in configs/hardware is of a {jax.devices()[0].device_kind}")
    found = failures(Gpu.of(chip))
    if "--check" not in sys.argv:
        report(chip)
    sys.exit(min(found, 100))
