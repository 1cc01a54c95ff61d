"""The GPU kernel of grouped products, interpreted: values and races, on memory full of NaN."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.errors import ShapeError
from jaxinfer.kernels import cases
from jaxinfer.kernels.quantized import quantize
from jaxinfer.kernels.quantized_matmul import as_one_group
from tests.kernels.groups import build, check, expected

if jax.__version_info__ < (0, 11):
    pytest.skip("JAX has an interpreter for GPU kernels from 0.11 on", allow_module_level=True)

from jaxinfer.kernels.gpu import Gpu
from jaxinfer.kernels.grouped_matmul_gpu import (
    Blocks,
    block_sizes,
    grouped_matmul,
    multiplied,
    refusal,
)
from tests.kernels.gpu_interpreter import parameters, races_found

HOPPER, BLACKWELL = Gpu((9, 0), 132, 232_448), Gpu((10, 0), 148, 232_448)
WATCHED = parameters(detect_races=True)


def interpreted(gpu, **options):
    """The kernel on two multiprocessors, so that each has several pairs."""
    return partial(
        grouped_matmul, gpu=replace(gpu, multiprocessors=2), interpret=WATCHED, **options
    )


def check_interpreted(gpu, case, blocks, **options):
    check(interpreted(gpu, blocks=blocks, **options), case)
    assert not races_found()


STACKS = [name for name, case in cases.SMALL_PRODUCTS.items() if not case.single]


@pytest.mark.parametrize("name", STACKS)
def test_hopper_matches_float64(name, kernel_ran):
    case, index = cases.SMALL_PRODUCTS[name], STACKS.index(name)
    kernel_ran("grouped_matmul", "mosaic_gpu", case.format or "bfloat16", "interpreted")
    # Small ones, so that there are several of each, and not the same for all cases.
    narrow = case.format in ("fp8", "int8") and index % 2
    blocks = Blocks(64 << (index % 5 == 0), 64, 2 + index % 2, 1 + index % 2, 64 << narrow)
    check_interpreted(HOPPER, case, blocks)


# Every format, and every kind of groups.
@pytest.mark.parametrize("name", [*STACKS[::9], "none-bfloat16-384x192"])
def test_blackwell_matches_float64(name):
    case = cases.SMALL_PRODUCTS[name]
    depth = 128 if case.format in ("fp8", "int8") else 64
    check_interpreted(BLACKWELL, case, Blocks(128, 64, 2, 1, depth))


@pytest.mark.parametrize(
    ("name", "operand"),
    [
        ("fp8", "float8_e4m3fn"),
        ("int8", "int8"),
        ("w8a16", "bfloat16"),
        ("fp8_block", "bfloat16"),
        ("nvfp4", "bfloat16"),
    ],
)
def test_what_is_multiplied(name, operand):
    weight = jax.eval_shape(lambda: quantize(jnp.ones((1, 128, 64)), name))
    assert multiplied(weight) == operand


@pytest.mark.parametrize("name", ["fp8_block", "w4a16", "nvfp4", "mxfp4"])
def test_a_single_weight(name, kernel_ran):
    kernel_ran("quantized_matmul", "mosaic_gpu", name, "interpreted")
    case = cases.Product((70,), 256, 64, name, single=True)
    x, stack, _ = build(case, jnp.bfloat16)
    x = x[: case.num_tokens]
    weight = jax.tree.map(lambda leaf: leaf[0], stack)
    out = as_one_group(interpreted(HOPPER), x, weight)
    want = expected(x, stack, case.groups)
    np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=2**-8, atol=0.2)


@pytest.mark.parametrize("gpu", [HOPPER, BLACKWELL])
@pytest.mark.parametrize("name", cases.REAL_PRODUCTS)
def test_blocks_fit_and_divide(name, gpu):
    case = cases.REAL_PRODUCTS[name]
    x, weight, _ = cases.abstract_product(replace(case, single=False))
    D, F = case.D, case.F
    assert refusal(x, weight, gpu) is None
    blocks = block_sizes(x, weight, gpu)
    assert F % blocks.width == 0
    assert D % blocks.depth == 0
    assert blocks.stages >= 3
    if gpu == HOPPER:
        assert blocks.tokens in (64, 128)
        # Half of what a thread block has: its share of the SM's registers must hold the sums.
        assert blocks.per_sm * blocks.tokens * blocks.width <= 65536 // 2
    else:
        assert blocks.tokens == 128
        assert blocks.per_sm * blocks.width <= 512
    with pytest.raises(ShapeError, match="no block of it fits 1000 bytes"):
        block_sizes(x, weight, replace(gpu, shared_bytes=1000))


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (12, 0)])
def test_chips_without_the_matrix_units_are_refused(capability):
    """Lowering for them would end the process."""
    x, weight, _ = cases.abstract_product(cases.Product((1,), 256, 64))
    assert str(capability) in str(refusal(x, weight, replace(HOPPER, capability=capability)))


def test_what_it_refuses_is_named():
    x = jax.ShapeDtypeStruct((8, 256), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((2, 256, 128), jnp.bfloat16)
    assert "not float32" in str(refusal(x.update(dtype=jnp.float32), weight, HOPPER))
    assert "not float32" in str(refusal(x, weight.update(dtype=jnp.float32), HOPPER))
    assert "F = 40" in str(refusal(x, weight.update(shape=(2, 256, 40)), HOPPER))
