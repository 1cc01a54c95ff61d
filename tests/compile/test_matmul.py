"""Products of quantised weights and groups, compiled for chips that are not here."""

import math
from dataclasses import replace
from functools import partial

import jax
import pytest
from jax.experimental.layout import Format
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from jaxinfer.aot import compile_for
from jaxinfer.aot import target as targets
from jaxinfer.configs import load_chip
from jaxinfer.kernels import cases, grouped_matmul_gpu, grouped_matmul_tpu, workloads
from jaxinfer.kernels.gpu import Gpu
from jaxinfer.kernels.quantized import FORMATS, Quantized, bytes_of, values_layout
from jaxinfer.kernels.quantized_matmul import as_one_group, quantized_matmul
from tests.kernels.products_on_gpu import LAYERS, feed_forward
from tests.marks import NEEDS_MOSAIC_GPU

pytestmark = pytest.mark.compile

VMEM = {"v5e:1": 100 * 2**20, "v6e:1": 100 * 2**20, "v5p:1": 90 * 2**20, "tpu7x:1": 60 * 2**20}
H100, H200, B200 = (
    pytest.param(name, marks=NEEDS_MOSAIC_GPU) for name in ("h100:1", "h200:1", "b200:1")
)
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


PLACE = NamedSharding(AbstractMesh((1,), ("x",)), PartitionSpec())


def arguments(case, target):
    """Abstract tokens, weight (in memory as it is to lie there), and (of groups) sizes."""
    x, weight, *sizes = (
        jax.tree.map(lambda leaf: leaf.update(sharding=PLACE), argument)
        for argument in cases.abstract_product(case)
        if argument is not None
    )
    if isinstance(weight, Quantized):
        layout = values_layout(weight, "tpu" if target in VMEM else "gpu")
        values = weight.values.update(sharding=Format(layout, PLACE))
        weight = replace(weight, values=values)
    return [x, weight, *sizes]


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
    report = compile_for(target, quantized_matmul, *arguments(case, target))
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
    report = compile_for(target, quantized_matmul, *arguments(case, target))
    assert report.hbm_bytes > 2 * stored_bytes(case)
    if target not in VMEM:
        assert report.products == ("bf16 x bf16 -> f32",)
    report = compile_for(
        target, partial(as_one_group, kernel_for(target)), *arguments(case, target)
    )
    assert report.kernels
    assert report.memory.temporaries < stored_bytes(case) / 4
    assert report.hbm_bytes < once(case)
    assert not report.warnings


@pytest.mark.parametrize("name", [None, *FORMATS])
@pytest.mark.parametrize("target", [*VMEM, H100, H200, B200])
def test_grouped(name, target, kernel_ran):
    kernel_ran("grouped_matmul", backend(target), name or "bfloat16", chip(target))
    given = arguments(
        cases.REAL_PRODUCTS[f"qwen3-30b-a3b/8, decode 64, {name or 'bfloat16'}"], target
    )
    report = compile_for(target, kernel_for(target), *given)
    assert len(report.kernels) == 1
    assert not report.copies_of(jax.tree.leaves(given[1])[0])  # scales are small, and may be
    assert not report.warnings


@pytest.mark.parametrize("name", [None, *FORMATS])
@pytest.mark.parametrize("target", [H200, B200])
def test_large_tiles_stay_in_registers(name, target):
    given = arguments(
        cases.REAL_PRODUCTS[f"mixtral-8x7b, prefill 2048, {name or 'bfloat16'}"], target
    )
    report = compile_for(target, kernel_for(target), *given)
    assert len(report.kernels) == 1
    assert not report.copies_of(jax.tree.leaves(given[1])[0])  # scales are small, and may be
    assert not report.warnings


@NEEDS_MOSAIC_GPU
def test_spilled_registers_are_seen():
    """Sums that take all registers of a thread."""
    given = arguments(cases.Product((128,), 512, 512, "w4a16"), "h200:1")
    blocks = grouped_matmul_gpu.Blocks(128, 256, 2, 1)
    report = compile_for("h200:1", kernel_for("h200:1", blocks=blocks), *given)
    assert any("spilled" in line for line in report.warnings)


def layer(tokens, weights):
    """The products of a layer, each of its own tokens."""
    return [quantized_matmul(x, weight) for x, weight in zip(tokens, weights, strict=True)]


# There is nothing to time without a device: which of the two it is must be said.
LIBRARY, TRITON = ({"xla_gpu_enable_triton_gemm": triton} for triton in (False, True))


@pytest.mark.parametrize("step", ["decode 64", "prefill 4096"])
@pytest.mark.parametrize(
    ("name", "library", "factors"),
    [
        ("fp8", "__cublas$lt$matmul$f8", "f8e4m3fn x f8e4m3fn"),
        ("int8", "__cublas$lt$matmul", "s8 x s8"),
    ],
)
@pytest.mark.parametrize("target", ["h100:1", "h200:1", "b200:1"])
def test_8_bit_products_take_weights_as_they_lie(name, library, factors, target, step):
    """By cuBLASLt and by Triton, whichever is faster in the end."""
    given = [
        arguments(cases.REAL_PRODUCTS[f"llama-3.1-8b {one}, {step}, {name}"], target)
        for one in cases.LAYER
    ]
    tokens, weights = zip(*given, strict=True)
    report = compile_for(target, layer, tokens, weights, options=LIBRARY)
    assert report.custom_calls == {library: len(cases.LAYER)}
    assert not report.copies
    report = compile_for(target, layer, tokens, weights, options=TRITON)
    assert not report.custom_calls
    assert {one.partition(" -> ")[0] for one in report.products} == {factors}
    assert not report.copies


@pytest.mark.parametrize("name", ["int8", "fp8_block"])
@pytest.mark.parametrize("target", ["v6e:1", "h200:1"])
def test_calls_that_are_timed_together_stay_calls(target, name):
    """XLA would multiply with a weight once, for all calls that have it, and convert it once."""
    case = dense(name)
    x, weight = arguments(case, target)
    reports = [
        compile_for(
            target, partial(workloads.calls, "quantized_matmul", quantized_matmul),
            [x] * calls, [(weight,)], options=None if target in VMEM else LIBRARY,
        )
        for calls in (1, 4)
    ]  # fmt: skip
    one, four = (report.hbm_bytes for report in reports)
    assert four > 3.9 * one
    if target not in VMEM:
        assert reports[1].custom_calls == {"__cublas$lt$matmul": 4}


@pytest.mark.parametrize("target", ["h100:1", "h200:1"])
def test_scales_and_quantising_are_fused_with_what_is_beside_them(target):
    """Beside products, a layer of the feed-forward reads the sums of gate and up twice (the largest
    of a token is known only in the end), and little else more than once."""
    x, gate_up = arguments(cases.REAL_PRODUCTS["llama-3.1-8b gate_up, prefill 4096, fp8"], target)
    hidden, down = arguments(cases.REAL_PRODUCTS["llama-3.1-8b down, prefill 4096, fp8"], target)
    chain = partial(feed_forward, quantized_matmul)
    report = compile_for(target, chain, x, gate_up, down, options=LIBRARY)
    assert report.custom_calls == {"__cublas$lt$matmul$f8": 2 * LAYERS}
    weights = math.prod(gate_up.shape) + math.prod(down.shape)
    width, sums = x.size, 2 * 2 * hidden.size  # bytes: of what is fp8, and of gate and up
    products = weights + width + sums + hidden.size + 2 * width
    # Two times with the layer's input, for the scales of its tokens.
    beside = 3 * width + 2 * (sums + 2 * width) + hidden.size + 6 * width
    assert report.hbm_bytes < 1.02 * LAYERS * (products + beside)


@pytest.mark.parametrize(
    ("name", "library"), [("fp8", "__cublas$lt$matmul$f8"), ("int8", "__cublas$lt$matmul")]
)
@pytest.mark.parametrize(
    ("target", "tokens", "workspace"),  # of the library, counted as if all of it were written
    [
        pytest.param("h200:1", 512, 2**22, marks=NEEDS_MOSAIC_GPU),
        pytest.param("b200:1", 4096, 0, marks=NEEDS_MOSAIC_GPU),
    ],
)
def test_a_kernel_quantises_activations_once(target, tokens, workspace, name, library, kernel_ran):
    """A kernel, a product and a fusion for the scales: every array is written and read once."""
    kernel_ran("quantized_matmul", "mosaic_gpu", name, chip(target))
    from jaxinfer.kernels.quantized_matmul_gpu import quantized_matmul

    case = replace(cases.REAL_PRODUCTS[f"llama-3.1-8b qkv, prefill 4096, {name}"], groups=(tokens,))
    product = partial(quantized_matmul, gpu=GPUS[target])
    report = compile_for(target, product, *arguments(case, target), options=LIBRARY)
    assert sum(report.kernels.values()) == 1
    assert report.custom_calls == {library: 1}
    assert not report.copies
    assert not report.warnings
    sums = (2 if name == "fp8" else 4) * case.num_tokens * case.F
    values, out = case.num_tokens * case.D, 2 * case.num_tokens * case.F
    least = 2 * values + 2 * values + case.D * case.F + 2 * sums + out
    assert report.hbm_bytes < 1.03 * least + workspace


@pytest.mark.parametrize("one", cases.LAYER)
@pytest.mark.parametrize("name", ["fp8", "int8"])
@pytest.mark.parametrize("target", [H100, H200])
def test_sums_of_many_tokens_stay_on_the_chip(target, name, one, kernel_ran):
    """Two kernels: one quantises, one multiplies and scales."""
    kernel_ran("quantized_matmul", "mosaic_gpu", name, chip(target))
    from jaxinfer.kernels.quantized_matmul_gpu import quantized_matmul

    case = cases.REAL_PRODUCTS[f"llama-3.1-8b {one}, prefill 4096, {name}"]
    product = partial(quantized_matmul, gpu=GPUS[target])
    report = compile_for(target, product, *arguments(case, target), options=LIBRARY)
    assert sum(report.kernels.values()) == 2
    assert not report.custom_calls
    assert not report.copies
    assert not report.warnings
    values, out = case.num_tokens * case.D, 2 * case.num_tokens * case.F
    assert report.hbm_bytes < 1.03 * (2 * values + 2 * values + case.D * case.F + out)


@pytest.mark.parametrize(
    ("name", "width"), [("fp8", 8192), ("fp8", 18944), ("int8", 14336), ("int8", 18432)]
)
@pytest.mark.parametrize("target", [H100, H200, B200])
def test_numbers_of_a_token_stay_in_registers(width, name, target):
    from jaxinfer.kernels import quantize_gpu

    x_TD, sums_TWF, scale_T1, scale_WF = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((65, width), "bfloat16"), ((65, 2, width), "bfloat16" if name == "fp8" else "int32"),
            ((65, 1), "float32"), ((2, width), "float32"),
        )
    )  # fmt: skip
    gated = partial(quantize_gpu.gated_quantize, activation="silu", name=name)
    plain = partial(quantize_gpu.quantize_activations, name=name)
    for kernel, given in ((plain, (x_TD,)), (gated, (sums_TWF, scale_T1, scale_WF))):
        assert quantize_gpu.refusal(given[0], name, GPUS[target]) is None
        report = compile_for(target, kernel, *given)
        assert sum(report.kernels.values()) == 1
        assert not report.warnings
