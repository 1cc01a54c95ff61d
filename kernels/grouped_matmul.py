"""Tokens sorted by expert times their expert's weight: contract and reference.

`x_TD` holds the tokens of expert 0, then those of expert 1, and so on: `group_sizes_E[e]` of them,
which may be none.  The weight is an array `[E, D, F]`, or a `Quantized` one.  Row t of the result
`[T, F]`, in the dtype of x, is token t times the weight of its expert, accumulated in float32 (in
int32 for int8 × int8).  The rows after the last group come out zero, whatever they hold.

The work is a list of visits: pairs of a tile of Q tokens and an expert with tokens in it.  A tile
where groups meet is visited once for each.  There are at most T / Q + E − 1 visits, and how many
there are depends on the data, so nothing is spent on experts without tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from jaxinfer.kernels.quantized import Quantized
from jaxinfer.kernels.quantized_matmul import activations, product
from jaxinfer.shapes import Leaf, dims


@struct.dataclass
class Visits:
    """Which tiles meet which experts, in the order of the tokens; all int32.

    expert, tile: of each visit; beyond the last one they repeat it.
    begin, end: the tokens of the visit, as positions in the step.
    count: how many visits there are.
    """

    expert: Leaf
    tile: Leaf
    begin: Leaf
    end: Leaf
    count: Leaf


def visits(group_sizes_E: Array, num_tokens: int, tile: int) -> Visits:
    """The visits of groups that lie end to end from token 0 on, in tiles of `tile` tokens."""
    ends_E = jnp.cumsum(group_sizes_E.astype(jnp.int32))
    starts_E = ends_E - group_sizes_E
    tiles_E = jnp.where(group_sizes_E > 0, -(-ends_E // tile) - starts_E // tile, 0)
    last_E = jnp.cumsum(tiles_E)
    most = min(-(-num_tokens // tile) + len(group_sizes_E) - 1, num_tokens)
    index = jnp.minimum(jnp.arange(most), jnp.maximum(last_E[-1] - 1, 0))
    expert = jnp.searchsorted(last_E, index, side="right", method="compare_all").astype(jnp.int32)
    expert = jnp.minimum(expert, len(group_sizes_E) - 1)  # without any tokens there is no expert
    tile_of = starts_E[expert] // tile + index - (last_E - tiles_E)[expert]
    begin = jnp.maximum(starts_E[expert], tile_of * tile)
    end = jnp.minimum(ends_E[expert], (tile_of + 1) * tile)
    return Visits(expert, tile_of, begin, end, last_E[-1])


@jax.jit
def grouped_matmul(x_TD: Array, weight: Array | Quantized, group_sizes_E: Array) -> Array:
    """Each token times the weight of its expert: returns `[T, F]` in the dtype of x.

    The reference, and the CPU's real path: a loop over visits.  (`lax.ragged_dot` multiplies every
    token with every expert there.)
    """
    sizes = dims(x_TD=x_TD, weight_EDF=weight, group_sizes_E=group_sizes_E)
    num_tokens = sizes["T"]
    x, scale_T1 = activations(x_TD, weight) if isinstance(weight, Quantized) else (x_TD, None)
    # Wide enough for the tokens that an expert gets on average.
    tile = max(8, min(64, 1 << (num_tokens // sizes["E"]).bit_length()))
    plan = visits(group_sizes_E, num_tokens, tile)
    x = jnp.pad(x, [(0, -num_tokens % tile), (0, 0)])

    def visit(index, out_TF):
        one = jax.tree.map(
            lambda leaf: lax.dynamic_index_in_dim(leaf, plan.expert[index], keepdims=False), weight
        )
        offset = plan.tile[index] * tile
        new_QF = product(lax.dynamic_slice_in_dim(x, offset, tile), one)
        position_Q = offset + jnp.arange(tile)
        mine_Q = (position_Q >= plan.begin[index]) & (position_Q < plan.end[index])
        old_QF = lax.dynamic_slice_in_dim(out_TF, offset, tile)
        new_QF = jnp.where(mine_Q[:, None], new_QF, old_QF)
        return lax.dynamic_update_slice_in_dim(out_TF, new_QF, offset, axis=0)

    out_TF = jnp.zeros((len(x), sizes["F"]), jnp.float32)
    out_TF = lax.fori_loop(0, plan.count, visit, out_TF)[:num_tokens]
    return finish(out_TF, scale_T1, group_sizes_E).astype(x_TD.dtype)


def finish(out_TF: Array, scale_T1: Array | None, group_sizes_E: Array) -> Array:
    """The products times the scales of their tokens, and zeros after the last group."""
    if scale_T1 is not None:
        out_TF = out_TF * scale_T1
    grouped_T = jnp.arange(len(out_TF)) < jnp.sum(group_sizes_E)
    return jnp.where(grouped_T[:, None], out_TF, 0)
