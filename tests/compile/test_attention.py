"""Attention over pages, compiled for GPUs that are not here: nothing may leave the registers."""

from functools import partial

import pytest

from jaxinfer.aot import compile_for
from jaxinfer.configs import load_chip
from jaxinfer.kernels import cases
from jaxinfer.kernels import paged_attention_gpu as attention
from jaxinfer.kernels.gpu import Gpu
from jaxinfer.kernels.write_pages import LARGEST
from tests.marks import NEEDS_MOSAIC_GPU

pytestmark = [pytest.mark.compile, NEEDS_MOSAIC_GPU]
GPUS = ("h100", "h200", "b200")
# Both kernels, and of heads as wide, as narrow and as many as models have.
CASES = (
    *(f"llama-3.1-8b, mixed 32 x 1k + 1024, {stored}" for stored in LARGEST),
    *(
        f"{model}, mixed 32 x 1k + 1024"
        for model in ("llama-3.1-8b", "llama-3.2-1b", "phi-3-mini", "gemma-2-9b", "gpt-oss-20b")
    ),
)
# A number that each tile of a prompt needs before its loop, on Hopper over quantised pages.
OUTSIDE_THE_LOOP = "', 4 bytes spill stores, 4 bytes spill loads"


def report_of(name: str, chip: str):
    case = cases.REAL[name]
    q_TKGH, pool, rows = cases.abstract(case)
    gpu = Gpu.of(load_chip(chip))
    if reason := attention.why_not(gpu, q_TKGH, pool):
        pytest.skip(reason)
    kernel = partial(
        attention.paged_attention, gpu=gpu, scale=0.1, window=case.window, soft_cap=case.soft_cap
    )
    return compile_for(f"{chip}:1", kernel, q_TKGH, pool, rows)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chip", GPUS)
def test_nothing_spills_in_a_loop(name, chip, kernel_ran):
    kernel_ran("paged_attention", "mosaic_gpu", cases.REAL[name].stored, chip)
    report = report_of(name, chip)
    assert report.kernels
    quantized = cases.REAL[name].stored in LARGEST
    allowed = [OUTSIDE_THE_LOOP] if quantized and chip in ("h100", "h200") else []
    spills = [line for line in report.warnings if not any(one in line for one in allowed)]
    assert spills == []
