"""Root-mean-square norms: rounded once, as the models' own code does; and of a sum, by the
reference and, interpreted, by the GPUs' kernel."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxinfer.kernels import rms_norm as reference
from jaxinfer.kernels.rms_norm import rms_norm

EPS = 1e-6


def norm_in_float64(x, weight, axes):
    x = x.astype(np.float64)
    mean_square = (x * x).mean(axis=tuple(range(-axes, 0)), keepdims=True)
    return x / np.sqrt(mean_square + EPS) * weight


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norm_in_bfloat16_rounds_only_its_result(offset):
    """A rounding to bfloat16 changes a number by up to a 256th; two of them would by more."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 64)).astype(ml_dtypes.bfloat16)
    weight = (0.1 * rng.normal(size=64)).astype(ml_dtypes.bfloat16)
    got = rms_norm(jnp.asarray(x), jnp.asarray(weight)[None], EPS, offset)
    assert got.dtype == jnp.bfloat16
    want = norm_in_float64(x, weight.astype(np.float64) + offset, 1)
    error = np.abs(np.asarray(got, np.float64) - want) / np.abs(want)
    assert error.max() < 1.001 / 256
    # What 1 + w stored in bfloat16 would give, even with exact arithmetic from there on.
    folded = (weight.astype(np.float64) + offset).astype(ml_dtypes.bfloat16).astype(np.float64)
    rounded = norm_in_float64(x, folded, 1).astype(ml_dtypes.bfloat16).astype(np.float64)
    assert not offset or (np.abs(rounded - want) / np.abs(want)).max() > 1.5 / 256


def test_norm_over_several_axes():
    rng = np.random.default_rng(1)
    x, weight = rng.normal(size=(5, 2, 3, 4)), rng.normal(size=(2, 3, 4))
    got = rms_norm(jnp.asarray(x, jnp.float32), jnp.asarray(weight)[None], EPS, axes=3)
    np.testing.assert_allclose(got, norm_in_float64(x, weight, 3), rtol=1e-5, atol=1e-6)


def arguments(T, D, seed=0):
    """A stream of large and small tokens, what is added, and a scale."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(T, D)) * np.exp(rng.normal(0, 4, (T, 1)))
    found = x, rng.normal(size=(T, D)), 0.2 * rng.normal(size=D)
    return tuple(jnp.asarray(one, jnp.bfloat16) for one in found)


def check(found, x, more, scale, offset):
    """The sum is the nearest number; it is that one which is normalised, and rounded once more."""
    x, more, scale = (np.asarray(one, np.float64) for one in (x, more, scale))
    sums, normed = (np.asarray(one) for one in found)
    assert sums.dtype == normed.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(sums, (x + more).astype(ml_dtypes.bfloat16))
    want = norm_in_float64(sums, scale + offset, 1)
    np.testing.assert_allclose(normed.astype(np.float64), want, rtol=1.01 / 256)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_reference_of_a_sum(offset, kernel_ran):
    kernel_ran("add_rms_norm", "reference", "bfloat16", "cpu")
    given = arguments(5, 96)
    check(reference.add_rms_norm(*given, eps=EPS, offset=offset), *given, offset)


@pytest.fixture
def kernel(gpu_interpreter):
    from jaxinfer.kernels import rms_norm_gpu

    return rms_norm_gpu


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(("T", "D"), [(1, 128), (2, 640), (3, 2048), (63, 256)])
def test_a_sum_on_a_gpu(T, D, offset, kernel, kernel_ran):
    kernel_ran("add_rms_norm", "mosaic_gpu", "bfloat16", "interpreted")
    given = arguments(T, D, seed=D)
    assert kernel.refusal(given[0]) is None
    check(kernel.add_rms_norm(*given, eps=EPS, offset=offset), *given, offset)


def test_a_token_of_nan_or_zeros_stays_by_itself(kernel):
    x, more, scale = arguments(4, 256)
    x, more = x.at[1, 7].set(jnp.nan).at[2].set(0), more.at[2].set(0)
    given = x, more, scale
    found, want = (
        [np.asarray(one, np.float32) for one in module.add_rms_norm(*given, eps=EPS)]
        for module in (kernel, reference)
    )
    for one, other in zip(found, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1 / 256)
    assert np.isnan(found[1][1]).all()
    assert not found[1][2].any()


def test_what_the_kernel_is_not_for_is_the_references(kernel):
    def refusal(*shape, dtype=jnp.bfloat16):
        return kernel.refusal(jax.ShapeDtypeStruct(shape, dtype))

    assert refusal(2, 4096) is None
    assert "multiple of 128" in refusal(2, 576)
    assert "up to" in refusal(2, 1 << 16)
    assert "64 tokens" in refusal(64, 4096)
    assert "float32" in refusal(2, 4096, dtype=jnp.float32)
    x, more, scale = arguments(3, 200)
    found = kernel.add_rms_norm(x, more, scale, eps=EPS)
    want = jax.jit(reference.add_rms_norm, static_argnames="eps")(x, more, scale, eps=EPS)
    for one, other in zip(found, want, strict=True):
        np.testing.assert_array_equal(one, other)
