"""The reference of quantised products against float64 on what the formats store."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.errors import ShapeError
from jaxinfer.kernels import cases
from jaxinfer.kernels.quantized import FORMATS, dequantize, quantize, quantize_activations
from jaxinfer.kernels.quantized_matmul import quantized_matmul


def expected(x: np.ndarray, weight) -> np.ndarray:
    """The product in float64 of what is stored and of what the activations become."""
    if FORMATS[weight.format].activations:
        values, scale = quantize_activations(jnp.asarray(x), weight.format)
        scale = np.asarray(scale, np.float64)
        spread = np.repeat(scale, x.shape[1] // scale.shape[1], axis=1)
        x = np.asarray(values).astype(np.float64) * spread
    return np.asarray(x, np.float64) @ np.asarray(dequantize(weight, jnp.float32), np.float64)


SINGLE = [name for name, case in cases.SMALL_PRODUCTS.items() if case.single]


@pytest.mark.parametrize("name", SINGLE)
def test_matches_float64(name, kernel_ran):
    case = cases.SMALL_PRODUCTS[name]
    kernel_ran("quantized_matmul", "reference", case.format, "cpu")
    rng = np.random.default_rng(case.num_tokens)
    x = rng.normal(size=(case.num_tokens, case.D)).astype(np.float32)
    weight = quantize(jnp.asarray(rng.normal(size=(case.D, case.F))), case.format)
    out = quantized_matmul(x, weight)
    assert out.dtype == jnp.float32
    want = expected(x, weight)
    np.testing.assert_allclose(np.asarray(out), want, rtol=0, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize("name", FORMATS)
def test_bfloat16_rounds_once(name):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(5, 256)), jnp.bfloat16)
    weight = quantize(jnp.asarray(rng.normal(size=(256, 160))), name)
    out = quantized_matmul(x, weight)
    assert out.dtype == jnp.bfloat16
    want = expected(np.asarray(x), weight)
    # Half a unit in the last place of the result, and (where weights are scaled before the product)
    # of each of the 256 summands.
    np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=2**-8, atol=0.12)


def test_padding_stays_in_its_row():
    x = np.ones((3, 128), np.float32)
    x[1] = np.nan
    for name in FORMATS:
        out = np.asarray(quantized_matmul(x, quantize(jnp.ones((128, 8)), name)))
        np.testing.assert_allclose(out[[0, 2]], 128, rtol=0.02)


def test_int8_is_summed_without_error():
    """All products of one sign: float32 sums of int8 would lose the last bits from 2**24 on."""
    x = np.full((2, 4096), 1.0, np.float32)
    x[:, 1::2] = 126 / 127
    out = np.asarray(quantized_matmul(x, quantize(jnp.ones((4096, 4)), "int8")))
    exact = np.float32(127 * (127 + 126) * 2048)
    np.testing.assert_array_equal(out, exact * np.float32(1 / 127) * np.float32(1 / 127))


def test_shapes_that_disagree_are_named():
    weight = quantize(jnp.ones((128, 8)), "int8")
    with pytest.raises(ShapeError, match=r"weight_DF has D=128, but x_TD has D=64"):
        quantized_matmul(jnp.ones((2, 64)), weight)


def test_a_quantized_weight_crosses_jit_and_donation_as_a_tree():
    weight = quantize(jnp.ones((128, 8)), "nvfp4")
    leaves, tree = jax.tree.flatten(weight)
    assert len(leaves) == 3
    assert jax.tree.unflatten(tree, leaves).format == "nvfp4"
    assert len(jax.tree.leaves(quantize(jnp.ones((128, 8)), "mxfp4"))) == 2
