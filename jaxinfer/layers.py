"""The mathematics that decoders are made of: pure functions of arrays.

Sums of squares, rotations and attention weights are computed in float32 whatever the dtype.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import PartitionSpec

from jaxinfer.config import ModelConfig, RopeScaling
from jaxinfer.kernels.choice import PageOps
from jaxinfer.kernels.gated_quantize import ACTIVATIONS
from jaxinfer.kernels.paged_attention import capped
from jaxinfer.kernels.rows import Rows
from jaxinfer.kernels.write_pages import Pool
from jaxinfer.shapes import dims
from jaxinfer.shardings import spec


def rms_norm(x: Array, scale: Array, eps: float, offset: float = 0.0, axes: int = 1) -> Array:
    """Root-mean-square normalisation of the last `axes` axes (arXiv:1910.07467).

    The result is multiplied by `scale + offset`, in float32: 1 + w has more digits than bfloat16.
    """
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(x32 * x32, axis=tuple(range(-axes, 0)), keepdims=True)
    normed = x32 * lax.rsqrt(mean_square + eps)
    scale = scale.astype(jnp.float32)
    return (normed * (scale + offset if offset else scale)).astype(x.dtype)


def norm(x_TD: Array, scale_D: Array | None, config: ModelConfig) -> Array:
    """One of a layer's norms; a layer that does not have this one passes None, and `x` stays."""
    if scale_D is None:
        return x_TD
    return rms_norm(x_TD, scale_D[None], config.rms_norm_eps, config.norm_offset)


def scaled(x: Array, factor: float) -> Array:
    """`x` times a number that is not rounded to the type of `x` first."""
    return x if factor == 1 else (x.astype(jnp.float32) * factor).astype(x.dtype)


def rope_frequencies(rotary_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians per position for each of the rotary_dim/2 rotated pairs (arXiv:2104.09864)."""
    frequencies = theta ** -(np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "longrope":
        return frequencies / (scaling.long_factor if scaling.use_long else scaling.short_factor)
    # Pairs that turn seldom in the original context are slowed by `factor`, quick ones are kept.
    context = scaling.original_max_position_embeddings
    if scaling.kind == "yarn":
        ends = [  # the pairs, in order of speed, between which it changes from one to the other
            rotary_dim * math.log(context / (2 * math.pi * turns)) / (2 * math.log(theta))
            for turns in (scaling.beta_fast, scaling.beta_slow)
        ]
        first, last = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), rotary_dim - 1)
        ramp = (np.arange(rotary_dim // 2) - first) / max(last - first, 0.001)
        keep = 1 - np.clip(ramp, 0, 1)
    else:
        turns = context * frequencies / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (keep + (1 - keep) / scaling.factor)


def rope_attention_factor(scaling: RopeScaling | None) -> float:
    """What rotated queries and keys are multiplied by, to sharpen attention over more tokens."""
    if scaling is None or scaling.kind not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.kind == "yarn":
        return 0.1 * math.log(scaling.factor) + 1
    context = scaling.original_max_position_embeddings
    return math.sqrt(1 + math.log(scaling.factor) / math.log(context))


def rope_tables(positions_T: Array, config: ModelConfig) -> dict[Any, tuple[Array, Array]]:
    """Cosines and sines `[T, rotary_dim/2]`, float32, by what `config.rope` says of a layer."""
    tables = {}
    for way in dict.fromkeys(config.rope(layer) for layer in range(config.num_layers)):
        if way is None:
            continue
        frequencies = rope_frequencies(config.rotary_dim or config.head_dim, *way)
        factor = rope_attention_factor(way[1])
        angles = positions_T[:, None].astype(jnp.float32) * frequencies.astype(np.float32)[None]
        tables[way] = scaled(jnp.cos(angles), factor), scaled(jnp.sin(angles), factor)
    return tables


def apply_rope(x: Array, cosines: Array, sines: Array) -> Array:
    """Rotate the pairs (i, i + n) of the last axis of `x` `[T, …, H]`; the tables are `[T, n]`.

    What lies beyond the first 2n dimensions of the axis stays as it is.
    """
    half = cosines.shape[-1]
    shape = (x.shape[0],) + (1,) * (x.ndim - 2) + (half,)
    cosines, sines = cosines.reshape(shape), sines.reshape(shape)
    pairs, rest = jnp.split(x, [2 * half], axis=-1)
    rotated = lax.platform_dependent(
        pairs, cosines, sines, cuda=_rotate_by_exchange, default=_rotate_by_halves
    )
    return jnp.concatenate([rotated, rest], axis=-1) if rest.shape[-1] else rotated


def _rotate_by_halves(x: Array, cosines: Array, sines: Array) -> Array:
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cosines - second * sines, second * cosines + first * sines]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def _rotate_by_exchange(x: Array, cosines: Array, sines: Array) -> Array:
    """The same sums without a concatenation: of that XLA makes a branch for each element on GPUs,
    and loads them one by one."""
    pairs = x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
    others = jnp.flip(pairs, axis=-2).astype(jnp.float32)
    is_first = lax.broadcasted_iota(jnp.int32, (1,) * (x.ndim - 1) + (2, 1), x.ndim - 1) == 0
    cosines, sines = cosines[..., None, :], sines[..., None, :]
    rotated = pairs.astype(jnp.float32) * cosines + others * jnp.where(is_first, -sines, sines)
    return rotated.reshape(x.shape).astype(x.dtype)


def linear(x: Array, weight: Array, letters: str | None = None) -> Array:
    """`x` [T, in…] through a weight [out…, in…], as checkpoints have it: the result [T, out…].

    letters: of the result, which name its sharding; None where there is no mesh.  If the inputs are
    split over devices and the result is not, this is an all-reduce.
    """
    inputs, outputs = x.ndim - 1, weight.ndim - (x.ndim - 1)
    of_x, of_weight = tuple(range(1, x.ndim)), tuple(range(outputs, weight.ndim))

    def tokens_first(x: Array, weight: Array) -> Array:
        contract = ((of_x, of_weight), ((), ()))
        place = None if letters is None else spec(letters)
        return lax.dot_general(x, weight, contract, out_sharding=place)

    def weight_first(x: Array, weight: Array) -> Array:
        """What XLA's library on the CPU has on the right it packs anew for each product: so have
        the few tokens there.  The barriers keep XLA from turning the product around again."""
        turned = lax.optimization_barrier(jnp.moveaxis(x, 0, -1))
        contract = ((of_weight, tuple(range(inputs))), ((), ()))
        place = None if letters is None else spec(letters[1:] + letters[0])
        result = lax.dot_general(weight, turned, contract, out_sharding=place)
        return jnp.moveaxis(lax.optimization_barrier(result), -1, 0)

    return lax.platform_dependent(x, weight, cpu=weight_first, default=tokens_first)


def attention(
    weights: dict[str, Array],
    x_TD: Array,
    pool: Pool,
    rows: Rows,
    rope: tuple[Array, Array] | None,
    config: ModelConfig,
    window: int | None,
    ops: PageOps,
) -> tuple[Array, Pool]:
    """Self-attention over the paged cache: returns the layer's output [T, D] and the written pool.

    The fused projection yields, for each KV head, its G queries, one key and one value (axis U), so
    that splitting K over devices never separates a query from its key.
    """
    dims(x_TD=x_TD, qkv_KUHD=weights["qkv_KUHD"])
    qkv_TKUH = linear(x_TD, weights["qkv_KUHD"], "TKUH")
    if "qkv_bias_KUH" in weights:
        qkv_TKUH += weights["qkv_bias_KUH"][None]
    q_TKGH, k_TKH, v_TKH = qkv_TKUH[:, :, :-2], qkv_TKUH[:, :, -2], qkv_TKUH[:, :, -1]
    eps, offset = config.rms_norm_eps, config.norm_offset
    if "q_norm_H" in weights:
        q_TKGH = rms_norm(q_TKGH, weights["q_norm_H"][None, None, None], eps, offset)
        k_TKH = rms_norm(k_TKH, weights["k_norm_H"][None, None], eps, offset)
    if "q_norm_KGH" in weights:  # over heads on several devices: an all-reduce of [T]
        q_TKGH = rms_norm(q_TKGH, weights["q_norm_KGH"][None], eps, offset, axes=3)
        k_TKH = rms_norm(k_TKH, weights["k_norm_KH"][None], eps, offset, axes=2)
    if rope is not None:
        q_TKGH, k_TKH = apply_rope(q_TKGH, *rope), apply_rope(k_TKH, *rope)

    def write_and_attend(q_TKGH, k_TKH, v_TKH, pool, rows):
        # First write, then attend: the other order costs two copies of the cache.
        pool = ops.write_pages(pool, k_TKH, v_TKH, rows)
        scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        soft_cap = config.attention_soft_cap
        attended_TKGH = ops.paged_attention(
            q_TKGH, pool, rows, scale=scale, window=window, soft_cap=soft_cap
        )
        return attended_TKGH, pool

    # Heads are independent, so each device attends with its own; nothing is exchanged.
    pages = spec("PKS")
    attended_TKGH, pool = jax.shard_map(
        write_and_attend,
        in_specs=(spec("TKGH"), spec("TKH"), spec("TKH"), pages, PartitionSpec()),
        out_specs=(spec("TKGH"), pages),
        check_vma=False,
    )(q_TKGH, k_TKH, v_TKH, pool, rows)

    # Row-parallel: each device adds up its heads; the all-reduce happens here.
    out_TD = linear(attended_TKGH, weights["out_DKGH"], "TD")
    if "out_bias_D" in weights:
        out_TD += weights["out_bias_D"][None]
    return out_TD, pool


def mlp(weights: dict[str, Array], x_TD: Array, config: ModelConfig) -> Array:
    """Gated feed-forward (SwiGLU and GEGLU, arXiv:2002.05202): [T, D] → [T, D]."""
    dims(x_TD=x_TD, gate_up_WFD=weights["gate_up_WFD"])
    gate_up_TWF = linear(x_TD, weights["gate_up_WFD"], "TWF")
    if "gate_up_bias_WF" in weights:
        gate_up_TWF += weights["gate_up_bias_WF"][None]
    hidden_TF = ACTIVATIONS[config.activation](gate_up_TWF[:, 0]) * gate_up_TWF[:, 1]
    # Row-parallel: each device adds up its share of F; the layer's second all-reduce.
    out_TD = linear(hidden_TF, weights["down_DF"], "TD")
    if "down_bias_D" in weights:
        out_TD += weights["down_bias_D"][None]
    return out_TD


def embed(embed_VD: Array, tokens_T: Array, config: ModelConfig) -> Array:
    """Look up token vectors; with V split over devices this is one all-reduce of [T, D]."""
    x_TD = embed_VD.at[tokens_T].get(out_sharding=spec("TD"))
    # Models were trained with this factor rounded to the type of the embeddings.
    return x_TD if config.embedding_scale == 1 else x_TD * config.embedding_scale


def logits(head_VD: Array, hidden_BD: Array, config: ModelConfig) -> Array:
    """Scores `[V, B]` of every vocabulary entry, float32, gathered whole on every device.

    The vocabulary comes first because the CPU multiplies so fastest (see `linear`), and turning the
    scores around would cost it as much as is gained.
    """
    contract = ((1,), (1,)), ((), ())
    scores_VB = lax.dot_general(head_VD, hidden_BD, contract, preferred_element_type=jnp.float32)
    scores_VB = capped(scaled(scores_VB, config.logit_scale), config.logit_soft_cap)
    # The one place where logits cross devices: sampling needs whole columns.
    return jax.sharding.reshard(scores_VB, spec("DB"))
