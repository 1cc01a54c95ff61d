"""`add_rms_norm` on NVIDIA GPUs in one kernel, for steps of few tokens.

XLA makes two of it, since it writes either the sum or what is normalised; at few tokens each takes
as long as starting it.  At many the library's product adds the sum, which costs nothing.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from jaxinfer.kernels import rms_norm as reference
from jaxinfer.kernels.gpu import THREADS, load, slices
from jaxinfer.kernels.xla_options import VENDORS_FROM
from jaxinfer.shapes import dims

# Numbers of a token that its threads can hold, two in a register, beside what they are made of.
WIDEST = 96 * THREADS


def refusal(x_TD: Any) -> str | None:
    """Why the kernel is not for such a sum, abstract or not; None if it is."""
    T, D = x_TD.shape
    if x_TD.dtype != jnp.bfloat16:
        return f"it adds bfloat16, not {x_TD.dtype}"
    if not 0 < T < VENDORS_FROM:
        return f"{T} tokens are not 1 to {VENDORS_FROM - 1}"
    if D not in range(THREADS, WIDEST + 1, THREADS):
        return f"a token's {D} numbers are no multiple of {THREADS} up to {WIDEST}"
    return None


@partial(jax.jit, static_argnames=("eps", "offset"))
def add_rms_norm(
    x_TD: Array, more_TD: Array, scale_D: Array, *, eps: float, offset: float = 0.0
) -> tuple[Array, Array]:
    """As `rms_norm.add_rms_norm`, which also serves what `refusal` does not pass."""
    if refusal(x_TD):
        return reference.add_rms_norm(x_TD, more_TD, scale_D, eps=eps, offset=offset)
    T, D = (dims(x_TD=x_TD, more_TD=more_TD, scale_D=scale_D)[letter] for letter in "TD")
    layout, parts = slices(D)

    def body(x: Any, more: Any, scale: Any, sums: Any, normed: Any) -> None:
        token = lax.axis_index("token")

        def read(ref: Any) -> list[Array]:
            return [load(ref.at[part], layout) for part in parts]

        added = zip(read(x.at[token]), read(more.at[token]), strict=True)
        kept = [(a.astype(jnp.float32) + b.astype(jnp.float32)).astype(x.dtype) for a, b in added]
        scales = read(scale)
        for part, some in zip(parts, kept, strict=True):
            sums[token, part] = some
        squares = sum(jnp.square(some.astype(jnp.float32)) for some in kept)
        factor = lax.rsqrt(jnp.sum(squares) / D + eps)
        for part, some, by in zip(parts, kept, scales, strict=True):
            by = by.astype(jnp.float32) + offset
            normed[token, part] = (some.astype(jnp.float32) * factor * by).astype(x.dtype)

    out = jax.ShapeDtypeStruct((T, D), x_TD.dtype)
    return tuple(
        plgpu.kernel(
            body,
            out_type=[out, out],
            grid=(T,),
            grid_names=("token",),
            # Nothing that is stored is loaded again, so there is nothing to wait for.
            compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        )(x_TD, more_TD, scale_D)
    )
