"""Root-mean-square normalisation, alone and of a sum: contract and reference."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax


def rms_norm(x: Array, scale: Array, eps: float, offset: float = 0.0, axes: int = 1) -> Array:
    """Root-mean-square normalisation of the last `axes` axes (arXiv:1910.07467).

    The result is multiplied by `scale + offset`, in float32: 1 + w has more digits than bfloat16.
    """
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(x32 * x32, axis=tuple(range(-axes, 0)), keepdims=True)
    normed = x32 * lax.rsqrt(mean_square + eps)
    scale = scale.astype(jnp.float32)
    return (normed * (scale + offset if offset else scale)).astype(x.dtype)


def add_rms_norm(
    x_TD: Array, more_TD: Array, scale_D: Array, *, eps: float, offset: float = 0.0
) -> tuple[Array, Array]:
    """The sum of two arrays, and it normalised: both `[T, D]` in the dtype of x."""
    sum_TD = x_TD + more_TD
    return sum_TD, rms_norm(sum_TD, scale_D[None], eps, offset)
