"""The arrays of a product's case, and the product in float64: for every backend's tests."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxinfer.kernels.cases import Product
from jaxinfer.kernels.quantized import FORMATS, dequantize, quantize, quantize_activations


def build(case: Product, dtype=jnp.float32):
    """Tokens (five more than the groups have, NaN), a weight, and the sizes of the groups."""
    rng = np.random.default_rng(0)
    x = np.full((case.num_tokens + 5, case.D), np.nan, np.float32)
    x[: case.num_tokens] = rng.normal(size=(case.num_tokens, case.D))
    weight = jnp.asarray(rng.normal(size=(len(case.groups), case.D, case.F)), jnp.float32)
    weight = weight.astype(dtype) if case.format is None else quantize(weight, case.format)
    return jnp.asarray(x, dtype), weight, jnp.asarray(case.groups, jnp.int32)


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


def check(grouped_matmul, case: Product):
    """A backend's `grouped_matmul` of bfloat16 activations against float64; on a chip as well.

    Half a unit in the last place of the result, and of each of D summands where weights or
    activations are rounded to bfloat16 before the product.
    """
    x, weight, sizes = build(case, jnp.bfloat16)
    out = grouped_matmul(x, weight, sizes)
    assert out.dtype == jnp.bfloat16
    out = np.asarray(out, np.float64)
    want = expected(x, weight, case.groups)
    np.testing.assert_allclose(out, want, rtol=2**-8, atol=0.17 * (case.D / 256) ** 0.5)
    assert not out[case.num_tokens :].any()
