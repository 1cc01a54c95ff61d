"""`quantized_matmul` on NVIDIA GPUs, of weights that are multiplied as they are stored (fp8, int8):
a kernel quantises the activations in one pass.

Of many tokens on Hopper another kernel multiplies and scales.  Elsewhere the rest is the
reference's: the product is the library's (cuBLASLt), which has the chip's speed and cannot scale,
so its sums go through memory, and what consumes the result multiplies the scales in.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax import Array

from jaxinfer.kernels import quantize_gpu, scaled_matmul_gpu
from jaxinfer.kernels import quantized_matmul as reference
from jaxinfer.kernels.gpu import Gpu
from jaxinfer.kernels.quantized import Quantized
from jaxinfer.shapes import dims


def refusal(x_TD: Any, weight: Quantized, gpu: Gpu) -> str | None:
    """Why there is no kernel for these arrays, abstract or not, on a chip; None if there is."""
    return quantize_gpu.refusal(x_TD, weight.format, gpu)


@partial(jax.jit, static_argnames="gpu")
def quantized_matmul(x_TD: Array, weight: Quantized, *, gpu: Gpu) -> Array:
    """As `quantized_matmul.quantized_matmul`, which also serves what `refusal` does not pass."""
    if refusal(x_TD, weight, gpu):
        return reference.quantized_matmul(x_TD, weight)
    dims(x_TD=x_TD, weight_DF=weight)
    x, scale_T1 = quantize_gpu.quantize_activations(x_TD, weight.format)
    if scaled_matmul_gpu.refusal(x, weight.values, gpu) is None:
        return scaled_matmul_gpu.scaled_matmul(x, scale_T1, weight.values, weight.scales, gpu=gpu)
    return (reference.product(x, weight, x_TD.dtype) * scale_T1).astype(x_TD.dtype)
