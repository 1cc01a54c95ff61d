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

    The result is rounded once.  Weights whose scales are no powers of two and belong to some of D,
    and the activations of fp8_block, may be rounded to bfloat16 before: D independent errors of
    2⁻⁹ at most, of which eight standard deviations are allowed.  All else may lose what sums of 14
    bits (fp8 on Hopper) lose.
    """
    x, weight, sizes = build(case, jnp.bfloat16)
    out = grouped_matmul(x, weight, sizes)
    assert out.dtype == jnp.bfloat16
    out = np.asarray(out, np.float64)
    want = expected(x, weight, case.groups)
    rounded = case.format in ("w4a16", "nvfp4", "fp8_block")
    atol = 8 * 2**-9 * (2 / 3 * case.D) ** 0.5 if rounded else 0.1 * (case.D / 512) ** 0.5
    np.testing.assert_allclose(out, want, rtol=2**-8, atol=atol)
    assert not out[case.num_tokens :].any()
