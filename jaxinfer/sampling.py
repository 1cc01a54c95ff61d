"""From logits to tokens and log-probabilities, on the device.

Each feature stands under `lax.cond` on a bit mask over the rows of the step: what no row asks for
costs nothing, and there is one program, not one per combination.  A row's result depends on its own
logits, parameters and history only.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from jaxinfer.request import (
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_TOKEN_IDS,
    Request,
)

SAMPLED, FILTERED, PENALISED, BIASED, BAD_WORDS, MIN_TOKENS, LOGPROBS, TOP_LOGPROBS = (
    1 << bit for bit in range(8)
)

# Reductions over the vocabulary go in blocks: on CPU a plain argmax is many times slower.
BLOCK = 128
# Positions of the history that one iteration of the penalties' loop counts.
HISTORY_CHUNK = 512


@struct.dataclass
class SamplingTable:
    """Sampling parameters on the device, a row per slot and one for padding.

    top_k_B: 0 is off.  min_len_B: prompt_len plus min_tokens.  Lists of token ids are padded with
    -1 on the right, bad words (X of them, of up to C tokens) on the left.
    """

    temperature_B: Array
    top_k_B: Array
    top_p_B: Array
    min_p_B: Array
    repetition_penalty_B: Array
    presence_penalty_B: Array
    frequency_penalty_B: Array
    seed_high_B: Array
    seed_low_B: Array
    sample_index_B: Array
    prompt_len_B: Array
    min_len_B: Array
    stop_ids_BC: Array
    bias_ids_BC: Array
    bias_BC: Array
    bad_words_BXC: Array


@struct.dataclass
class Sampled:
    """Chosen tokens, their log-probability and rank (1: likeliest), and the likeliest candidates.

    All but `tokens_B` are zeros unless a row of the step asked for log-probabilities.
    """

    tokens_B: Array
    logprobs_B: Array
    ranks_B: Array
    top_ids_BC: Array
    top_logprobs_BC: Array


class SamplingRows:
    """The table's mirror on the host; uploads only what changed.

    features_B: each slot's feature bits.
    """

    _WIDE = ("stop_ids_BC", "bias_ids_BC", "bias_BC", "bad_words_BXC")

    def __init__(self, num_slots: int, put: Callable[[np.ndarray], Array]):
        def full(value: float, dtype: type, *shape: int) -> np.ndarray:
            return np.full((num_slots, *shape), value, dtype)

        self._put = put
        self._rows = {
            "temperature_B": full(0, np.float32),
            "top_k_B": full(0, np.int32),
            "top_p_B": full(1, np.float32),
            "min_p_B": full(0, np.float32),
            "repetition_penalty_B": full(1, np.float32),
            "presence_penalty_B": full(0, np.float32),
            "frequency_penalty_B": full(0, np.float32),
            "seed_high_B": full(0, np.uint32),
            "seed_low_B": full(0, np.uint32),
            "sample_index_B": full(0, np.int32),
            "prompt_len_B": full(0, np.int32),
            "min_len_B": full(0, np.int32),
            "stop_ids_BC": full(-1, np.int32, 2 * MAX_STOP_TOKEN_IDS),
            "bias_ids_BC": full(-1, np.int32, MAX_LOGIT_BIAS),
            "bias_BC": full(0, np.float32, MAX_LOGIT_BIAS),
            "bad_words_BXC": full(-1, np.int32, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS),
        }
        self._dirty = set(self._rows)
        self._device: dict[str, Array] = {}
        self.features_B = np.zeros(num_slots, np.int32)

    def set(self, slot: int, request: Request) -> None:
        """Enter the parameters of the request that has got this slot."""
        params = request.params
        narrow = {
            "temperature_B": params.temperature,
            "top_k_B": max(params.top_k, 0),
            "top_p_B": params.top_p,
            "min_p_B": params.min_p,
            "repetition_penalty_B": params.repetition_penalty,
            "presence_penalty_B": params.presence_penalty,
            "frequency_penalty_B": params.frequency_penalty,
            "seed_high_B": request.seed >> 32,
            "seed_low_B": request.seed & 0xFFFFFFFF,
            "sample_index_B": request.index,
            "prompt_len_B": request.prompt_len,
            "min_len_B": request.prompt_len + params.min_tokens,
        }
        for name, value in narrow.items():
            self._change(name, slot, np.asarray(value, self._rows[name].dtype))
        bias = params.logit_bias or {}
        for name, values in (
            ("stop_ids_BC", request.stop_ids if params.min_tokens else ()),
            ("bias_ids_BC", tuple(bias)),
            ("bias_BC", tuple(bias.values())),
        ):
            row = np.full_like(self._rows[name][slot], 0 if name == "bias_BC" else -1)
            row[: len(values)] = values
            self._change(name, slot, row)
        words = np.full_like(self._rows["bad_words_BXC"][slot], -1)
        for index, word in enumerate(request.bad_words):
            words[index, words.shape[1] - len(word) :] = word
        self._change("bad_words_BXC", slot, words)
        self.features_B[slot] = _features(request)

    def _change(self, name: str, slot: int, value: np.ndarray) -> None:
        if not np.array_equal(self._rows[name][slot], value):
            self._rows[name][slot] = value
            self._dirty.add(name)

    def table(self) -> SamplingTable:
        """The table on the device; arrays that did not change are the ones of the last call."""
        for name in self._dirty:
            self._device[name] = self._put(self._rows[name].copy())
        self._dirty.clear()
        return SamplingTable(**self._device)


def _features(request: Request) -> int:
    params = request.params
    filtered = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
    penalised = (
        params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
    )
    return (
        SAMPLED * (params.temperature > 0)
        | FILTERED * (params.temperature > 0 and filtered)
        | PENALISED * bool(penalised)
        | BIASED * bool(params.logit_bias)
        | BAD_WORDS * bool(request.bad_words)
        | MIN_TOKENS * (params.min_tokens > 0)
        | LOGPROBS * (params.logprobs is not None or params.prompt_logprobs is not None)
        | TOP_LOGPROBS * bool(params.logprobs or params.prompt_logprobs)
    )


def sample(
    logits_BV: Array,
    history_BT: Array,
    table: SamplingTable,
    slots_B: Array,
    positions_B: Array,
    targets_B: Array,
    features: Array,
) -> Sampled:
    """Choose the token that follows each selected position.

    logits_BV: the model's scores, float32.  history_BT: each slot's tokens by position, valid up to
    `positions_B`.  slots_B: the row of table and history of each.  targets_B: a known next token,
    to score it, or -1 to choose one.  features: OR of the rows' feature bits.
    """
    row = jax.tree.map(lambda leaf: leaf[slots_B], table)
    raw_BV = logits_BV.astype(jnp.float32)

    def given(bits: int, apply: Callable[[Array], Array], value: Array) -> Array:
        return lax.cond(features & bits != 0, apply, lambda value: value, value)

    scores_BV = given(BIASED, lambda x: _add_bias(x, row), raw_BV)
    scores_BV = given(MIN_TOKENS, lambda x: _forbid_stops(x, row, positions_B), scores_BV)
    scores_BV = given(
        BAD_WORDS, lambda x: _forbid_words(x, row, history_BT, slots_B, positions_B), scores_BV
    )
    scores_BV = given(
        PENALISED, lambda x: _penalise(x, row, history_BT, slots_B, positions_B), scores_BV
    )
    tokens_B = given(
        SAMPLED,
        lambda greedy_B: jnp.where(
            row.temperature_B > 0, _draw(scores_BV, row, positions_B, features), greedy_B
        ),
        argmax(scores_BV),
    )
    tokens_B = jnp.where(targets_B >= 0, targets_B, tokens_B)
    return Sampled(tokens_B, *_logprobs(raw_BV, tokens_B, features))


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


def _scatter_rows(ids_BC: Array) -> tuple[Array, Array]:
    """Row and column indices of lists of token ids; -1 becomes a column that is dropped."""
    rows = jnp.broadcast_to(jnp.arange(len(ids_BC))[:, None], ids_BC.shape)
    return rows, jnp.where(ids_BC < 0, jnp.iinfo(jnp.int32).max, ids_BC)


def _add_bias(scores_BV: Array, row: SamplingTable) -> Array:
    where = _scatter_rows(row.bias_ids_BC)
    return scores_BV.at[where].add(row.bias_BC, mode="drop")


def _forbid_stops(scores_BV: Array, row: SamplingTable, positions_B: Array) -> Array:
    too_early_B = positions_B + 1 < row.min_len_B
    ids_BC = jnp.where(too_early_B[:, None], row.stop_ids_BC, -1)
    return scores_BV.at[_scatter_rows(ids_BC)].set(-jnp.inf, mode="drop")


def _forbid_words(
    scores_BV: Array, row: SamplingTable, history_BT: Array, slots_B: Array, positions_B: Array
) -> Array:
    """Forbid the last token of each bad word whose other tokens are the latest ones."""
    words_BXC = row.bad_words_BXC
    length = words_BXC.shape[-1] - 1
    at_BC = positions_B[:, None] - jnp.arange(length - 1, -1, -1)[None]
    latest_BC = jnp.where(at_BC >= 0, history_BT[slots_B[:, None], at_BC], -2)
    begin_BXC = words_BXC[..., :-1]
    matches_BX = jnp.all((begin_BXC == latest_BC[:, None]) | (begin_BXC < 0), axis=-1)
    return scores_BV.at[_scatter_rows(jnp.where(matches_BX, words_BXC[..., -1], -1))].set(
        -jnp.inf, mode="drop"
    )


def _penalise(
    scores_BV: Array, row: SamplingTable, history_BT: Array, slots_B: Array, positions_B: Array
) -> Array:
    """Repetition, frequency and presence penalties; counts come from the history, in chunks."""
    width = history_BT.shape[1]
    chunk = min(HISTORY_CHUNK, width)
    off = (row.repetition_penalty_B == 1) & (row.presence_penalty_B == 0)
    off &= row.frequency_penalty_B == 0
    lens_B = jnp.where(off, 0, positions_B + 1)

    def count(index: Array, counts: tuple[Array, Array]) -> tuple[Array, Array]:
        seen_BV, output_BV = counts
        at_T = index * chunk + jnp.arange(chunk)
        ids_BT = history_BT[slots_B[:, None], jnp.minimum(at_T, width - 1)[None]]
        ids_BT = jnp.where(at_T[None] < lens_B[:, None], ids_BT, -1)
        where = _scatter_rows(ids_BT)
        is_output_BT = (at_T[None] >= row.prompt_len_B[:, None]).astype(jnp.float32)
        return (
            seen_BV.at[where].set(True, mode="drop"),
            output_BV.at[where].add(is_output_BT, mode="drop"),
        )

    zeros = jnp.zeros(scores_BV.shape, bool), jnp.zeros(scores_BV.shape, jnp.float32)
    seen_BV, output_BV = lax.fori_loop(0, -(-jnp.max(lens_B) // chunk), count, zeros)
    factor_B1 = row.repetition_penalty_B[:, None]
    repeated_BV = jnp.where(scores_BV > 0, scores_BV / factor_B1, scores_BV * factor_B1)
    scores_BV = jnp.where(seen_BV, repeated_BV, scores_BV)
    scores_BV -= row.frequency_penalty_B[:, None] * output_BV
    return scores_BV - row.presence_penalty_B[:, None] * (output_BV > 0)


def _ordered(values: Array) -> Array:
    """Float32 as int32 in the same order."""
    bits = lax.bitcast_convert_type(values, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _largest_threshold(holds: Callable[[Array], Array], rows: int) -> Array:
    """Bisection: the largest int32 per row for which `holds` (true at the bottom, monotone)."""
    low_B = jnp.full(rows, jnp.iinfo(jnp.int32).min)
    high_B = jnp.full(rows, jnp.iinfo(jnp.int32).max)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low_B, high_B = bounds
        # The mean without overflow, rounded up so that the interval always shrinks.
        middle_B = (low_B >> 1) + (high_B >> 1) + (low_B & high_B & 1) + ((low_B ^ high_B) & 1)
        good_B = holds(middle_B)
        return jnp.where(good_B, middle_B, low_B), jnp.where(good_B, high_B, middle_B - 1)

    return lax.fori_loop(0, 32, halve, (low_B, high_B))[0]


def keep_mask(scores_BV: Array, row: SamplingTable) -> Array:
    """Tokens that min-p, top-k and top-p leave of scores that temperature has divided.

    Top-p looks at what the other two left.  Thresholds are found by bisection over the float's
    bits: 32 passes over the scores, where sorting them costs a hundred times a pass.
    """
    rows, size = scores_BV.shape
    peak_B1 = jnp.max(scores_BV, axis=-1, keepdims=True)
    keep_BV = scores_BV >= peak_B1 + jnp.log(row.min_p_B)[:, None]
    order_BV = _ordered(scores_BV)
    count_B = jnp.where(row.top_k_B > 0, jnp.minimum(row.top_k_B, size), size)
    threshold_B = _largest_threshold(
        lambda least_B: jnp.sum(order_BV >= least_B[:, None], axis=-1) >= count_B, rows
    )
    keep_BV &= order_BV >= threshold_B[:, None]
    mass_BV = jnp.where(keep_BV, jnp.exp(scores_BV - peak_B1), 0.0)
    wanted_B = row.top_p_B * jnp.sum(mass_BV, axis=-1)
    threshold_B = _largest_threshold(
        lambda least_B: (
            jnp.sum(jnp.where(order_BV >= least_B[:, None], mass_BV, 0.0), axis=-1) >= wanted_B
        ),
        rows,
    )
    return keep_BV & ((order_BV >= threshold_B[:, None]) | (row.top_p_B >= 1)[:, None])


def _draw(scores_BV: Array, row: SamplingTable, positions_B: Array, features: Array) -> Array:
    """One token per row from the filtered softmax, by its inverse distribution function."""
    temperature_B1 = jnp.where(row.temperature_B > 0, row.temperature_B, 1.0)[:, None]
    scores_BV = scores_BV / temperature_B1
    keep_BV = lax.cond(
        features & FILTERED != 0,
        lambda scores: keep_mask(scores, row),
        lambda scores: jnp.ones(scores.shape, bool),
        scores_BV,
    )
    peak_B1 = jnp.max(scores_BV, axis=-1, keepdims=True)
    mass_BV = jnp.where(keep_BV, jnp.exp(scores_BV - peak_B1), 0.0)
    blocks = _blocks(mass_BV, 0.0)
    sums = jnp.cumsum(jnp.sum(blocks, axis=-1), axis=-1)
    target_B = _uniform(row, positions_B) * sums[:, -1]
    block_B = _first_above(sums, target_B)
    inside = jnp.take_along_axis(blocks, block_B[:, None, None], axis=1)[:, 0]
    before_B = jnp.where(
        block_B > 0, jnp.take_along_axis(sums, jnp.maximum(block_B - 1, 0)[:, None], 1)[:, 0], 0.0
    )
    token_B = _first_above(jnp.cumsum(inside, axis=-1) + before_B[:, None], target_B, inside > 0)
    return (block_B * BLOCK + token_B).astype(jnp.int32)


def _first_above(sums: Array, target_B: Array, possible: Array | None = None) -> Array:
    """Index of the first sum above the target; rounding may leave none, then the last that grew."""
    if possible is None:
        possible = jnp.diff(sums, axis=-1, prepend=0.0) > 0
    index = jnp.arange(sums.shape[-1])[None]
    above = (sums > target_B[:, None]) & possible
    last = jnp.max(jnp.where(possible, index, 0), axis=-1)
    return jnp.where(jnp.any(above, axis=-1), jnp.argmax(above, axis=-1), last)


def _uniform(row: SamplingTable, positions_B: Array) -> Array:
    """A number in [0, 1) per row, from seed, sample index and position of the new token alone."""

    def one(high: Array, low: Array, index: Array, position: Array) -> Array:
        key = jax.random.wrap_key_data(jnp.stack([high, low]), impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, index), position))

    return jax.vmap(one)(row.seed_high_B, row.seed_low_B, row.sample_index_B, positions_B + 1)


def _logprobs(raw_BV: Array, tokens_B: Array, features: Array) -> tuple[Array, ...]:
    """Log-probability and rank of the tokens and of the likeliest, under the raw logits."""
    rows, size = raw_BV.shape
    count = min(MAX_LOGPROBS, size)

    def nothing(raw_BV: Array) -> tuple[Array, Array]:
        return (
            jnp.zeros((rows, MAX_LOGPROBS), jnp.int32),
            jnp.zeros((rows, MAX_LOGPROBS), jnp.float32),
        )

    def top(logprobs_BV: Array) -> tuple[Array, Array]:
        values, ids = lax.top_k(logprobs_BV, count)
        pad = [(0, 0), (0, MAX_LOGPROBS - count)]
        return (
            jnp.pad(ids, pad).astype(jnp.int32),
            jnp.pad(values, pad, constant_values=-jnp.inf),
        )

    def wanted(raw_BV: Array) -> tuple[Array, ...]:
        logprobs_BV = jax.nn.log_softmax(raw_BV)
        chosen_B1 = jnp.take_along_axis(logprobs_BV, tokens_B[:, None], axis=-1)
        rank_B = 1 + jnp.sum(logprobs_BV > chosen_B1, axis=-1, dtype=jnp.int32)
        likeliest = lax.cond(features & TOP_LOGPROBS != 0, top, nothing, logprobs_BV)
        return chosen_B1[:, 0], rank_B, *likeliest

    def unwanted(raw_BV: Array) -> tuple[Array, ...]:
        return jnp.zeros(rows, jnp.float32), jnp.zeros(rows, jnp.int32), *nothing(raw_BV)

    return lax.cond(features & LOGPROBS != 0, wanted, unwanted, raw_BV)
