"""Norms and factors in bfloat16: rounded once, as the models' own code does."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxinfer import layers
from jaxinfer.config import ModelConfig

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
    got = layers.rms_norm(jnp.asarray(x), jnp.asarray(weight)[None], EPS, offset)
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
    got = layers.rms_norm(jnp.asarray(x, jnp.float32), jnp.asarray(weight)[None], EPS, axes=3)
    np.testing.assert_allclose(got, norm_in_float64(x, weight, 3), rtol=1e-5, atol=1e-6)


def test_a_factor_is_not_rounded_before_it_multiplies():
    x = np.linspace(-3, 3, 101).astype(ml_dtypes.bfloat16)
    got = layers.scaled(jnp.asarray(x), 0.22)  # 0.2197 in bfloat16
    want = (x.astype(np.float64) * 0.22).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(got), want)


def test_a_part_of_a_head_rotates():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(6, 2, 10)).astype(np.float32)
    config = ModelConfig(
        vocab_size=8, hidden_size=20, intermediate_size=8, num_layers=1, num_heads=2,
        num_kv_heads=2, head_dim=10, max_position_embeddings=32, rotary_dim=6,
    )  # fmt: skip
    tables = layers.rope_tables(jnp.arange(6), config)
    got = np.asarray(layers.apply_rope(jnp.asarray(x), *tables[config.rope(0)]))
    pairs = x[..., :3] + 1j * x[..., 3:6]
    angles = np.arange(6)[:, None] * 10000.0 ** (-np.arange(3) / 3)
    turned = pairs * np.exp(1j * angles)[:, None]
    want = np.concatenate([turned.real, turned.imag, x[..., 6:]], -1)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("inner", "width"), [((2, 4), 64), ((3,), 12)])
def test_both_ways_to_rotate_give_the_same_bits(inner, width, dtype):
    """GPUs go the second; here, op by op, where nothing is contracted to fused multiply-adds."""
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(5, *inner, width)), dtype)
    shape = (5,) + (1,) * len(inner) + (width // 2,)
    cosines, sines = jnp.asarray(rng.uniform(-1, 1, size=(2, *shape)), jnp.float32)
    want = layers._rotate_by_halves(x, cosines, sines)
    got = layers._rotate_by_exchange(x, cosines, sines)
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
