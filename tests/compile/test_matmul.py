"""Products of quantised weights and groups, compiled for chips that are not here."""

from functools import partial

import jax
import pytest

from jaxinfer.aot import compile_for
from jaxinfer.aot import target as targets
from jaxinfer.configs import load_chip
from jaxinfer.kernels import cases, grouped_matmul_gpu, grouped_matmul_tpu
from jaxinfer.kernels.gpu import Gpu
from jaxinfer.kernels.quantized import FORMATS, Quantized, bytes_of
from jaxinfer.kernels.quantized_matmul import as_one_group, quantized_matmul

pytestmark = pytest.mark.compile

VMEM = {"v5e:1": 100 * 2**20, "v6e:1": 100 * 2**20, "v5p:1": 90 * 2**20, "tpu7x:1": 60 * 2**20}
NEWER = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="GPU kernels need JAX 0.11")
H100, H200, B200 = (pytest.param(name, marks=NEWER) for name in ("h100:1", "h200:1", "b200:1"))
GPUS = {f"{name}:1": Gpu.of(load_chip(name)) for name in ("h100", "h200", "b200")}


def kernel_for(target, **options):
    """The kernel of grouped products with the facts of a chip."""
    if target in VMEM:
        return partial(grouped_matmul_tpu.grouped_matmul, vmem_bytes=VMEM[target])
    return partial(grouped_matmul_gpu.grouped_matmul, gpu=GPUS[target], **options)


def chip(target):
    return targets.parse(target).chip.name


def backend(target):
    return "mosaic_tpu" if target in VMEM else "mosaic_gpu"


def dense(name):
    """In bfloat16 its weight is more than fits any chip's fast memory: it cannot hide there."""
    return cases.REAL_PRODUCTS[f"llama-3.1-70b/4, decode 64, {name}"]


def arguments(case):
    """Abstract tokens, weight, and (of groups) sizes."""
    return [leaf for leaf in cases.abstract_product(case) if leaf is not None]


def stored_bytes(case):
    return bytes_of(case.format, (case.D, case.F))


def once(case):
    """Bytes of a weight that is read once, and something for the activations and the sums."""
    return 1.3 * stored_bytes(case)


@pytest.mark.parametrize(
    ("name", "product"),
    [
        ("fp8", "f8e4m3fn x f8e4m3fn -> f32"),
        ("int8", "s8 x s8 -> s32"),
        ("w8a16", "bf16 x bf16 -> f32"),
    ],
)
@pytest.mark.parametrize("target", [*VMEM, "h100:1", "h200:1", "b200:1"])
def test_a_scale_for_all_of_d_needs_no_kernel(name, product, target):
    case = dense(name)
    report = compile_for(target, quantized_matmul, *arguments(case))
    assert report.memory.temporaries < stored_bytes(case) / 2
    assert report.hbm_bytes < once(case)
    assert not report.kernels
    if target not in VMEM:
        assert report.products == (product,)


@pytest.mark.parametrize("name", [n for n in FORMATS if FORMATS[n].rows])
@pytest.mark.parametrize("target", [*VMEM, H100, H200, B200])
def test_a_scale_for_some_of_d_does(name, target, kernel_ran):
    """The reference writes the weight out and reads it again.  If this fails, XLA has learnt it."""
    kernel_ran("quantized_matmul", backend(target), name, chip(target))
    case = dense(name)
    report = compile_for(target, quantized_matmul, *arguments(case))
    assert report.hbm_bytes > 2 * stored_bytes(case)
    if target not in VMEM:
        assert report.products == ("bf16 x bf16 -> f32",)
    report = compile_for(target, partial(as_one_group, kernel_for(target)), *arguments(case))
    assert report.kernels
    assert report.memory.temporaries < stored_bytes(case) / 4
    assert report.hbm_bytes < once(case)
    assert not report.warnings


@pytest.mark.parametrize("name", [None, *FORMATS])
@pytest.mark.parametrize("target", [*VMEM, H100, H200, B200])
def test_grouped(name, target, kernel_ran):
    kernel_ran("grouped_matmul", backend(target), name or "bfloat16", chip(target))
    given = arguments(cases.REAL_PRODUCTS[f"qwen3-30b-a3b/8, decode 64, {name or 'bfloat16'}"])
    report = compile_for(target, kernel_for(target), *given)
    assert len(report.kernels) == 1
    assert not report.copies_of(jax.tree.leaves(given[1])[0])  # scales are small, and may be
    assert not report.warnings


@pytest.mark.parametrize("name", [None, *FORMATS])
@pytest.mark.parametrize("target", [H200, B200])
def test_large_tiles_stay_in_registers(name, target):
    given = arguments(cases.REAL_PRODUCTS[f"mixtral-8x7b, prefill 2048, {name or 'bfloat16'}"])
    report = compile_for(target, kernel_for(target), *given)
    assert len(report.kernels) == 1
    assert not report.copies_of(jax.tree.leaves(given[1])[0])  # scales are small, and may be
    assert not report.warnings


@NEWER
def test_spilled_registers_are_seen():
    """Sums that take all registers of a thread."""
    given = arguments(cases.Product((128,), 512, 512, "w4a16"))
    blocks = grouped_matmul_gpu.Blocks(128, 256, 2, 1)
    report = compile_for("h200:1", kernel_for("h200:1", blocks=blocks), *given)
    assert any("spilled" in line for line in report.warnings)


def d_innermost(x, values_EFD, scales, sizes_E, *, name, gpu):
    weight = Quantized(values_EFD.swapaxes(1, 2), scales, None, name)
    return grouped_matmul_gpu.grouped_matmul(x, weight, sizes_E, gpu=gpu, depth_minor=True)


@pytest.mark.parametrize("step", cases.STEP_TOKENS)
@pytest.mark.parametrize("name", ["fp8", "int8"])
@pytest.mark.parametrize("target", [H200, B200])
def test_weights_with_d_innermost_are_not_moved(name, target, step):
    case = cases.REAL_PRODUCTS[f"qwen3-30b-a3b/8, {step}, {name}"]
    x, weight, sizes = arguments(case)
    values = jax.ShapeDtypeStruct((16, case.F, case.D), weight.values.dtype)
    kernel = partial(d_innermost, name=name, gpu=GPUS[target])
    report = compile_for(target, kernel, x, values, weight.scales, sizes)
    assert len(report.kernels) == 1
    assert not report.copies_of(values)
    assert not report.warnings
