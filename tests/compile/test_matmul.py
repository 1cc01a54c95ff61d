"""Products of quantised weights and groups, compiled for chips that are not here."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from jaxinfer.aot import compile_for
from jaxinfer.kernels import grouped_matmul_tpu
from jaxinfer.kernels.quantized import FORMATS, Quantized, bytes_of, quantize
from jaxinfer.kernels.quantized_matmul import as_one_group, quantized_matmul

pytestmark = pytest.mark.compile

VMEM = {"v5e:1": 100 * 2**20, "v6e:1": 100 * 2**20, "v5p:1": 90 * 2**20, "tpu7x:1": 60 * 2**20}
# In bfloat16 it is more than fits any chip's fast memory, so that it cannot hide there.
DEPTH, WIDTH, TOKENS = 8192, 16384, 64
GPU_KERNELS = jax.__version_info__ >= (0, 11)
NEWER = pytest.mark.skipif(not GPU_KERNELS, reason="GPU kernels need JAX 0.11")
H100, H200, B200 = (pytest.param(name, marks=NEWER) for name in ("h100:1", "h200:1", "b200:1"))
if GPU_KERNELS:
    from jaxinfer.kernels import grouped_matmul_gpu
    from jaxinfer.kernels.gpu import Gpu

    HOPPER, BLACKWELL = Gpu((9, 0), 132, 232_448), Gpu((10, 0), 148, 232_448)
    GPUS = {"h100:1": HOPPER, "h200:1": HOPPER, "b200:1": BLACKWELL}


def kernel_for(target, **options):
    """The kernel of grouped products with the facts of a chip."""
    if target in VMEM:
        return partial(grouped_matmul_tpu.grouped_matmul, vmem_bytes=VMEM[target])
    return partial(grouped_matmul_gpu.grouped_matmul, gpu=GPUS[target], **options)


def arguments(name, experts=None, depth=DEPTH, width=WIDTH, tokens=TOKENS):
    """Abstract tokens, weight, and (with experts) sizes of groups."""
    x = jax.ShapeDtypeStruct((tokens, depth), jnp.bfloat16)
    shape = (depth, width) if experts is None else (experts, depth, width)
    weight = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    if name is not None:
        weight = jax.eval_shape(partial(quantize, name=name), weight)
    sizes = [] if experts is None else [jax.ShapeDtypeStruct((experts,), jnp.int32)]
    return x, weight, *sizes


def once(name, shape):
    """Bytes of a weight that is read once, and something for the activations and the sums."""
    return 1.3 * bytes_of(name, shape)


@pytest.mark.parametrize(
    ("name", "product"),
    [
        ("fp8", "f8e4m3fn x f8e4m3fn -> f32"),
        ("int8", "s8 x s8 -> s32"),
        ("w8a16", "bf16 x bf16 -> f32"),
    ],
)
@pytest.mark.parametrize("target", ["v5e:1", "v6e:1", "tpu7x:1", "h200:1", "b200:1"])
def test_a_scale_for_all_of_d_needs_no_kernel(name, product, target):
    report = compile_for(target, quantized_matmul, *arguments(name))
    assert report.memory.temporaries < bytes_of(name, (DEPTH, WIDTH)) / 2
    assert report.hbm_bytes < once(name, (DEPTH, WIDTH))
    assert not report.kernels
    if target not in VMEM:
        assert report.products == (product,)


@pytest.mark.parametrize("name", [n for n in FORMATS if FORMATS[n].rows])
@pytest.mark.parametrize("target", ["v6e:1", H200, B200])
def test_a_scale_for_some_of_d_does(name, target):
    """The reference writes the weight out and reads it again.  If this fails, XLA has learnt it."""
    report = compile_for(target, quantized_matmul, *arguments(name))
    assert report.hbm_bytes > 2 * bytes_of(name, (DEPTH, WIDTH))
    if target not in VMEM:
        assert report.products == ("bf16 x bf16 -> f32",)
    report = compile_for(target, partial(as_one_group, kernel_for(target)), *arguments(name))
    assert report.kernels
    assert report.memory.temporaries < bytes_of(name, (DEPTH, WIDTH)) / 4
    assert report.hbm_bytes < once(name, (DEPTH, WIDTH))
    assert not report.warnings


@pytest.mark.parametrize("name", [None, *FORMATS])
@pytest.mark.parametrize("target", [*VMEM, H100, H200, B200])
def test_grouped(name, target):
    given = arguments(name, experts=16, depth=2048, width=768, tokens=128)
    report = compile_for(target, kernel_for(target), *given)
    assert len(report.kernels) == 1
    assert not report.copies_of(*jax.tree.leaves(given[1]))
    assert not report.warnings


@pytest.mark.parametrize("name", [None, *FORMATS])
@pytest.mark.parametrize("target", [H200, B200])
def test_large_tiles_stay_in_registers(name, target):
    given = arguments(name, experts=8, depth=4096, width=14336, tokens=8192)
    report = compile_for(target, kernel_for(target), *given)
    assert len(report.kernels) == 1
    assert not report.copies_of(*jax.tree.leaves(given[1]))
    assert not report.warnings


@NEWER
def test_spilled_registers_are_seen():
    """Sums that take all registers of a thread."""
    given = arguments("w4a16", experts=1, depth=512, width=512, tokens=128)
    blocks = grouped_matmul_gpu.Blocks(128, 256, 2, 1)
    report = compile_for("h200:1", kernel_for("h200:1", blocks=blocks), *given)
    assert any("spilled" in line for line in report.warnings)


def d_innermost(x, values_EFD, scales, sizes_E, *, name, gpu):
    weight = Quantized(values_EFD.swapaxes(1, 2), scales, None, name)
    return grouped_matmul_gpu.grouped_matmul(x, weight, sizes_E, gpu=gpu, depth_minor=True)


@pytest.mark.parametrize("tokens", [128, 8192])
@pytest.mark.parametrize("name", ["fp8", "int8"])
@pytest.mark.parametrize("target", [H200, B200])
def test_weights_with_d_innermost_are_not_moved(name, target, tokens):
    x, weight, sizes = arguments(name, experts=16, depth=2048, width=768, tokens=tokens)
    values = jax.ShapeDtypeStruct((16, 768, 2048), weight.values.dtype)
    kernel = partial(d_innermost, name=name, gpu=GPUS[target])
    report = compile_for(target, kernel, x, values, weight.scales, sizes)
    assert len(report.kernels) == 1
    assert not report.copies_of(values)
    assert not report.warnings
