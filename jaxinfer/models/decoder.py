"""The one decoder of all families: its weights, declared once, and its forward pass.

A family differs in its `ModelConfig` alone; an optional parameter that a configuration does not
declare is absent from the tree, and the layer that would use it looks for its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax import Array

from jaxinfer import layers
from jaxinfer.cache import Cache
from jaxinfer.config import ModelConfig
from jaxinfer.kernels.choice import PageOps
from jaxinfer.kernels.rows import Rows
from jaxinfer.kernels.write_pages import Pool
from jaxinfer.shapes import letters


@dataclass(frozen=True)
class Parameter:
    """One weight: its axis letters (from its name), its shape, and how to draw it at random."""

    letters: str
    shape: tuple[int, ...]
    init: str = "normal"


def parameters(config: ModelConfig) -> dict[str, Any]:
    """The tree of all parameters of a model, as `Parameter`s; the weights have the same tree."""

    norm = "zeros" if config.norm_offset else "ones"

    def declare(*names: str) -> dict[str, Parameter]:
        tree = {}
        for name in names:
            axes = letters(name)
            init = norm if "norm" in name else "zeros" if "bias" in name else "normal"
            tree[name] = Parameter(axes, tuple(config.sizes[axis] for axis in axes), init)
        return tree

    layer = ["qkv_KUHD", "out_DKGH", "gate_up_WFD", "down_DF"]
    layer += ["attn_norm_D", "mlp_norm_D"] * config.pre_norm
    layer += ["attn_post_norm_D", "mlp_post_norm_D"] * config.post_norm
    layer += ["qkv_bias_KUH"] * config.qkv_bias
    layer += ["out_bias_D"] * config.out_bias
    layer += ["gate_up_bias_WF", "down_bias_D"] * config.mlp_bias
    if config.qk_norm:
        across = config.qk_norm_across_heads
        layer += ["q_norm_KGH", "k_norm_KH"] if across else ["q_norm_H", "k_norm_H"]
    top = ["embed_VD", "final_norm_D"] + ["head_VD"] * (not config.tie_word_embeddings)
    return {**declare(*top), "layers": [declare(*layer) for _ in range(config.num_layers)]}


def forward(
    weights: dict[str, Any],
    cache: Cache,
    tokens_T: Array,
    rows: Rows,
    config: ModelConfig,
    ops: PageOps,
) -> tuple[Cache, Array]:
    """Run the step's tokens through all layers: returns the written cache and hidden states [T, D].

    The hidden states are those after the last layer, before the final norm.  Layers are unrolled: a
    scan over stacked weights copies each slice (it halved the speed on CPU).
    """
    x_TD = layers.embed(weights["embed_VD"], tokens_T, config)
    rope = layers.rope_tables(rows.positions_T, config)
    pools = []
    for i, (layer, pool) in enumerate(zip(weights["layers"], cache.pools, strict=True)):
        x_TD, pool = _block(
            layer, x_TD, pool, rows, rope.get(config.rope(i)), config, config.window(i), ops
        )
        pools.append(pool)
    return Cache(tuple(pools)), x_TD


@partial(jax.jit, static_argnames=("config", "window", "ops"))
def _block(
    layer: dict[str, Array],
    x_TD: Array,
    pool: Pool,
    rows: Rows,
    rope: tuple[Array, Array] | None,
    config: ModelConfig,
    window: int | None,
    ops: PageOps,
) -> tuple[Array, Pool]:
    """One layer: the stream after it and the written pool.

    Jitted so that layers alike are traced and lowered once; XLA compiles each in its place.
    """
    normed_TD = layers.norm(x_TD, layer.get("attn_norm_D"), config)
    attended_TD, pool = layers.attention(layer, normed_TD, pool, rows, rope, config, window, ops)
    attended_TD = layers.norm(attended_TD, layer.get("attn_post_norm_D"), config)
    x_TD += layers.scaled(attended_TD, config.residual_scale)
    normed_TD = layers.norm(x_TD, layer.get("mlp_norm_D"), config)
    fed_TD = layers.mlp(layer, normed_TD, config)
    fed_TD = layers.norm(fed_TD, layer.get("mlp_post_norm_D"), config)
    return x_TD + layers.scaled(fed_TD, config.residual_scale), pool


def logits(weights: dict[str, Any], hidden_BD: Array, config: ModelConfig) -> Array:
    """Final norm and output projection: [B, D] → float32 [V, B]."""
    normed_BD = layers.norm(hidden_BD, weights["final_norm_D"], config)
    return layers.logits(weights.get("head_VD", weights["embed_VD"]), normed_BD, config)
