"""How arrays lie in a TPU's memory, and what the kernels refuse."""

import jax
import jax.numpy as jnp
import pytest

from jaxinfer.kernels import cases
from jaxinfer.kernels.tpu import CHIPS, padded_bytes, unsupported
from jaxinfer.kernels.write_pages import Pool


@pytest.mark.parametrize(
    ("shape", "dtype", "want"),
    [
        ((3, 8, 64, 128), "bfloat16", 3 * 8 * 64 * 128 * 2),
        ((3, 8, 64, 64), "bfloat16", 3 * 8 * 64 * 128 * 2),  # half of each row is padding
        ((3, 8, 16, 128), "int8", 3 * 8 * 16 * 128),  # a tile of 16 rows instead of 32
        ((3, 8, 64), "float32", 3 * 8 * 128 * 4),
        ((3, 5, 64), "float32", 3 * 8 * 128 * 4),
        ((3, 1, 64), "float32", 3 * 1 * 128 * 4),
        ((3, 1, 128), "bfloat16", 3 * 2 * 128 * 2),
        ((3, 3, 128), "int8", 3 * 4 * 128),
        ((200,), "float32", 256 * 4),
    ],
)
def test_padded_bytes(shape, dtype, want):
    """What libtpu 0.0.48 says for all of CHIPS; tests/compile compares whole pools."""
    assert padded_bytes(shape, dtype) == want


def test_what_is_not_supported_is_said():
    case = cases.REAL["llama-3.1-8b, prefill 2048, int8"]
    _, pool, _ = cases.abstract(case)
    assert {unsupported(chip, "bfloat16", pool) for chip in CHIPS} == {None}
    assert unsupported("h200", "bfloat16", pool) == (
        "the TPU kernels were not compiled for h200, but for tpu-v5e, tpu-v5p, tpu-v6e, tpu7x"
    )
    assert "queries must be" in str(unsupported("tpu7x", "float16", pool))
    short = jax.ShapeDtypeStruct((3, 8, 24, 128), jnp.bfloat16)
    assert "multiple of 16, not 24" in str(unsupported("tpu7x", "bfloat16", Pool(short, short)))
    half = jax.ShapeDtypeStruct((3, 8, 32, 128), jnp.float16)
    assert "not float16" in str(unsupported("tpu7x", "bfloat16", Pool(half, half)))
