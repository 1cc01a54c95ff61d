"""A loop that does without an engine: the floor that `compare --against loop` measures against.

What one would write by hand for one batch: no pages, no scheduler, no sampling parameters.  All
prompts are computed in one call, then each call decodes a token of every row, until the longest
output is done.  The programs are jitted for exactly the batch at hand; the cache is contiguous and
donated.  It takes the engine's own weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import SingleDeviceSharding

from jaxinfer.bench.side import left_padded
from jaxinfer.config import ModelConfig
from jaxinfer.distribution import argmax_of_columns
from jaxinfer.errors import ConfigError
from jaxinfer.layers import apply_rope, linear, rms_norm, rope_tables

# What `ModelConfig` may say without changing the mathematics of a Llama.
FREE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
    "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling",
    "tie_word_embeddings", "bos_token_id", "eos_token_ids", "dtype",
)  # fmt: skip
HIDDEN = -1e30  # a score that is not seen; not infinite, for padding sees nothing at all

Cache = list[tuple[Array, Array]]


def check_is_llama(config: ModelConfig, who: str) -> None:
    """Raise `ConfigError` naming the first field by which a model is more than a Llama."""
    for field in dataclasses.fields(ModelConfig):
        value = getattr(config, field.name)
        if field.name not in FREE and value != field.default:
            raise ConfigError(
                f"--against {who} runs Llama's mathematics only, but the model has {field.name} = "
                f"{value!r}: choose another model, or --against transformers"
            )


def attend(
    layer: dict[str, Array],
    x_BQD: Array,
    cache: tuple[Array, Array],
    rope: tuple[Array, Array],
    start: Any,
    visible_BQS: Array,
) -> tuple[Array, tuple[Array, Array]]:
    """Write keys and values from position `start` on, attend to the first S slots."""
    rows, width, seen = visible_BQS.shape
    qkv_BQKUH = _linear(x_BQD, layer["qkv_KUHD"])
    rotated = apply_rope(qkv_BQKUH[..., :-1, :].reshape(rows * width, *_heads(layer)), *rope)
    rotated = rotated.reshape(rows, width, *rotated.shape[1:])
    q_BQKGH, k_BQKH, v_BQKH = rotated[..., :-1, :], rotated[..., -1, :], qkv_BQKUH[..., -1, :]
    k_BKSH, v_BKSH = (
        lax.dynamic_update_slice_in_dim(old, jnp.swapaxes(new, 1, 2), start, axis=2)
        for old, new in zip(cache, (k_BQKH, v_BQKH), strict=True)
    )
    scores = jnp.einsum("BQKGH,BKSH->BKGQS", q_BQKGH, k_BKSH[:, :, :seen])
    scores = scores * q_BQKGH.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(visible_BQS[:, None, None], scores, HIDDEN), axis=-1)
    out_BQKGH = jnp.einsum("BKGQS,BKSH->BQKGH", weights, v_BKSH[:, :, :seen])
    out_BQD = _linear(out_BQKGH, layer["out_DKGH"])
    return out_BQD, (k_BKSH, v_BKSH)


def _linear(x: Array, weight: Array) -> Array:
    """`layers.linear` of every token in a batch `[B, Q, …]`."""
    rows, width = x.shape[:2]
    result = linear(x.reshape(rows * width, *x.shape[2:]), weight)
    return result.reshape(rows, width, *result.shape[1:])


def _heads(layer: dict[str, Array]) -> tuple[int, int, int]:
    """K, the heads that rotate (queries and the key), H."""
    kv_heads, group, width, _ = layer["qkv_KUHD"].shape
    return kv_heads, group - 1, width


def feed_forward(layer: dict[str, Array], x_BQD: Array) -> Array:
    gate_up_BQWF = _linear(x_BQD, layer["gate_up_WFD"])
    hidden_BQF = jax.nn.silu(gate_up_BQWF[:, :, 0]) * gate_up_BQWF[:, :, 1]
    return _linear(hidden_BQF, layer["down_DF"])


def forward(
    weights: dict[str, Any],
    cache: Cache,
    tokens_BQ: Array,
    start: Any,
    pads_B: Array,
    *,
    config: ModelConfig,
    seen: int,
) -> tuple[Cache, Array]:
    """Run Q tokens of every row from position `start` on; returns the last one's logits [V, B].

    pads_B: how many positions at the front of each row are padding.  seen: slots attended to.
    """
    at_Q = start + jnp.arange(tokens_BQ.shape[1])
    positions_BQ = jnp.maximum(at_Q[None] - pads_B[:, None], 0)
    (rope,) = rope_tables(positions_BQ.reshape(-1), config).values()
    slot_S = jnp.arange(seen)
    visible_BQS = (slot_S[None, None] <= at_Q[None, :, None]) & (
        slot_S[None, None] >= pads_B[:, None, None]
    )

    def norm(x_BQD: Array, scale_D: Array) -> Array:
        return rms_norm(x_BQD, scale_D[None, None], config.rms_norm_eps)

    x_BQD, written = weights["embed_VD"][tokens_BQ], []
    for layer, pair in zip(weights["layers"], cache, strict=True):
        attended_BQD, pair = attend(
            layer, norm(x_BQD, layer["attn_norm_D"]), pair, rope, start, visible_BQS
        )
        written.append(pair)
        x_BQD += attended_BQD
        x_BQD += feed_forward(layer, norm(x_BQD, layer["mlp_norm_D"]))
    last_BD = norm(x_BQD[:, -1:], weights["final_norm_D"])[:, 0]
    head_VD = weights.get("head_VD", weights["embed_VD"])
    return written, jnp.einsum("VD,BD->VB", head_VD, last_BD)


class Loop:
    """The other side of a comparison: see `side.Side`."""

    name = "loop"
    how = "jitted for the batch, contiguous cache; mixed lengths padded on the left, to the longest"

    def __init__(self, weights: dict[str, Any], config: ModelConfig, max_batch_size: int):
        check_is_llama(config, self.name)
        self.versions = {"jax": jax.__version__}
        self._config, self._max_batch_size = config, max_batch_size
        # Without the engine's mesh: the same buffers, but nothing to say about shardings.
        self._place = SingleDeviceSharding(next(iter(weights["embed_VD"].devices())))
        self._weights = jax.device_put(weights, self._place)
        self._caches: dict[tuple[int, int], Cache] = {}
        jit = partial(jax.jit, static_argnames=("config", "seen"), donate_argnums=1)
        self._prefill, self._decode = jit(partial(_greedy, start=0)), jit(_greedy)

    def generate(self, prompts: Sequence[list[int]], lengths: Sequence[int]) -> list[list[int]]:
        """Greedy continuations of these lengths; as many batches as are needed."""
        outputs: list[list[int]] = []
        for first in range(0, len(prompts), self._max_batch_size):
            some = slice(first, first + self._max_batch_size)
            rows = self._batch(prompts[some], max(lengths[some]))
            outputs += [row[:n] for row, n in zip(rows.tolist(), lengths[some], strict=True)]
        return outputs

    def _batch(self, prompts: Sequence[list[int]], steps: int) -> np.ndarray:
        tokens_BQ, pads_B = left_padded(prompts)
        rows, width = tokens_BQ.shape
        shape = rows, width + steps
        # Stale slots are hidden until they are written again, so one cache serves every batch.
        cache = self._caches.pop(shape, None) or self._empty(*shape)
        cache, _, next_B = self._prefill(
            self._weights, cache, tokens_BQ, pads_B=pads_B, config=self._config, seen=width
        )
        found = [next_B]
        for position in range(width, width + steps - 1):
            cache, _, next_B = self._decode(
                self._weights, cache, next_B[:, None], pads_B=pads_B, config=self._config,
                start=np.int32(position), seen=shape[1],
            )  # fmt: skip
            found.append(next_B)
        self._caches[shape] = cache
        return np.stack([np.asarray(tokens_B) for tokens_B in found], axis=1)

    def _empty(self, rows: int, slots: int) -> Cache:
        sizes = self._config.sizes
        shape = rows, sizes["K"], slots, sizes["H"]
        dtype = self._weights["embed_VD"].dtype

        def zeros() -> Array:  # placed as what the programs return, or they are compiled twice
            return jnp.zeros(shape, dtype, device=self._place)

        return [(zeros(), zeros()) for _ in range(sizes["L"])]

    def next_scores(self, tokens: list[int]) -> np.ndarray:
        """Logits [V] of the token that follows these."""
        width = -(-len(tokens) // 64) * 64  # few programs for all lengths
        pads = np.array([width - len(tokens)], np.int32)
        padded = np.array([[0] * pads[0] + tokens], np.int32)
        _, logits_VB, _ = self._prefill(
            self._weights, self._empty(1, width), padded, pads_B=pads, config=self._config,
            seen=width,
        )  # fmt: skip
        return np.asarray(logits_VB[:, 0])

    def close(self) -> None:
        self._caches.clear()


def _greedy(weights, cache, tokens_BQ, *, start, pads_B, config, seen):
    cache, logits_VB = forward(weights, cache, tokens_BQ, start, pads_B, config=config, seen=seen)
    return cache, logits_VB, argmax_of_columns(logits_VB)
