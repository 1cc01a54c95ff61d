"""The GPU kernel of grouped products, interpreted: values and races, on memory full of NaN."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.errors import ShapeError
from jaxinfer.kernels import cases
from tests.kernels.groups import build, expected

if jax.__version_info__ < (0, 11):
    pytest.skip("JAX has an interpreter for GPU kernels from 0.11 on", allow_module_level=True)

from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxinfer.kernels.grouped_matmul_gpu import Blocks, block_sizes, grouped_matmul, refusal
from jaxinfer.kernels.quantized_matmul_gpu import quantized_matmul

SHARED = 227 * 1024  # H100 and H200
WATCHED = plgpu.InterpretGPUParams(  # pyright: ignore[reportAttributeAccessIssue] (JAX 0.11)
    detect_races=True, uninitialized_memory="nan"
)


STACKS = [name for name, case in cases.SMALL_PRODUCTS.items() if not case.single]


@pytest.mark.parametrize("name", STACKS)
def test_matches_float64(name, kernel_ran):
    case, index = cases.SMALL_PRODUCTS[name], STACKS.index(name)
    # Small ones, so that there are several of each, and not the same for all cases.
    blocks = Blocks(64 << (index % 5 == 0), 64, 2 + index % 2, 1 + index % 2)
    x, weight, sizes = build(case, jnp.bfloat16)
    kernel_ran("grouped_matmul", "mosaic_gpu", case.format or "bfloat16", "interpreted")
    out = grouped_matmul(
        x, weight, sizes, num_sms=2, shared_bytes=SHARED, blocks=blocks, interpret=WATCHED
    )
    jax.block_until_ready(out)
    assert not gpu_callbacks.get_races().races_found
    assert out.dtype == jnp.bfloat16
    want = expected(x, weight, case.groups)
    np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=2**-8, atol=0.2)
    assert not np.asarray(out, np.float64)[case.num_tokens :].any()


@pytest.mark.parametrize("name", ["fp8_block", "w4a16", "nvfp4", "mxfp4"])
def test_a_single_weight(name, kernel_ran):
    kernel_ran("quantized_matmul", "mosaic_gpu", name, "interpreted")
    case = cases.Product((70,), 256, 64, name, single=True)
    x, stack, _ = build(case, jnp.bfloat16)
    x = x[: case.num_tokens]
    weight = jax.tree.map(lambda leaf: leaf[0], stack)
    out = quantized_matmul(x, weight, num_sms=2, shared_bytes=SHARED, interpret=WATCHED)
    want = expected(x, stack, case.groups)
    np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=2**-8, atol=0.2)


@pytest.mark.parametrize("name", cases.REAL_PRODUCTS)
def test_blocks_fit_and_divide(name):
    case = cases.REAL_PRODUCTS[name]
    x, weight, _ = cases.abstract_product(replace(case, single=False))
    assert refusal(x, weight, (9, 0)) is None
    blocks = block_sizes(x, weight, shared_bytes=SHARED)
    assert case.F % blocks.width == 0
    assert blocks.tokens in (64, 128)
    assert blocks.stages >= 3
    # Half of what a thread block has: its share of the SM's registers must hold the sums.
    assert blocks.per_sm * blocks.tokens * blocks.width <= 65536 // 2
    with pytest.raises(ShapeError, match="no block of it fits 1000 bytes"):
        block_sizes(x, weight, shared_bytes=1000)


def test_what_it_refuses_is_named():
    x = jax.ShapeDtypeStruct((8, 256), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((2, 256, 128), jnp.bfloat16)
    assert "not (10, 0)" in str(refusal(x, weight, (10, 0)))
    assert "not float32" in str(refusal(x.update(dtype=jnp.float32), weight, (9, 0)))
    assert "not float32" in str(refusal(x, weight.update(dtype=jnp.float32), (9, 0)))
    assert "F = 40" in str(refusal(x, weight.update(shape=(2, 256, 40)), (9, 0)))
