"""Factors in bfloat16: rounded once, as the models' own code does; a stream and its norm."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxinfer import layers
from jaxinfer.config import ModelConfig


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
