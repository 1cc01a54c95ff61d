"""The TPU kernel of grouped products, interpreted: values and races, on memory full of NaN."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.errors import ShapeError
from jaxinfer.kernels.grouped_matmul_tpu import Blocks, block_sizes, grouped_matmul, vmem_needed
from jaxinfer.kernels.quantized import FORMATS, quantize
from jaxinfer.kernels.quantized_matmul import as_one_group
from jaxinfer.kernels.stored import stored
from tests.kernels.groups import GROUPS, build, expected
from tests.kernels.tpu_interpreter import parameters, run

VMEM = 16 * 2**20


# Every format and every kind of groups once, with several blocks of D and F, the last one of F not
# full, where the format's scales allow it.
@pytest.mark.parametrize(
    ("case", "name", "blocks"),
    [
        ("empty groups between", None, Blocks(8, 128, 128)),
        ("one token each", None, Blocks(8, 256, 128)),
        ("one group takes all", None, Blocks(16, 128, 160)),
        ("no tokens", None, Blocks(8, 256, 128)),
        ("whole tiles", None, Blocks(8, 128, 128)),
        ("empty groups between", "fp8", Blocks(16, 128, 128)),
        ("one token each", "fp8_block", Blocks(8, 256, 128)),
        ("one group takes all", "int8", Blocks(8, 128, 128)),
        ("whole tiles", "w8a16", Blocks(8, 128, 128)),
        ("empty groups between", "w4a16", Blocks(16, 256, 128)),
        ("one group takes all", "nvfp4", Blocks(8, 256, 128)),
        ("empty groups between", "mxfp4", Blocks(8, 256, 128)),
    ],
)
def test_matches_float64(case, name, blocks):
    groups = GROUPS[case]
    x, weight, sizes = build(groups, name, jnp.bfloat16)
    out = run(
        lambda x, weight, sizes: grouped_matmul(
            x, weight, sizes, vmem_bytes=VMEM, blocks=blocks, interpret=parameters()
        ),
        x, weight, sizes,
    )  # fmt: skip
    assert out.dtype == jnp.bfloat16
    want = expected(x, weight, groups)
    np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=2**-8, atol=0.15)
    assert not np.asarray(out, np.float64)[sum(groups) :].any()


@pytest.mark.parametrize("name", ["fp8_block", "w4a16"])
def test_a_single_weight(name):
    x, stack, _ = build([11], name, jnp.bfloat16)
    x = x[:11]
    weight = jax.tree.map(lambda leaf: leaf[0], stack)
    kernel = partial(grouped_matmul, vmem_bytes=VMEM, interpret=parameters())
    out = run(partial(as_one_group, kernel), x, weight)
    want = expected(x, stack, [11])
    np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=2**-8, atol=0.15)


def test_fp8_may_be_multiplied_as_it_is():
    groups = GROUPS["empty groups between"]
    x, weight, sizes = build(groups, "fp8", jnp.bfloat16)
    products = [
        grouped_matmul(
            x, weight, sizes, vmem_bytes=VMEM, blocks=Blocks(8, 256, 160), interpret=parameters(),
            fp8_products=native,
        )
        for native in (False, True)
    ]  # fmt: skip
    np.testing.assert_allclose(*(np.asarray(p, np.float64) for p in products), rtol=2**-7)


@pytest.mark.parametrize("name", [None, *FORMATS])
@pytest.mark.parametrize(
    ("tokens", "E", "D", "F"),
    [(64, 128, 2048, 768), (8192, 8, 4096, 14336), (512, 32, 2880, 2880), (4096, 64, 7168, 2048)],
)
def test_block_sizes_fit(name, tokens, E, D, F):
    x = jax.ShapeDtypeStruct((tokens, D), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((E, D, F), jnp.bfloat16)
    if name is not None:
        if D % (FORMATS[name].rows or 1):
            pytest.skip(f"{name} has no blocks for D = {D}")
        weight = jax.eval_shape(lambda w: quantize(w, name), weight)
    for mebibytes in (16, 64, 100):
        blocks = block_sizes(x, weight, vmem_bytes=mebibytes * 2**20)
        form = jax.eval_shape(stored, weight)
        assert vmem_needed(blocks, form) <= mebibytes * 2**20
        assert D % blocks.depth == 0
        assert blocks.depth == D or blocks.depth % 128 == 0
        assert blocks.width % 128 == 0 or blocks.width == F
    with pytest.raises(ShapeError, match="no block of it fits 1000 bytes"):
        block_sizes(x, weight, vmem_bytes=1000)
