"""What lies between the products of a quantised feed-forward: the reference against NumPy, and the
GPU kernel, interpreted, against the reference."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxinfer.kernels.gated_quantize import gated_quantize

ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


def arguments(T, F, seed=0):
    rng = np.random.default_rng(seed)
    sums = rng.normal(0, 500, (T, 2, F))
    sums[0] *= 0.001  # of tokens that say little
    scales = rng.uniform(0.01, 0.1, (T, 1)), rng.uniform(0.05, 0.2, (2, F))
    return (
        jnp.asarray(sums, jnp.bfloat16),
        *(jnp.asarray(scale, jnp.float32) for scale in scales),
    )


def check(found, sums, scale_T1, scale_WF, activation):
    """As many bits as fp8 has: the nearest number, but where the hidden one is about half way."""
    values, scale = (np.asarray(part) for part in found)
    assert values.dtype == ml_dtypes.float8_e4m3fn
    sums, scale_T1, scale_WF = (np.asarray(x, np.float64) for x in (sums, scale_T1, scale_WF))
    scaled = sums * scale_T1[:, :, None] * scale_WF
    hidden = ACTIVATIONS[activation](scaled[:, 0]) * scaled[:, 1]
    peak = np.abs(hidden).max(axis=1, keepdims=True)
    np.testing.assert_allclose(scale, peak / 448, rtol=2**-7)
    # Half a step of three bits, and what bfloat16 makes of the hidden number.
    np.testing.assert_allclose(
        np.float64(values) * scale,
        hidden,
        rtol=2**-4 + 2**-7,
        atol=2 ** (-9 - 1) * peak.max() / 448,
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_matches_numpy(activation):
    given = arguments(5, 96)
    check(gated_quantize(*given, activation=activation, name="fp8"), *given, activation)


@pytest.fixture
def kernel():
    if jax.__version_info__ < (0, 11):
        pytest.skip("the GPU interpreter is public from JAX 0.11 on")
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from jaxinfer.kernels import gated_quantize_gpu

    parameters = plgpu.InterpretGPUParams(uninitialized_memory="nan")  # pyright: ignore[reportAttributeAccessIssue]
    with plgpu.force_gpu_interpret_mode(parameters):  # pyright: ignore[reportAttributeAccessIssue]
        yield gated_quantize_gpu


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("F", [128, 640, 1024, 3072])
def test_the_kernel_matches_numpy(F, activation, kernel):
    given = arguments(3, F, seed=F)
    check(kernel.gated_quantize(*given, activation=activation), *given, activation)


def test_a_token_of_nan_or_zeros_stays_by_itself(kernel):
    sums, *scales = arguments(4, 256)
    sums = sums.at[1, 0, 7].set(jnp.nan).at[2].set(0)
    values, scale = kernel.gated_quantize(sums, *scales, activation="silu")
    want, want_scale = gated_quantize(sums, *scales, activation="silu", name="fp8")
    for token in (0, 2, 3):
        np.testing.assert_allclose(scale[token], want_scale[token], rtol=1e-5)
        near = np.abs(np.float32(values[token]) - np.float32(want[token]))
        assert (near <= np.abs(np.float32(want[token])) / 8).all()
    assert not np.float32(values[2]).any()


def test_what_the_kernel_is_not_for(kernel):
    def refusal(F, dtype=jnp.bfloat16, name="fp8"):
        return kernel.refusal(jax.ShapeDtypeStruct((4, 2, F), dtype), name)

    assert refusal(14336) is None
    assert "multiple of 128" in refusal(200)
    assert "up to" in refusal(1 << 16)
    assert "float32" in refusal(256, jnp.float32)
    assert "int8" in refusal(256, name="int8")
