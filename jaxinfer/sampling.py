"""From logits to tokens and log-probabilities, on the device.

Each feature stands under `lax.cond` on a bit mask over the rows of the step: what no row asks for
costs nothing, and there is one program, not one per combination.  A row's result depends on its own
logits, parameters and history only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from jaxinfer.distribution import argmax, argmax_of_columns, masses, pick, top
from jaxinfer.layout import Layout
from jaxinfer.request import (
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_TOKEN_IDS,
    Request,
)
from jaxinfer.shapes import Leaf

SAMPLED, FILTERED, PENALISED, BIASED, BAD_WORDS, MIN_TOKENS, LOGPROBS, TOP_LOGPROBS = (
    1 << bit for bit in range(8)
)

# Positions of the history that one iteration of the penalties' loop counts.
HISTORY_CHUNK = 512


@struct.dataclass
class SamplingTable:
    """Sampling parameters on the device, a row per slot and one for padding.

    top_k_B: 0 is off.  min_len_B: prompt_len plus min_tokens, at most the request's limit.  Lists
    of token ids are padded with -1 on the right, bad words (X of them, of up to C tokens) on the
    left.
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

    tokens_B: Leaf
    logprobs_B: Leaf
    ranks_B: Leaf
    top_ids_BC: Leaf
    top_logprobs_BC: Leaf


@cache
def sampled_layout(rows: int) -> Layout:
    """How `Sampled` for so many rows lies in one array."""

    def shape(dtype: type, *more: int) -> Any:
        return jax.ShapeDtypeStruct((rows, *more), dtype)

    return Layout(
        Sampled(
            tokens_B=shape(np.int32),
            logprobs_B=shape(np.float32),
            ranks_B=shape(np.int32),
            top_ids_BC=shape(np.int32, MAX_LOGPROBS),
            top_logprobs_BC=shape(np.float32, MAX_LOGPROBS),
        )
    )


class SamplingRows:
    """The table's mirror on the host; uploads only what changed.

    features_B: each slot's feature bits.
    """

    def __init__(self, num_slots: int, put: Callable[[np.ndarray], Any]):
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
        # Slots whose row of a wide array holds something.
        self._filled: dict[str, set[int]] = {
            name: set() for name in ("stop_ids_BC", "bias_ids_BC", "bias_BC", "bad_words_BXC")
        }
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
            # No more than can come: the sum of any two would not fit into 32 bits.
            "min_len_B": min(request.prompt_len + params.min_tokens, request.limit),
        }
        for name, value in narrow.items():
            row = self._rows[name]
            if row[slot] != value:
                row[slot] = value
                self._dirty.add(name)
        bias = params.logit_bias or {}
        self._set_wide("stop_ids_BC", slot, request.stop_ids if params.min_tokens else ())
        self._set_wide("bias_ids_BC", slot, tuple(bias))
        self._set_wide("bias_BC", slot, tuple(bias.values()))
        width = MAX_BAD_WORD_TOKENS
        words = [(-1,) * (width - len(word)) + word for word in request.bad_words]
        self._set_wide("bad_words_BXC", slot, words)
        self.features_B[slot] = _features(request)

    def _set_wide(self, name: str, slot: int, values: Sequence[Any]) -> None:
        """Enter a list; most requests have none, and most slots had none before."""
        if not values and slot not in self._filled[name]:
            return
        row = self._rows[name][slot]
        row[:] = 0 if name == "bias_BC" else -1
        row[: len(values)] = values or 0
        self._dirty.add(name)
        (self._filled[name].add if values else self._filled[name].discard)(slot)

    def table(self) -> SamplingTable:
        """The table on the device; arrays that did not change are the ones of the last call."""
        if self._dirty:
            for name in self._dirty:
                self._device[name] = self._put(self._rows[name].copy())
            self._dirty.clear()
            self._table = SamplingTable(**self._device)
        return self._table


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
    logits_VB: Array,
    history_BT: Array,
    table: SamplingTable,
    slots_B: Array,
    positions_B: Array,
    targets_B: Array,
    features: Array,
) -> Sampled:
    """Choose the token that follows each selected position.

    logits_VB: the model's scores, float32.  history_BT: each slot's tokens by position, valid up to
    `positions_B`.  slots_B: the row of table and history of each.  targets_B: a known next token,
    to score it, or -1 to choose one.  There may be more of these than columns of logits; those
    beyond are not read.  features: OR of the rows' feature bits.
    """
    rows, whole = logits_VB.shape[1], (slots_B, positions_B, targets_B)

    def likeliest() -> Sampled:
        return Sampled(argmax_of_columns(logits_VB), *_no_logprobs(rows))

    def by_features() -> Sampled:
        # Here and not before: what a branch is given is copied first, but for whole arrays.
        slots_B, positions_B, targets_B = (leaf[:rows] for leaf in whole)
        row = jax.tree.map(lambda leaf: leaf[slots_B], table)
        raw_BV = logits_VB.T
        scores_BV = adjust(raw_BV, history_BT, row, slots_B, positions_B, features)
        greedy_B = argmax(scores_BV)

        def drawn() -> Array:
            drawn_B = _draw(scores_BV, row, positions_B, features)
            return jnp.where(row.temperature_B > 0, drawn_B, greedy_B)

        tokens_B = lax.cond(features & SAMPLED != 0, drawn, lambda: greedy_B)
        tokens_B = jnp.where(targets_B >= 0, targets_B, tokens_B)
        return Sampled(tokens_B, *_logprobs(raw_BV, tokens_B, features))

    return lax.cond(features == 0, likeliest, by_features)


def adjust(
    logits_BV: Array,
    history_BT: Array,
    row: SamplingTable,
    slots_B: Array,
    positions_B: Array,
    features: Array,
) -> Array:
    """The scores to choose by: logits after bias, bans and penalties, in this order.

    row: the table's rows of these slots; the rest as in `sample`.
    """
    history = history_BT, slots_B, positions_B
    steps: tuple[tuple[int, Callable[[Array], Array]], ...] = (
        (BIASED, lambda scores: _add_bias(scores, row)),
        (MIN_TOKENS, lambda scores: _forbid_stops(scores, row, positions_B)),
        (BAD_WORDS, lambda scores: _forbid_words(scores, row, *history)),
        (PENALISED, lambda scores: _penalise(scores, row, *history)),
    )
    scores_BV = logits_BV
    for bit, step in steps:
        scores_BV = lax.cond(features & bit != 0, step, lambda scores: scores, scores_BV)
    return scores_BV


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


def _draw(scores_BV: Array, row: SamplingTable, positions_B: Array, features: Array) -> Array:
    """One token per row from its distribution; of greedy rows any."""
    mass_BV = masses(
        scores_BV,
        temperature_B=jnp.where(row.temperature_B > 0, row.temperature_B, 1.0),
        min_p_B=row.min_p_B,
        top_k_B=row.top_k_B,
        top_p_B=row.top_p_B,
        filtered=features & FILTERED != 0,
    )
    return pick(mass_BV, _uniform(row, positions_B))


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

    def wanted(raw_BV: Array) -> tuple[Array, ...]:
        peak_B1 = jnp.max(raw_BV, axis=-1, keepdims=True)
        total_B1 = jnp.log(jnp.sum(jnp.exp(raw_BV - peak_B1), axis=-1, keepdims=True))
        chosen_B1 = jnp.take_along_axis(raw_BV, tokens_B[:, None], axis=-1)
        rank_B = 1 + jnp.sum(jnp.where(raw_BV > chosen_B1, 1.0, 0.0), axis=-1).astype(jnp.int32)

        def likeliest(raw_BV: Array) -> tuple[Array, Array]:
            values, ids = top(raw_BV, count)
            pad = [(0, 0), (0, MAX_LOGPROBS - count)]
            return (
                jnp.pad(ids, pad),
                jnp.pad(values - peak_B1 - total_B1, pad, constant_values=-jnp.inf),
            )

        best = lax.cond(
            features & TOP_LOGPROBS != 0, likeliest, lambda _: _no_logprobs(rows)[2:], raw_BV
        )
        return (chosen_B1 - peak_B1 - total_B1)[:, 0], rank_B, *best

    return lax.cond(features & LOGPROBS != 0, wanted, lambda _: _no_logprobs(rows), raw_BV)


def _no_logprobs(rows: int) -> tuple[Array, ...]:
    """What stands for log-probability, rank, and both of the likeliest where nobody asks."""
    wide = rows, MAX_LOGPROBS
    return (
        jnp.zeros(rows, jnp.float32),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros(wide, jnp.int32),
        jnp.zeros(wide, jnp.float32),
    )
