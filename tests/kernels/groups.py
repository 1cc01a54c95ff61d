"""Groups of tokens, weights for them, and their products in float64: for every backend's tests."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxinfer.kernels.quantized import FORMATS, dequantize, quantize, quantize_activations

GROUPS = {
    "empty groups between": [0, 9, 0, 0, 8, 1, 0],
    "one token each": [1, 1, 1, 1, 1, 1, 1],
    "one group takes all": [0, 0, 19, 0, 0, 0, 0],
    "no tokens": [0, 0, 0, 0, 0, 0, 0],
    "whole tiles": [8, 0, 16, 0, 0, 0, 0],
    "many tokens": [3, 0, 70, 61, 0, 2, 0],
}


def build(groups, name, dtype=jnp.float32, D=256, F=160, seed=0):
    """Tokens (five more than the groups have, NaN), a weight, and the product in float64."""
    rng = np.random.default_rng(seed)
    total = sum(groups)
    x = np.full((total + 5, D), np.nan, np.float32)
    x[:total] = rng.normal(size=(total, D))
    x = jnp.asarray(x, dtype)
    weight = jnp.asarray(rng.normal(size=(len(groups), D, F)), jnp.float32)
    weight = weight.astype(dtype) if name is None else quantize(weight, name)
    return x, weight, jnp.asarray(groups, jnp.int32)


def expected(x, weight, groups):
    """Expert by expert, in float64, of what is stored and of what the activations become."""
    if isinstance(weight, jnp.ndarray):
        values = np.asarray(weight, np.float64)
    else:
        form = FORMATS[weight.format]
        if form.activations:
            stored, scale = quantize_activations(x, weight.format)
            scale = np.asarray(scale, np.float64)
            x = np.asarray(stored).astype(np.float64) * np.repeat(
                scale, x.shape[1] // scale.shape[1], axis=1
            )
        values = np.asarray(dequantize(weight, jnp.float32), np.float64)
    x = np.asarray(x, np.float64)
    out, offset = np.zeros((len(x), values.shape[2])), 0
    for expert, size in enumerate(groups):
        out[offset : offset + size] = x[offset : offset + size] @ values[expert]
        offset += size
    return out


def check(grouped_matmul, groups, name, D=256, F=160, seed=0):
    """A backend's `grouped_matmul` of bfloat16 activations against float64; on a chip as well.

    Half a unit in the last place of the result, and of each of D summands where weights or
    activations are rounded to bfloat16 before the product.
    """
    x, weight, sizes = build(groups, name, jnp.bfloat16, D, F, seed)
    out = grouped_matmul(x, weight, sizes)
    assert out.dtype == jnp.bfloat16
    out = np.asarray(out, np.float64)
    want = expected(x, weight, groups)
    np.testing.assert_allclose(out, want, rtol=2**-8, atol=0.15 * (D / 256) ** 0.5)
    assert not out[sum(groups) :].any()
