"""From scores to a distribution, and from a distribution to one of its tokens.

Everything is exact about ties and goes over the vocabulary in few passes: nothing is sorted.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

# Reductions over the vocabulary go in blocks: on CPU a plain argmax is many times slower.
BLOCK = 128


def _blocks(values_BV: Array, fill: float) -> Array:
    """`[B, V]` as `[B, V / BLOCK, BLOCK]`, padded with `fill`."""
    rows, size = values_BV.shape
    padded = jnp.pad(values_BV, [(0, 0), (0, -size % BLOCK)], constant_values=fill)
    return padded.reshape(rows, -1, BLOCK)


def argmax(scores_BV: Array) -> Array:
    """The first largest entry of each row, int32: find the block, then look inside it."""
    blocks = _blocks(scores_BV, -jnp.inf)
    block_B = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1)
    inside = jnp.take_along_axis(blocks, block_B[:, None, None], axis=1)[:, 0]
    return (block_B * BLOCK + jnp.argmax(inside, axis=-1)).astype(jnp.int32)


def argmax_of_columns(scores_VB: Array) -> Array:
    """The first largest entry of each column, int32; of one with NaN, some entry."""
    index_V1 = jnp.arange(len(scores_VB), dtype=jnp.int32)[:, None]
    is_peak_VB = scores_VB == jnp.max(scores_VB, axis=0, keepdims=True)
    return jnp.min(jnp.where(is_peak_VB, index_V1, len(scores_VB) - 1), axis=0)


def top(scores_BV: Array, count: int) -> tuple[Array, Array]:
    """Values and int32 indices of the `count` largest entries of each row, the first of equals.

    They lie in the `count` blocks with the largest maxima.
    """
    blocks = _blocks(scores_BV, -jnp.inf)
    if blocks.shape[1] <= count:
        return lax.top_k(scores_BV, count)
    # In order of the vocabulary, so that of equals the first stays the first.
    best_BC = jnp.sort(lax.top_k(jnp.max(blocks, axis=-1), count)[1], axis=-1)
    inside = jnp.take_along_axis(blocks, best_BC[..., None], axis=1)
    values_BC, where_BC = lax.top_k(inside.reshape(len(inside), -1), count)
    block_BC = jnp.take_along_axis(best_BC, where_BC // BLOCK, axis=1)
    return values_BC, block_BC * BLOCK + where_BC % BLOCK


def masses(
    scores_BV: Array,
    *,
    temperature_B: Array,
    min_p_B: Array,
    top_k_B: Array,
    top_p_B: Array,
    filtered: Array,
) -> Array:
    """Probabilities, the likeliest token's scaled to 1, of what min-p, top-k and top-p leave.

    Scores are divided by the temperature (above 0) first.  Min-p keeps tokens with this fraction of
    the likeliest one's probability; top-k (0: off) the k likeliest and what equals the last of
    them; top-p, of what these two left, the fewest likeliest tokens with this share of probability,
    the first of equals.  filtered: false if all of these are off in every row.
    """
    size = scores_BV.shape[1]
    # The peak is taken off first: a tiny temperature would make it infinite.
    peak_B = jnp.max(scores_BV, axis=-1)
    mass_BV = jnp.exp((scores_BV - peak_B[:, None]) / temperature_B[:, None])

    def everything() -> tuple[Array, Array]:
        return jnp.full_like(peak_B, -jnp.inf), jnp.full(peak_B.shape, size)

    def some() -> tuple[Array, Array]:
        # Compared as scores, since different ones may round to equal probabilities.
        least_B = peak_B + temperature_B * jnp.log(min_p_B)
        least_B = jnp.maximum(least_B, _top_k(scores_BV, top_k_B))
        return _top_p(scores_BV, mass_BV, least_B, top_p_B, peak_B, temperature_B)

    least_B, last_B = lax.cond(filtered, some, everything)
    is_first_BV = jnp.arange(size)[None] <= last_B[:, None]
    keep_BV = scores_BV > least_B[:, None]
    keep_BV |= (scores_BV == least_B[:, None]) & is_first_BV
    return jnp.where(keep_BV, mass_BV, 0.0)


def _top_k(scores_BV: Array, top_k_B: Array) -> Array:
    """A score per row that the k largest reach and no others but the k-th one's equals; 0: -inf."""
    maxima = jnp.sort(jnp.max(_blocks(scores_BV, -jnp.inf), axis=-1), axis=-1)
    # The k-th largest of the blocks' maxima has at least k scores from it on.
    at_B1 = maxima.shape[1] - top_k_B[:, None]
    floor_B = jnp.take_along_axis(maxima, jnp.clip(at_B1, 0, maxima.shape[1] - 1), axis=1)[:, 0]
    floor_B = jnp.where((top_k_B > 0) & (at_B1[:, 0] >= 0), floor_B, -jnp.inf)
    wanted_B = jnp.where(top_k_B > 0, top_k_B.astype(jnp.float32), jnp.inf)
    return _smallest_set(scores_BV, jnp.ones_like(scores_BV), floor_B, wanted_B, jnp.ones_like)[0]


def _top_p(
    scores_BV: Array,
    mass_BV: Array,
    floor_B: Array,
    top_p_B: Array,
    peak_B: Array,
    temperature_B: Array,
) -> tuple[Array, Array]:
    """What top-p leaves of the scores from the floor on: those above the score that is returned,
    and those at it up to the index that is returned."""
    size = scores_BV.shape[1]

    def unit(score_B: Array) -> Array:
        return jnp.maximum(jnp.exp((score_B - peak_B) / temperature_B), jnp.finfo(jnp.float32).tiny)

    mass_BV = jnp.where(scores_BV >= floor_B[:, None], mass_BV, 0.0)
    wanted_B = jnp.where(top_p_B < 1, top_p_B * jnp.sum(mass_BV, axis=-1), jnp.inf)
    least_B, excess_B = _smallest_set(scores_BV, mass_BV, floor_B, wanted_B, unit)
    spare_B = jnp.floor(excess_B / unit(least_B))  # tied tokens that are too many

    def cut() -> Array:
        ties_BV = (scores_BV == least_B[:, None]).astype(jnp.float32)
        count_B = jnp.sum(ties_BV, axis=-1)
        enough_B = jnp.maximum(count_B - spare_B, 1)
        return jnp.where(spare_B > 0, pick(ties_BV, (enough_B - 0.5) / count_B), size)

    def all_ties() -> Array:
        return jnp.full(spare_B.shape, size)

    return least_B, lax.cond(jnp.any(spare_B > 0), cut, all_ties)


def _smallest_set(
    scores_BV: Array,
    weights_BV: Array,
    floor_B: Array,
    wanted_B: Array,
    unit: Callable[[Array], Array],
) -> tuple[Array, Array]:
    """The smallest set of highest scores per row that has the wanted weight, or all from the floor.

    unit: the weight of a token with this score.  Returns the least score in the set, and how much
    its weight exceeds the wanted: by a unit or more only if tokens are tied for the last place.

    Bisection over the float's bits: one or two dozen passes over the scores, at most 32, where
    sorting them costs hundreds.  A row is done when its set cannot spare its last token.
    """

    def excess(least_B: Array) -> Array:
        inside_BV = jnp.where(scores_BV >= least_B[:, None], weights_BV, 0.0)
        return jnp.sum(inside_BV, axis=-1) - wanted_B

    def active(low_B: Array, high_B: Array, excess_B: Array) -> Array:
        return (low_B < high_B) & (excess_B >= unit(_unordered(low_B)))

    def halve(bounds: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        low_B, high_B, excess_B = bounds
        middle_B = (low_B | high_B) - ((low_B ^ high_B) >> 1)  # rounded up
        new_B = excess(_unordered(middle_B))
        # A row that is done must not move on because another is not; NaN must end, too.
        active_B = active(*bounds)
        raise_B, lower_B = active_B & (new_B >= 0), active_B & ~(new_B >= 0)
        return (
            jnp.where(raise_B, middle_B, low_B),
            jnp.where(lower_B, middle_B - 1, high_B),
            jnp.where(raise_B, new_B, excess_B),
        )

    high_B = _ordered(jnp.max(scores_BV, axis=-1))
    low_B, _, excess_B = lax.while_loop(
        lambda bounds: jnp.any(active(*bounds)),
        halve,
        (_ordered(floor_B), high_B, excess(floor_B)),
    )
    return _unordered(low_B), excess_B


def _ordered(values: Array) -> Array:
    """Float32 as int32 in the same order; both zeros are 0."""
    bits = lax.bitcast_convert_type(values, jnp.int32)
    return jnp.where(bits < 0, jnp.iinfo(jnp.int32).min - bits, bits)


def _unordered(order: Array) -> Array:
    """The inverse of `_ordered`."""
    bits = jnp.where(order < 0, jnp.iinfo(jnp.int32).min - order, order)
    return lax.bitcast_convert_type(bits, jnp.float32)


def pick(weights_BV: Array, share_B: Array) -> Array:
    """The first index per row up to which lies more than this share, under 1, of all weight."""
    return _find(weights_BV, share_B * jnp.sum(weights_BV, axis=-1))[0]


def _find(weights_BV: Array, target_B: Array) -> tuple[Array, Array]:
    """The first index whose running sum exceeds the target, and what of the target lies inside it.

    If rounding has put the target past the end, the last token that has weight.
    """
    size = weights_BV.shape[1]
    if size > BLOCK:
        blocks = _blocks(weights_BV, 0.0)
        block_B, target_B = _find(jnp.sum(blocks, axis=-1), target_B)
        inside = jnp.take_along_axis(blocks, block_B[:, None, None], axis=1)[:, 0]
        index_B, target_B = _find(inside, target_B)
        return block_B * BLOCK + index_B, target_B
    # A sum each rather than a scan: what has no weight leaves it as it was to the last bit.
    up_to = jnp.triu(jnp.ones((1, size, size), bool))
    sums_BV = jnp.sum(jnp.where(up_to, weights_BV[:, :, None], 0.0), axis=1)
    below_BV = (sums_BV <= target_B[:, None]) & (sums_BV < sums_BV[:, -1:])
    before_B = jnp.max(jnp.where(below_BV, sums_BV, 0.0), axis=-1)
    index_B = jnp.sum(below_BV.astype(jnp.float32), axis=-1).astype(jnp.int32)
    return index_B, jnp.maximum(target_B - before_B, 0.0)
