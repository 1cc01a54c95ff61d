"""Products of quantised weights and groups, compiled for chips that are not here."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from jaxinfer.aot import compile_for
from jaxinfer.kernels import (
    grouped_matmul_gpu,
    grouped_matmul_tpu,
    quantized_matmul_gpu,
    quantized_matmul_tpu,
)
from jaxinfer.kernels.quantized import FORMATS, bytes_of, quantize
from jaxinfer.kernels.quantized_matmul import quantized_matmul

pytestmark = pytest.mark.compile

HOPPER = {"num_sms": 132, "shared_bytes": 227 * 1024}
VMEM = {"v5e:1": 100 * 2**20, "v6e:1": 100 * 2**20, "v5p:1": 90 * 2**20, "tpu7x:1": 60 * 2**20}
# In bfloat16 it is more than fits any chip's fast memory, so that it cannot hide there.
DEPTH, WIDTH, TOKENS = 8192, 16384, 64
NEWER = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="GPU kernels need JAX 0.11")
H100, H200 = (pytest.param(name, marks=NEWER) for name in ("h100:1", "h200:1"))


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


@pytest.mark.parametrize("name", [n for n in FORMATS if not FORMATS[n].rows])
@pytest.mark.parametrize("target", ["v5e:1", "v6e:1", "tpu7x:1", "h200:1", "b200:1"])
def test_a_scale_for_all_of_d_needs_no_kernel(name, target):
    report = compile_for(target, quantized_matmul, *arguments(name))
    assert report.memory.temporaries < bytes_of(name, (DEPTH, WIDTH)) / 2
    assert report.hbm_bytes < once(name, (DEPTH, WIDTH))
    assert not report.kernels


@pytest.mark.parametrize("name", [n for n in FORMATS if FORMATS[n].rows])
@pytest.mark.parametrize("target", ["v6e:1", H200])
def test_a_scale_for_some_of_d_does(name, target):
    """The reference writes the weight out and reads it again.  If this fails, XLA has learnt it."""
    report = compile_for(target, quantized_matmul, *arguments(name))
    assert report.hbm_bytes > 2 * bytes_of(name, (DEPTH, WIDTH))
    kernel, options = (
        (quantized_matmul_gpu.quantized_matmul, HOPPER)
        if target == "h200:1"
        else (quantized_matmul_tpu.quantized_matmul, {"vmem_bytes": VMEM[target]})
    )
    report = compile_for(target, partial(kernel, **options), *arguments(name))
    assert report.kernels
    assert report.memory.temporaries < bytes_of(name, (DEPTH, WIDTH)) / 4
    assert report.hbm_bytes < once(name, (DEPTH, WIDTH))
    assert not report.warnings


@pytest.mark.parametrize("name", [None, *FORMATS])
@pytest.mark.parametrize("target", [*VMEM, H100, H200])
def test_grouped(name, target):
    kernel, options = (
        (grouped_matmul_tpu.grouped_matmul, {"vmem_bytes": VMEM[target]})
        if target in VMEM
        else (grouped_matmul_gpu.grouped_matmul, HOPPER)
    )
    given = arguments(name, experts=16, depth=2048, width=768, tokens=128)
    report = compile_for(target, partial(kernel, **options), *given)
    assert len(report.kernels) == 1
    assert not report.copies_of(*jax.tree.leaves(given[1]))
    assert not report.warnings
