"""Quantising activations on NVIDIA GPUs: a warpgroup takes a token, and keeps its numbers in
registers until their largest magnitude is known.  What XLA makes of it reads them twice.

The numbers are read as they are (`quantize_activations`), or are what lies between the products of
a gated feed-forward (`gated_quantize`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from jaxinfer.kernels.gpu import Gpu, load
from jaxinfer.kernels.quantized import LARGEST, SMALLEST, cast, format_of
from jaxinfer.shapes import dims

THREADS = 128
# Numbers of a token that its threads can hold, two in a register, without spilling any; by the
# dtype of what is read.
WIDEST = {"bfloat16": 148 * THREADS, "int32": 144 * THREADS}


def refusal(numbers: Any, name: str, gpu: Gpu) -> str | None:
    """Why the kernels are not for `x_TD` or `sums_TWF`, abstract or not, and the format on such a
    chip; None if they are."""
    tokens, *between, width = numbers.shape
    takes = tuple(WIDEST) if between else ("bfloat16",)
    if gpu.refusal:
        return gpu.refusal
    if not format_of(name).as_stored:
        return f"{name} has no activations with one scale for a token"
    if numbers.dtype not in takes:
        return f"it takes {' or '.join(takes)}, not {numbers.dtype}"
    if not tokens:
        return "there are no tokens"
    widest = WIDEST[numbers.dtype.name]
    if width not in range(THREADS, widest + 1, THREADS):
        return f"a token's {width} numbers are no multiple of {THREADS} up to {widest}"
    return None


def quantize_activations(x_TD: Array, name: str) -> tuple[Array, Array]:
    """As `quantized.quantize_activations`, for arguments that `refusal` passes: values `[T, D]` and
    float32 scales `[T, 1]`.

    Numbers are multiplied by one over the scale, not divided by it, which would be several times
    the instructions: what is half way between two values, but for the last bits of float32, may
    become the other one.
    """

    def read(token: Array, some: Any, layout: Any, x: Any) -> Array:
        return load(x.at[token, some], layout)

    return _in_one_pass(read, *x_TD.shape, name, x_TD)


def gated_quantize(
    sums_TWF: Array, scale_T1: Array, scale_WF: Array, *, activation: str, name: str
) -> tuple[Array, Array]:
    """As `gated_quantize.gated_quantize`, for arguments that `refusal` passes."""
    T, F = (dims(sums_TWF=sums_TWF, scale_WF=scale_WF)[letter] for letter in "TF")

    def hidden(token: Array, some: Any, layout: Any, sums: Any, scale_T: Any, scale: Any) -> Array:
        gate, up = (
            load(sums.at[token, way, some], layout).astype(jnp.float32)
            * (load(scale.at[way, some], layout) * scale_T[token])
            for way in (0, 1)
        )
        return (_activated(gate, activation) * up).astype(jnp.bfloat16)

    return _in_one_pass(hidden, T, F, name, sums_TWF, scale_T1[:, 0], scale_WF)


def _in_one_pass(
    numbers: Callable[..., Array], tokens: int, width: int, name: str, *arrays: Array
) -> tuple[Array, Array]:
    """Quantised numbers of each token, and its scale.

    numbers(token, some, layout, *references to the arrays): a slice of a token's, in bfloat16.
    """
    # Neighbours that a thread loads at once, up to 16 bytes.
    each = next(n for n in (8, 4, 2, 1) if width % (THREADS * n) == 0)
    piece = THREADS * each
    layout = plgpu.Layout.WG_STRIDED((piece,), each)
    dtype = jnp.dtype(format_of(name).activations)
    slices = [pl.ds(at, piece) for at in range(0, width, piece)]

    def body(*refs: Any) -> None:
        *inputs, values, scales = refs
        token = lax.axis_index("token")
        kept = [numbers(token, some, layout, *inputs) for some in slices]
        peak = jnp.abs(kept[0])
        for some in kept[1:]:
            peak = jnp.maximum(peak, jnp.abs(some))
        scale = jnp.maximum(jnp.max(peak.astype(jnp.float32)), SMALLEST) / LARGEST[dtype.name]
        inverse = 1 / scale
        for at, some in zip(slices, kept, strict=True):
            values[token, at] = cast(some.astype(jnp.float32) * inverse, dtype)
        scales[token] = scale

    values, scale_T = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((tokens, width), dtype),
            jax.ShapeDtypeStruct((tokens,), jnp.float32),
        ],
        grid=(tokens,),
        grid_names=("token",),
        # Nothing that is stored is loaded again, so there is nothing to wait for.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(*arrays)
    return values, scale_T[:, None]


def _activated(gate: Array, activation: str) -> Array:
    """silu(x) = x · sigmoid(x), and gelu by tanh(y) = 2 · sigmoid(2y) - 1."""
    if activation == "silu":
        inner = gate
    else:
        inner = gate * (1.5957691216057308 + 0.07135481282617 * gate * gate)
    return gate / (1 + jnp.exp(-inner))
