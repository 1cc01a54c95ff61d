"""The mathematics that decoders are made of: pure functions of arrays.

Sums of squares, rotations and attention weights are computed in float32 whatever the dtype.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from jaxinfer.config import ModelConfig, RopeScaling
from jaxinfer.kernels.paged_attention import Rows, paged_attention, write_pages
from jaxinfer.shapes import dims
from jaxinfer.shardings import spec


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Root-mean-square normalisation of the last axis (arXiv:1910.07467)."""
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
    normed = x32 * jax.lax.rsqrt(mean_square + eps)
    return (normed.astype(x.dtype) * scale).astype(x.dtype)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians per position for each of the head_dim/2 rotated pairs (arXiv:2104.09864)."""
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    # llama3: wavelengths beyond the original context are stretched by `factor`, short ones kept.
    context = scaling.original_max_position_embeddings
    turns = context * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (keep + (1 - keep) / scaling.factor)


def rope_tables(positions_T: Array, config: ModelConfig) -> tuple[Array, Array]:
    """Cosines and sines `[T, H/2]`, float32, shared by all layers of a step."""
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    angles = positions_T[:, None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)[None]
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: Array, cosines: Array, sines: Array) -> Array:
    """Rotate the pairs (i, i + H/2) of the last axis; `x` is `[T, …, H]`."""
    shape = (x.shape[0],) + (1,) * (x.ndim - 2) + (x.shape[-1] // 2,)
    cosines, sines = cosines.reshape(shape), sines.reshape(shape)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cosines - second * sines, second * cosines + first * sines]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def attention(
    weights: dict[str, Array],
    x_TD: Array,
    k_pages_PKSH: Array,
    v_pages_PKSH: Array,
    rows: Rows,
    rope: tuple[Array, Array],
    config: ModelConfig,
    window: int | None,
) -> tuple[Array, Array, Array]:
    """Self-attention over the paged cache: returns the layer's output [T, D] and the written pages.

    The fused projection yields, for each KV head, its G queries, one key and one value (axis U), so
    that splitting K over devices never separates a query from its key.
    """
    dims(x_TD=x_TD, qkv_DKUH=weights["qkv_DKUH"])
    qkv_TKUH = jnp.einsum("TD,DKUH->TKUH", x_TD, weights["qkv_DKUH"])
    if "qkv_bias_KUH" in weights:
        qkv_TKUH += weights["qkv_bias_KUH"][None]
    q_TKGH, k_TKH, v_TKH = qkv_TKUH[:, :, :-2], qkv_TKUH[:, :, -2], qkv_TKUH[:, :, -1]
    if "q_norm_H" in weights:
        q_TKGH = rms_norm(q_TKGH, weights["q_norm_H"][None, None, None], config.rms_norm_eps)
        k_TKH = rms_norm(k_TKH, weights["k_norm_H"][None, None], config.rms_norm_eps)
    q_TKGH, k_TKH = apply_rope(q_TKGH, *rope), apply_rope(k_TKH, *rope)

    def write_and_attend(q_TKGH, k_TKH, v_TKH, k_pages_PKSH, v_pages_PKSH, rows):
        # First write, then attend: the other order costs two copies of the cache.
        pages = write_pages(k_pages_PKSH, v_pages_PKSH, k_TKH, v_TKH, rows)
        scale = config.head_dim**-0.5
        return paged_attention(q_TKGH, *pages, rows, scale=scale, window=window), *pages

    # Heads are independent, so each device attends with its own; nothing is exchanged.
    pages = spec("PKSH")
    attended_TKGH, k_pages_PKSH, v_pages_PKSH = jax.shard_map(
        write_and_attend,
        in_specs=(spec("TKGH"), spec("TKH"), spec("TKH"), pages, pages, PartitionSpec()),
        out_specs=(spec("TKGH"), pages, pages),
        check_vma=False,
    )(q_TKGH, k_TKH, v_TKH, k_pages_PKSH, v_pages_PKSH, rows)

    # Row-parallel: each device adds up its heads; the all-reduce happens here.
    out_TD = jnp.einsum(
        "TKGH,KGHD->TD", attended_TKGH, weights["out_KGHD"], out_sharding=spec("TD")
    )
    if "out_bias_D" in weights:
        out_TD += weights["out_bias_D"][None]
    return out_TD, k_pages_PKSH, v_pages_PKSH


def mlp(weights: dict[str, Array], x_TD: Array) -> Array:
    """Gated feed-forward with SiLU (SwiGLU, arXiv:2002.05202): [T, D] → [T, D]."""
    dims(x_TD=x_TD, gate_up_DWF=weights["gate_up_DWF"])
    gate_up_TWF = jnp.einsum("TD,DWF->TWF", x_TD, weights["gate_up_DWF"])
    if "gate_up_bias_WF" in weights:
        gate_up_TWF += weights["gate_up_bias_WF"][None]
    hidden_TF = jax.nn.silu(gate_up_TWF[:, 0]) * gate_up_TWF[:, 1]
    # Row-parallel: each device adds up its share of F; the layer's second all-reduce.
    out_TD = jnp.einsum("TF,FD->TD", hidden_TF, weights["down_FD"], out_sharding=spec("TD"))
    if "down_bias_D" in weights:
        out_TD += weights["down_bias_D"][None]
    return out_TD


def embed(embed_VD: Array, tokens_T: Array) -> Array:
    """Look up token vectors; with V split over devices this is one all-reduce of [T, D]."""
    return embed_VD.at[tokens_T].get(out_sharding=spec("TD"))


def logits(head_VD: Array, hidden_BD: Array) -> Array:
    """Scores of every vocabulary entry, float32, gathered whole on every device."""
    scores_BV = jnp.einsum("BD,VD->BV", hidden_BD, head_VD, preferred_element_type=jnp.float32)
    # The one place where logits cross devices: sampling needs whole rows.
    return jax.sharding.reshard(scores_BV, spec("BD"))
