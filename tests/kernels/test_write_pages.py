"""The quantised formats of a pool against NumPy and ml_dtypes."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxinfer.kernels.write_pages import LARGEST, quantize, unpack

VALUES = np.random.default_rng(0).normal(size=(5, 3, 8)).astype(np.float32)
VALUES[1, 2] = 0
VALUES[2] *= 1e-34  # its scale would be no normal number
VALUES[3, 0] = [-7, -6, -1, 0, 1, 2, 6, 7]


def test_the_largest_numbers_are_those_of_the_formats():
    for name in ("float8_e4m3fn", "float8_e5m2"):
        assert LARGEST[name] == float(ml_dtypes.finfo(name).max)
    assert LARGEST["int8"] == np.iinfo(np.int8).max
    assert LARGEST["uint8"] == ml_dtypes.iinfo("int4").max


@pytest.mark.parametrize(("dtype", "step"), [("int8", 127), ("uint8", 7)])
def test_integers_round_to_the_nearest(dtype, step):
    stored, scale = map(np.asarray, quantize(jnp.asarray(VALUES), dtype))
    peak = np.abs(VALUES).max(-1)
    whole = np.asarray(unpack(jnp.asarray(stored), jnp.float32))
    restored = whole * scale[..., None]
    assert np.abs(whole).max() == step
    assert (
        np.abs(restored - VALUES) <= np.maximum(peak, 1e-30)[..., None] / step / 2 * 1.001
    ).all()
    assert (scale > 0).all()


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_floats_round_as_ml_dtypes_does(dtype):
    stored, scale = quantize(jnp.asarray(VALUES), dtype)
    want = (VALUES / np.asarray(scale)[..., None]).astype(dtype)
    np.testing.assert_array_equal(np.asarray(stored).view(np.uint8), want.view(np.uint8))


def test_four_bits_lie_two_in_a_byte():
    stored, scale = quantize(jnp.asarray(VALUES[3, 0]), "uint8")
    assert scale == 1
    assert np.asarray(stored).tolist() == [0x19, 0x2A, 0x6F, 0x70]
    want = np.array([-7, -6, -1, 0, 1, 2, 6, 7]).astype(ml_dtypes.int4)
    np.testing.assert_array_equal(np.asarray(unpack(stored, jnp.float32)), want.astype(np.float32))
