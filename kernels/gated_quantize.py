"""Between the two quantised products of a gated feed-forward: contract and reference.

The first product leaves unscaled sums of gate and up; the second takes quantised numbers.  What
lies between is one pass over the sums if it is done at once: scales, activation, product, the
largest magnitude of each token, rounding.  XLA makes two passes of it, because the scale of a token
is known only when all of it was seen, and is wanted itself.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxinfer.kernels.quantized import quantize_activations
from jaxinfer.shapes import dims

ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": jax.nn.gelu}


def gated_quantize(
    sums_TWF: Array, scale_T1: Array, scale_WF: Array, *, activation: str, name: str
) -> tuple[Array, Array]:
    """`activation(gate) * up` of each token, quantised as `name` has activations: values `[T, F]`,
    and float32 scales `[T, 1]`.

    sums_TWF: gate and up (W), before the scales of the tokens `[T, 1]` and of the weight's columns
    `[W, F]` are multiplied in.  activation: of `ACTIVATIONS`.  The hidden numbers are rounded to
    the dtype of the sums (of int32: to bfloat16) before they are quantised, as they would be in
    memory.
    """
    dims(sums_TWF=sums_TWF, scale_WF=scale_WF)
    scaled_TWF = sums_TWF.astype(jnp.float32) * scale_T1[:, :, None] * scale_WF[None]
    hidden_TF = ACTIVATIONS[activation](scaled_TWF[:, 0]) * scaled_TWF[:, 1]
    dtype = jnp.promote_types(sums_TWF.dtype, jnp.bfloat16)
    return quantize_activations(hidden_TF.astype(dtype), name)
