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

from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxinfer.kernels.grouped_matmul_gpu import Blocks, block_sizes, grouped_matmul

SHARED = 227 * 1024  # H100, H200 and B200


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
        x, weight, sizes, num_sms=2, shared_bytes=SHARED, blocks=blocks,
        interpret=plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan"),
    )  # fmt: skip
    assert out.dtype == jnp.bfloat16
    want = expected(x, weight, groups)
    np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=2**-8, atol=0.15)
    assert not np.asarray(out, np.float64)[sum(groups) :].any()
