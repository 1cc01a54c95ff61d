"""Products of quantised weights and groups, compiled for chips that are not here."""

from functools import partial

import jax
import pytest

from jaxinfer.aot import compile_for
from jaxinfer.aot import target as targets
from jaxinfer.kernels import (
    cases,
    grouped_matmul_gpu,
    grouped_matmul_tpu,
    quantized_matmul_gpu,
    quantized_matmul_tpu,
)
from jaxinfer.kernels.quantized import FORMATS, bytes_of
from jaxinfer.kernels.quantized_matmul import quantized_matmul

pytestmark = pytest.mark.compile

HOPPER = {"num_sms": 132, "shared_bytes": 227 * 1024}
VMEM = {"v5e:1": 100 * 2**20, "v6e:1": 100 * 2**20, "v5p:1": 90 * 2**20, "tpu7x:1": 60 * 2**20}
NEWER = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="GPU kernels need JAX 0.11")
H100, H200 = (pytest.param(name, marks=NEWER) for name in ("h100:1", "h200:1"))


def dense(name):
    """In bfloat16 its weight is more than fits any chip's fast memory: it cannot hide there."""
    return cases.REAL_PRODUCTS[f"llama-3.1-70b/4, decode 64, {name}"]


def arguments(case):
    """Abstract tokens, weight, and (of groups) sizes."""
    return [leaf for leaf in cases.abstract_product(case) if leaf is not None]


def stored_bytes(case):
    return bytes_of(case.format, (case.D, case.F))


def backend(target):
    return "mosaic_tpu" if target in VMEM else "mosaic_gpu"


def chip(target):
    return targets.parse(target).chip.name


def once(case):
    """Bytes of a weight that is read once, and something for the activations and the sums."""
    return 1.3 * stored_bytes(case)


@pytest.mark.parametrize("name", [n for n in FORMATS if not FORMATS[n].rows])
@pytest.mark.parametrize("target", ["v5e:1", "v6e:1", "tpu7x:1", "h200:1", "b200:1"])
def test_a_scale_for_all_of_d_needs_no_kernel(name, target):
    case = dense(name)
    report = compile_for(target, quantized_matmul, *arguments(case))
    assert report.memory.temporaries < stored_bytes(case) / 2
    assert report.hbm_bytes < once(case)
    assert not report.kernels


@pytest.mark.parametrize("name", [n for n in FORMATS if FORMATS[n].rows])
@pytest.mark.parametrize("target", ["v6e:1", H200])
def test_a_scale_for_some_of_d_does(name, target, kernel_ran):
    """The reference writes the weight out and reads it again.  If this fails, XLA has learnt it."""
    kernel_ran("quantized_matmul", backend(target), name, chip(target))
    case = dense(name)
    report = compile_for(target, quantized_matmul, *arguments(case))
    assert report.hbm_bytes > 2 * stored_bytes(case)
    kernel, options = (
        (quantized_matmul_gpu.quantized_matmul, HOPPER)
        if target == "h200:1"
        else (quantized_matmul_tpu.quantized_matmul, {"vmem_bytes": VMEM[target]})
    )
    report = compile_for(target, partial(kernel, **options), *arguments(case))
    assert report.kernels
    assert report.memory.temporaries < stored_bytes(case) / 4
    assert report.hbm_bytes < once(case)
    assert not report.warnings


@pytest.mark.parametrize("name", [None, *FORMATS])
@pytest.mark.parametrize("target", [*VMEM, H100, H200])
def test_grouped(name, target, kernel_ran):
    kernel_ran("grouped_matmul", backend(target), name or "bfloat16", chip(target))
    kernel, options = (
        (grouped_matmul_tpu.grouped_matmul, {"vmem_bytes": VMEM[target]})
        if target in VMEM
        else (grouped_matmul_gpu.grouped_matmul, HOPPER)
    )
    given = arguments(cases.REAL_PRODUCTS[f"qwen3-30b-a3b/8, decode 64, {name or 'bfloat16'}"])
    report = compile_for(target, partial(kernel, **options), *given)
    assert len(report.kernels) == 1
    assert not report.copies_of(*jax.tree.leaves(given[1]))
    assert not report.warnings
