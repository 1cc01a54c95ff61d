"""The GPU kernel of grouped products, interpreted: values and races, on memory full of NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.errors import ShapeError
from jaxinfer.kernels.quantized import FORMATS, quantize
from tests.kernels.groups import GROUPS, build, expected

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


# Every format and every kind of groups once, with two blocks of F.
@pytest.mark.parametrize(
    ("case", "name", "blocks"),
    [
        ("empty groups between", None, Blocks(64, 64, 2, 1)),
        ("one token each", None, Blocks(64, 64, 3, 1)),
        ("one group takes all", None, Blocks(128, 128, 2, 2)),
        ("no tokens", None, Blocks(64, 64, 2, 1)),
        ("many tokens", None, Blocks(64, 128, 2, 1)),
        ("empty groups between", "fp8", Blocks(64, 64, 2, 1)),
        ("one token each", "fp8_block", Blocks(64, 64, 2, 1)),
        ("one group takes all", "int8", Blocks(64, 64, 2, 1)),
        ("whole tiles", "w8a16", Blocks(64, 64, 3, 2)),
        ("empty groups between", "w4a16", Blocks(64, 128, 2, 1)),
        ("one group takes all", "nvfp4", Blocks(64, 64, 2, 1)),
        ("empty groups between", "mxfp4", Blocks(64, 64, 2, 1)),
    ],
)
def test_matches_float64(case, name, blocks):
    groups = GROUPS[case]
    x, weight, sizes = build(groups, name, jnp.bfloat16, F=128)
    out = grouped_matmul(
        x, weight, sizes, num_sms=2, shared_bytes=SHARED, blocks=blocks, interpret=WATCHED
    )
    jax.block_until_ready(out)
    assert not gpu_callbacks.get_races().races_found
    assert out.dtype == jnp.bfloat16
    want = expected(x, weight, groups)
    np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=2**-8, atol=0.15)
    assert not np.asarray(out, np.float64)[sum(groups) :].any()


@pytest.mark.parametrize("name", ["fp8_block", "w4a16"])
def test_a_single_weight(name):
    x, stack, _ = build([70], name, jnp.bfloat16, F=64)
    x = x[:70]
    weight = jax.tree.map(lambda leaf: leaf[0], stack)
    out = quantized_matmul(x, weight, num_sms=2, shared_bytes=SHARED, interpret=WATCHED)
    want = expected(x, stack, [70])
    np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=2**-8, atol=0.15)


@pytest.mark.parametrize("name", [None, *FORMATS])
@pytest.mark.parametrize(
    ("tokens", "E", "D", "F"),
    [(64, 128, 2048, 768), (8192, 8, 4096, 14336), (512, 32, 2880, 2880), (4096, 64, 7168, 2048)],
)
def test_blocks_fit_and_divide(name, tokens, E, D, F):
    x = jax.ShapeDtypeStruct((tokens, D), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((E, D, F), jnp.bfloat16)
    if name is not None:
        if D % (FORMATS[name].rows or 1):
            pytest.skip(f"{name} has no blocks for D = {D}")
        weight = jax.eval_shape(lambda w: quantize(w, name), weight)
    assert refusal(x, weight, (9, 0)) is None
    blocks = block_sizes(x, weight, shared_bytes=SHARED)
    assert F % blocks.width == 0
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
