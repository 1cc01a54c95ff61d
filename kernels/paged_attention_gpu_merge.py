"""Parts of a split context become one result: the second kernel of decoding on GPU."""

from __future__ import annotations

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from jaxinfer.kernels.gpu import load
from jaxinfer.kernels.paged_attention_gpu_units import full
from jaxinfer.kernels.paged_attention_gpu_work import FLOOR

# What a block of threads merges, query heads by columns: a number for each thread.
PIECES = {
    (8, 16): plgpu.Layout.TILED(
        plgpu.Tiling(((8, 16), (2, 16), (1,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
    ),
    (4, 32): plgpu.Layout.TILED(
        plgpu.Tiling(((4, 32), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
    ),
    (2, 64): plgpu.Layout.TILED(
        plgpu.Tiling(((2, 64), (32,), (1,))), warp_dims=(-4, -3), lane_dims=(-2,), vector_dim=-1
    ),
    (1, 128): plgpu.Layout.TILED(
        plgpu.Tiling(((1, 128), (32,), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
    ),
}

# Parts whose loads are in flight together: their latency is what merging costs.  Of most rows there
# are few.
AT_ONCE, FEW = 8, 2
# So many blocks of threads keep a chip loading; if there are as many anyway, each has whole rows.
BUSY = 256


def merge(acc: Array, stat: Array, starts: Array, sinks_KG: Array | None, group: int) -> Array:
    """Softmax-weighted mean of each row's parts, one after the other: `[B, K, G, H]`, bfloat16.

    acc: `[items, K, parts, padded G, H]` float32, sums of weighted values.
    stat: `[items, K, parts, 2, …]` float32, the maxima in base 2 that the weights are relative to,
        and the sums of the weights.
    starts: `[B + 1]`; row b has the items from `starts[b]` to `starts[b + 1]`; zeros if none.
    """
    _, heads, parts, padded, width = acc.shape
    rows = starts.shape[0] - 1
    sinks = []
    if sinks_KG is not None:
        sinks = [jnp.pad(sinks_KG, [(0, 0), (0, padded - group)], constant_values=FLOOR)]
    # Padded to eights and wide by sixteens, heads fit the first piece if they fit no other.
    merged, piece = next(
        (count, piece) for count in (group, padded) for piece in PIECES
        if count % piece[0] == 0 and width % piece[1] == 0
    )  # fmt: skip
    layout = PIECES[piece]
    across = merged // piece[0]
    if rows * heads * across >= BUSY:
        piece = piece[0], width
    along = width // piece[1]

    def body(acc, stat, starts, *sinks_and_out):
        *sinks, out = sinks_and_out
        row, head, at = (lax.axis_index(name) for name in ("row", "head", "piece"))
        some = pl.ds(lax.rem(at, jnp.int32(across)) * piece[0], piece[0])
        columns = pl.ds(lax.div(at, jnp.int32(across)) * piece[1], piece[1])
        first, last = starts[row] * parts, starts[row + 1] * parts

        def over_columns(x):
            return lax.broadcast_in_dim(x, piece, [0])

        def read(ref, layout):
            return load(ref, layout, optimized=False)

        def fold(begin, count, carry):
            total, peak, values = carry
            found = []
            for n in range(count):
                index = begin + n
                at = jnp.minimum(index, last - 1)
                part = (lax.div(at, jnp.int32(parts)), head, lax.rem(at, jnp.int32(parts)))
                other_peak = read(stat.at[(*part, 0, some)], layout.reduce(1))
                other_total = read(stat.at[(*part, 1, some)], layout.reduce(1))
                other_peak += jnp.where(index < last, 0.0, 2 * FLOOR)
                other_values = read(acc.at[(*part, some, columns)], layout)
                found.append((other_peak, other_total, other_values))
            new_peak = peak
            for other_peak, _, _ in found:
                new_peak = jnp.maximum(new_peak, other_peak)
            shrink = jnp.exp2(peak - new_peak)
            total, values = total * shrink, values * over_columns(shrink)
            for other_peak, other_total, other_values in found:
                shrink = jnp.exp2(other_peak - new_peak)
                total += other_total * shrink
                values += other_values * over_columns(shrink)
            return total, new_peak, values

        zeros = full(0, layout, *piece)
        peak, total = full(FLOOR, layout.reduce(1), piece[0]), full(0, layout.reduce(1), piece[0])
        if sinks:
            peak = read(sinks[0].at[head, some], layout.reduce(1))
            total = jnp.where(peak > FLOOR, 1.0, 0.0)
        turns = lax.div(last - first + (AT_ONCE - 1), jnp.int32(AT_ONCE))
        total, _, values = lax.cond(
            (first < last) & (last - first <= FEW),
            lambda carry: fold(first, FEW, carry),
            lambda carry: lax.fori_loop(
                0, turns, lambda turn, carry: fold(first + turn * AT_ONCE, AT_ONCE, carry), carry
            ),
            (total, peak, zeros),
        )
        total = jnp.where(total == 0, 1.0, total)
        out[row, head, some, columns] = (values * over_columns(1 / total)).astype(out.dtype)

    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, heads, merged, width), jnp.bfloat16),
        grid=(rows, heads, across * along),
        grid_names=("row", "head", "piece"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(acc, stat, starts, *sinks)
    return out[:, :, :group]
