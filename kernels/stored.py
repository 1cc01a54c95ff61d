"""Weights as kernels take them: plain arrays, and how a block of them becomes wide numbers."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jax import Array

from jaxinfer.kernels.quantized import Quantized, read_scales, read_values
from jaxinfer.shapes import Leaf


@struct.dataclass
class Stored:
    """A weight `[E, D, F]` with scales that a kernel need not spread along F.

    scales: None, or `[E, 1, F]`, or `[E, D / rows, F]` if it is `grouped`.
    tensor_scale: float32 `[E]`, ones if the format has none.
    rows: of D to a scale.  bits: of a value.  format: empty for an array of floats.
    """

    values: Leaf
    scales: Leaf | None
    tensor_scale: Leaf
    rows: int = struct.field(pytree_node=False)
    bits: int = struct.field(pytree_node=False)
    format: str = struct.field(pytree_node=False)

    @property
    def grouped(self) -> bool:
        """Whether a scale belongs to a part of D: then it is multiplied in before the product."""
        return self.scales is not None and self.scales.shape[1] > 1

    def widen(self, values: Array, scales: Array | None, dtype: jnp.dtype) -> Array:
        """A block of values, `[depth, width]`, in the dtype of the activations, times its scales
        `[depth / rows, width]` if it is grouped."""
        if values.dtype == dtype:
            return values
        if not self.format or scales is None:
            return values.astype(dtype)
        depth, width = values.shape
        numbers = read_values(values, self.format).reshape(-1, self.rows, width)
        numbers *= read_scales(scales, self.format)[:, None]
        return numbers.reshape(depth, width).astype(dtype)


def stored(weight: Array | Quantized) -> Stored:
    """The weight `[E, D, F]` for a kernel; its values are not moved."""
    ones = jnp.ones(weight.shape[0], jnp.float32)
    if not isinstance(weight, Quantized):
        return Stored(weight, None, ones, 1, 8 * weight.dtype.itemsize, "")
    scales = weight.scales
    if weight.columns > 1:
        # A small part of the weight's bytes, against a spread in the kernel.
        scales = jnp.repeat(scales, weight.columns, axis=2)[..., : weight.shape[2]]
    if weight.tensor_scale is not None:
        ones = weight.tensor_scale.reshape(-1)
    bits = 4 if weight.values.dtype == jnp.int4 else 8
    return Stored(weight.values, scales, ones, weight.rows, bits, weight.format)
