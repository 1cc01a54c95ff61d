"""Activations times a quantised weight: contract and reference.

`x_TD` times a `Quantized` `[D, F]` is `[T, F]` in the dtype of x, accumulated in float32 (int32 for
int8 × int8).  Which activations a format quantises is in the table of `quantized.FORMATS`; whatever
a padding token holds stays in its row.  The values are to lie as `quantized.values_layout` says.

On NVIDIA GPUs the sums of fp8 × fp8 are rounded to the dtype of x before they are scaled, not only
afterwards.  Beside what three bits of mantissa in every factor lose, that is nothing.

What the compilers make of the reference, read from their output (`tests/compile`):

* One scale for all D (fp8, int8, w8a16): a product which reads the weight once, in its own dtype,
  on TPU within one fusion.  On GPUs it is a product of fp8 with fp8 (into the dtype of x), of int8
  with int8 (into int32), or of bfloat16 with int8 that it converts; by Triton or, the first two, by
  cuBLASLt, as XLA finds to be faster on the device.  Scales are multiplied in by what consumes the
  result; quantising is one fusion with a norm before it, but reads anything else twice: the scale
  of a token is known when all of it was seen.  For GPUs a kernel quantises in one pass, and for
  Hopper another multiplies many tokens and scales (`quantized_matmul_gpu`).
* A scale for some of D (fp8_block, w4a16, nvfp4, mxfp4): first the whole weight is written out in
  bfloat16, two to four times its bytes, and read again; B200 is no exception, although it could
  multiply fp4.  For these there are kernels: those of `grouped_matmul`, with a single group.

On CPU this is the real path: int8 × int8 runs at about twice the speed of float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxinfer.kernels.quantized import (
    Quantized,
    dequantize,
    format_of,
    quantize_activations,
    spread_scales,
    stacked,
)
from jaxinfer.shapes import dims


@jax.jit
def quantized_matmul(x_TD: Array, weight: Quantized) -> Array:
    """`x_TD` times the weight `[D, F]`: returns `[T, F]` in the dtype of x."""
    dims(x_TD=x_TD, weight_DF=weight)
    x, scale_T1 = activations(x_TD, weight)
    product_TF = product(x, weight, x_TD.dtype)
    return (product_TF if scale_T1 is None else product_TF * scale_T1).astype(x_TD.dtype)


def as_one_group(
    grouped_matmul: Callable[..., Array], x_TD: Array, weight: Quantized, **options: Any
) -> Array:
    """`quantized_matmul` by a backend's kernel of grouped products, all tokens being one group.

    options: of that kernel, such as the facts of the chip.
    """
    sizes_E = jnp.full(1, len(x_TD), jnp.int32)
    return grouped_matmul(x_TD, stacked(weight), sizes_E, **options)


def activations(x_TD: Array, weight: Quantized) -> tuple[Array, Array | None]:
    """What the weight's values are multiplied with, and what each token's product is multiplied
    with afterwards, float32 `[T, 1]`.

    A scale for a part of a token is multiplied in at once: the result is rounded to the dtype of x,
    and there is none for afterwards.
    """
    form = format_of(weight.format)
    if form.activations is None:
        return x_TD, None
    x, scale = quantize_activations(x_TD, weight.format)
    if not form.rows:
        return x, scale
    # The barrier: on GPUs, XLA leaves out the way to a narrow type and back, and so the rounding.
    x = lax.optimization_barrier(x)
    return (x.astype(jnp.float32) * jnp.repeat(scale, form.rows, axis=1)).astype(x_TD.dtype), None


def product(x: Array, weight: Array | Quantized, sums: Any = jnp.float32) -> Array:
    """What `activations` made of x times the weight `[D, F]`: float32 `[T, F]`.

    sums: to what GPUs may round sums of fp8 products before they are scaled.
    """
    if not isinstance(weight, Quantized):
        return _dot(x, weight)
    if weight.scales.shape[-2] > 1:
        return _dot(x, dequantize(weight, x.dtype))
    # Scaled afterwards, the values go into the product as they are.
    return _dot(x, weight.values.astype(x.dtype), sums) * spread_scales(weight, jnp.float32)


def _dot(x: Array, values: Array, sums: Any = jnp.float32) -> Array:
    wide = partial(jnp.dot, preferred_element_type=jnp.float32)
    if x.dtype == jnp.float8_e4m3fn and sums == jnp.bfloat16:
        # The library of GPUs cannot scale: its sums go through memory, and are half as many bytes.
        narrow = partial(jnp.dot, preferred_element_type=sums)
        return lax.platform_dependent(
            x, values, cuda=lambda *args: narrow(*args).astype(jnp.float32), default=wide
        )
    if x.dtype != jnp.int8:
        return wide(x, values)
    # One row of int8 takes five times as long on CPU as two.
    rows = jnp.concatenate([x, x]) if len(x) == 1 else x
    return jnp.dot(rows, values, preferred_element_type=jnp.int32)[: len(x)].astype(jnp.float32)
