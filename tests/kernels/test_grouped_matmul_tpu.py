"""The TPU kernel of grouped products, interpreted: values and races, on memory full of NaN."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.errors import ShapeError
from jaxinfer.kernels import cases
from jaxinfer.kernels.grouped_matmul_tpu import (
    Blocks,
    block_depths,
    block_sizes,
    grouped_matmul,
    vmem_needed,
)
from jaxinfer.kernels.quantized_matmul import as_one_group
from jaxinfer.kernels.stored import stored
from tests.kernels.groups import build, expected
from tests.kernels.tpu_interpreter import parameters, run

VMEM = 16 * 2**20


STACKS = [name for name, case in cases.SMALL_PRODUCTS.items() if not case.single]


def small_blocks(case: cases.Product, weight) -> Blocks:
    """So small that there are several of each; the last one along F may not be full."""
    tokens = 8 if case.num_tokens % 2 else 16
    return Blocks(tokens, block_depths(case.D, jax.eval_shape(stored, weight))[-1], 128)


@pytest.mark.parametrize("name", STACKS)
def test_matches_float64(name, kernel_ran):
    case = cases.SMALL_PRODUCTS[name]
    x, weight, sizes = build(case, jnp.bfloat16)
    kernel_ran("grouped_matmul", "mosaic_tpu", case.format or "bfloat16", "interpreted")
    blocks = small_blocks(case, weight)
    out = run(
        lambda x, weight, sizes: grouped_matmul(
            x, weight, sizes, vmem_bytes=VMEM, blocks=blocks, interpret=parameters()
        ),
        x, weight, sizes,
    )  # fmt: skip
    assert out.dtype == jnp.bfloat16
    want = expected(x, weight, case.groups)
    np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=2**-8, atol=0.2)
    assert not np.asarray(out, np.float64)[case.num_tokens :].any()


@pytest.mark.parametrize("name", ["fp8_block", "w4a16", "nvfp4", "mxfp4"])
def test_a_single_weight(name, kernel_ran):
    kernel_ran("quantized_matmul", "mosaic_tpu", name, "interpreted")
    case = cases.SMALL_PRODUCTS[f"single-7-{name}-256x160"]
    x, stack, _ = build(case, jnp.bfloat16)
    x = x[: case.num_tokens]
    weight = jax.tree.map(lambda leaf: leaf[0], stack)
    kernel = partial(grouped_matmul, vmem_bytes=VMEM, interpret=parameters())
    out = run(partial(as_one_group, kernel), x, weight)
    want = expected(x, stack, case.groups)
    np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=2**-8, atol=0.2)


def test_fp8_may_be_multiplied_as_it_is():
    x, weight, sizes = build(cases.Product(cases.GROUPS["gaps"], 256, 160, "fp8"), jnp.bfloat16)
    products = [
        grouped_matmul(
            x, weight, sizes, vmem_bytes=VMEM, blocks=Blocks(8, 256, 160), interpret=parameters(),
            fp8_products=native,
        )
        for native in (False, True)
    ]  # fmt: skip
    np.testing.assert_allclose(*(np.asarray(p, np.float64) for p in products), rtol=2**-7)


@pytest.mark.parametrize("name", cases.REAL_PRODUCTS)
def test_block_sizes_fit(name):
    case = cases.REAL_PRODUCTS[name]
    x, weight, _ = cases.abstract_product(replace(case, single=False))
    for mebibytes in (16, 64, 100):
        blocks = block_sizes(x, weight, vmem_bytes=mebibytes * 2**20)
        form = jax.eval_shape(stored, weight)
        assert vmem_needed(blocks, form) <= mebibytes * 2**20
        assert case.D % blocks.depth == 0
        assert blocks.depth == case.D or blocks.depth % 128 == 0
        assert blocks.width % 128 == 0 or blocks.width == case.F
    with pytest.raises(ShapeError, match="no block of it fits 1000 bytes"):
        block_sizes(x, weight, vmem_bytes=1000)
