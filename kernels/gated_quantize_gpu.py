"""`gated_quantize` on NVIDIA GPUs: a warpgroup takes a token, and keeps its hidden numbers in
registers until their largest magnitude is known."""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from jaxinfer.kernels.gpu import load
from jaxinfer.kernels.quantized import LARGEST, SMALLEST, cast, format_of
from jaxinfer.shapes import dims

THREADS = 128
# Hidden numbers of a token that its threads can hold, two in a register, without spilling any.
WIDEST = 148 * THREADS


def refusal(sums_TWF: Any, name: str) -> str | None:
    """Why the kernel is not for these arrays; None if it is."""
    width = sums_TWF.shape[-1]
    if name != "fp8":
        return f"it rounds to fp8, not to {name}"
    if sums_TWF.dtype != jnp.bfloat16:
        return f"it takes sums in bfloat16, not {sums_TWF.dtype}"
    if width % THREADS or width > WIDEST:
        return f"F = {width} is no multiple of {THREADS} up to {WIDEST}"
    return None


def gated_quantize(
    sums_TWF: Array,
    scale_T1: Array,
    scale_WF: Array,
    *,
    activation: str,
    name: str = "fp8",
) -> tuple[Array, Array]:
    """As `gated_quantize.gated_quantize`, for arguments that `refusal` passes."""
    T, F = (dims(sums_TWF=sums_TWF, scale_WF=scale_WF)[letter] for letter in "TF")
    # Neighbours that a thread loads at once, up to 16 bytes.
    each = next(n for n in (8, 4, 2, 1) if F % (THREADS * n) == 0)
    piece = THREADS * each
    layout = plgpu.Layout.WG_STRIDED((piece,), each)
    dtype = jnp.dtype(format_of(name).activations)

    def body(sums, token_scale, scale, values, out_scale):
        token = lax.axis_index("token")
        factor = token_scale[token]
        peak = plgpu.layout_cast(jnp.zeros(piece, jnp.float32), layout)
        hidden = []
        for at in range(0, F, piece):
            some = pl.ds(at, piece)
            gate, up = (
                load(sums.at[token, way, some], layout).astype(jnp.float32)
                * (load(scale.at[way, some], layout) * factor)
                for way in (0, 1)
            )
            hidden.append((_activated(gate, activation) * up).astype(jnp.bfloat16))
            peak = jnp.maximum(peak, jnp.abs(hidden[-1].astype(jnp.float32)))
        scale_of_token = jnp.maximum(jnp.max(peak), SMALLEST) / LARGEST[dtype.name]
        for at, some in zip(range(0, F, piece), hidden, strict=True):
            scaled = some.astype(jnp.float32) / scale_of_token
            values[token, pl.ds(at, piece)] = cast(scaled, dtype)
        out_scale[token] = scale_of_token

    values_TF, scale_T = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((T, F), dtype),
            jax.ShapeDtypeStruct((T,), jnp.float32),
        ],
        grid=(T,),
        grid_names=("token",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(sums_TWF, scale_T1[:, 0], scale_WF)
    return values_TF, scale_T[:, None]


def _activated(gate: Array, activation: str) -> Array:
    """silu(x) = x · sigmoid(x), and gelu by tanh(y) = 2 · sigmoid(2y) - 1."""
    if activation == "silu":
        inner = gate
    else:
        inner = gate * (1.5957691216057308 + 0.07135481282617 * gate * gate)
    return gate / (1 + jnp.exp(-inner))
