"""Quantising activations on GPUs: the kernels, interpreted, against the references, and the
reference of what lies between the products of a feed-forward against NumPy."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxinfer.configs import load_chip
from jaxinfer.kernels import quantized_matmul as products
from jaxinfer.kernels import workloads
from jaxinfer.kernels.gated_quantize import gated_quantize
from jaxinfer.kernels.gpu import Gpu
from jaxinfer.kernels.quantized import LARGEST, format_of, quantize, quantize_activations

FORMATS = ("fp8", "int8")
ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


def arguments(T, F, name, seed=0):
    rng = np.random.default_rng(seed)
    sums = rng.normal(0, 500, (T, 2, F))
    sums[0] *= 0.1  # of tokens that say little
    scales = rng.uniform(0.01, 0.1, (T, 1)), rng.uniform(0.05, 0.2, (2, F))
    return (
        jnp.asarray(sums, jnp.bfloat16 if name == "fp8" else jnp.int32),
        *(jnp.asarray(scale, jnp.float32) for scale in scales),
    )


def check(found, sums, scale_T1, scale_WF, activation, name):
    """The nearest number of the format, but where the hidden one is about half way."""
    values, scale = (np.asarray(part) for part in found)
    assert values.dtype == format_of(name).activations
    sums, scale_T1, scale_WF = (np.asarray(x, np.float64) for x in (sums, scale_T1, scale_WF))
    scaled = sums * scale_T1[:, :, None] * scale_WF
    hidden = ACTIVATIONS[activation](scaled[:, 0]) * scaled[:, 1]
    peak = np.abs(hidden).max(axis=1, keepdims=True)
    largest = LARGEST[values.dtype.name]
    np.testing.assert_allclose(scale, peak / largest, rtol=2**-7)
    # Half a step (fp8 has three bits), and what bfloat16 makes of the hidden number.
    rtol, step = (2**-4, 2**-9) if name == "fp8" else (0, 1)
    np.testing.assert_allclose(
        np.float64(values) * scale, hidden, rtol=rtol + 2**-7, atol=step / 2 * peak.max() / largest
    )


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_matches_numpy(activation, name):
    given = arguments(5, 96, name)
    check(gated_quantize(*given, activation=activation, name=name), *given, activation, name)


@pytest.fixture
def kernels(gpu_interpreter):
    from jaxinfer.kernels import quantize_gpu

    return quantize_gpu


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("F", [128, 640, 1024, 3072])
def test_gated_matches_numpy(F, activation, name, kernels):
    given = arguments(3, F, name, seed=F)
    found = kernels.gated_quantize(*given, activation=activation, name=name)
    check(found, *given, activation, name)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("T", "D"), [(1, 3072), (3, 640), (3, 2048), (130, 128)])
def test_values_are_those_of_the_reference(T, D, name, kernels):
    """But for numbers half way between two values, of which either is the nearest."""
    rng = np.random.default_rng(D)
    x = jnp.asarray(rng.normal(size=(T, D)) * np.exp(rng.normal(0, 9, (T, 1))), jnp.bfloat16)
    found, scale = (np.asarray(part) for part in kernels.quantize_activations(x, name))
    want, want_scale = (np.asarray(part) for part in quantize_activations(x, name))
    assert (found.dtype, scale.shape, scale.dtype) == (want.dtype, (T, 1), np.float32)
    np.testing.assert_allclose(scale, want_scale, rtol=1e-6)
    half_way = np.asarray(x, np.float64) / want_scale
    other = found != want
    between = (found[other].astype(np.float64) + want[other].astype(np.float64)) / 2
    np.testing.assert_allclose(between, half_way[other], rtol=1e-6)
    assert other.mean() < 0.01


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_token_holds_stays_in_it(name, kernels):
    x = np.random.default_rng(0).normal(size=(6, 256)).astype(ml_dtypes.bfloat16)
    x[1, 7], x[3, 8], x[2], x[4] = np.nan, np.inf, 0, 1e-35
    found, scale = (np.asarray(part) for part in kernels.quantize_activations(x, name))
    want, want_scale = (np.asarray(part) for part in quantize_activations(jnp.asarray(x), name))
    np.testing.assert_allclose(scale, want_scale, rtol=1e-6)
    assert np.isnan(scale[1])
    for token in (0, 2, 4, 5):
        np.testing.assert_array_equal(found[token], want[token])


def test_a_gated_token_of_nan_or_zeros_stays_by_itself(kernels):
    sums, *scales = arguments(4, 256, "fp8")
    sums = sums.at[1, 0, 7].set(jnp.nan).at[2].set(0)
    values, scale = kernels.gated_quantize(sums, *scales, activation="silu", name="fp8")
    want, want_scale = gated_quantize(sums, *scales, activation="silu", name="fp8")
    for token in (0, 2, 3):
        np.testing.assert_allclose(scale[token], want_scale[token], rtol=1e-5)
        near = np.abs(np.float32(values[token]) - np.float32(want[token]))
        assert (near <= np.abs(np.float32(want[token])) / 8).all()
    assert not np.float32(values[2]).any()


def test_what_the_kernels_are_not_for(kernels):
    gpu = Gpu.of(load_chip("h200"))

    def refusal(*shape, dtype=jnp.bfloat16, name="fp8", gpu=gpu):
        return kernels.refusal(jax.ShapeDtypeStruct(shape, dtype), name, gpu)

    assert refusal(4, 2, 14336) is None
    assert refusal(4, 2, 14336, dtype=jnp.int32, name="int8") is None
    assert refusal(4, 14336, name="int8") is None
    assert "multiple of 128" in refusal(4, 200)
    assert "up to" in refusal(4, 1 << 16)
    assert "no tokens" in refusal(0, 256)
    assert "not float32" in refusal(4, 256, dtype=jnp.float32)
    assert "not int32" in refusal(4, 256, dtype=jnp.int32)
    assert "w8a16" in refusal(4, 256, name="w8a16")
    assert "fp8_block" in refusal(4, 256, name="fp8_block")
    assert "(8, 9)" in refusal(4, 256, gpu=replace(gpu, capability=(8, 9)))


@pytest.mark.parametrize("name", FORMATS)
def test_a_product(name, gpu_interpreter, kernel_ran):
    kernel_ran("quantized_matmul", "mosaic_gpu", name, "interpreted")
    from jaxinfer.kernels.quantized_matmul_gpu import quantized_matmul

    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(7, 256)), jnp.bfloat16)
    weight = quantize(jnp.asarray(rng.normal(size=(256, 160))), name)
    gpu = Gpu.of(load_chip("h200"))
    found = quantized_matmul(x, weight, gpu=gpu)
    assert found.dtype == jnp.bfloat16
    assert workloads.difference(found, products.quantized_matmul(x, weight)) < 0.01
    # What the kernel refuses is the reference's.
    x = x.astype(jnp.float32)
    want = products.quantized_matmul(x, weight)
    np.testing.assert_array_equal(quantized_matmul(x, weight, gpu=gpu), want)
