"""Phi-3 and Phi-4: Llama with fused projections; long ropes; a part of each head may not rotate."""

from collections.abc import Mapping
from typing import Any

from jaxinfer.models import llama
from jaxinfer.models.family import Family, Source


def adjust(config: Mapping[str, Any]) -> dict[str, Any]:
    rope, key = config.get("rope_parameters") or {}, "partial_rotary_factor"
    share = rope.get(key, config.get(key, 1))
    heads = max(config["num_attention_heads"], 1)
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return {} if share in (None, 1) else {"rotary_dim": int(head_dim * share)}


FAMILY = Family(
    architectures=("Phi3ForCausalLM",),
    fields=llama.FIELDS | {"sliding_window": "sliding_window"},
    defaults=llama.DEFAULTS | {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    adjust=adjust,
    adjusted=("partial_rotary_factor",),
    weights={name: llama.WEIGHTS[name] for name in llama.WEIGHTS if "bias" not in name}
    | {
        "qkv_KUHD": tuple(
            Source(llama.ATTENTION + "qkv_proj.weight", axes) for axes in ("KGH,D", "KH,D", "KH,D")
        ),
        "gate_up_WFD": (Source(llama.MLP + "gate_up_proj.weight", "F,D"),) * 2,
    },
    ignored=llama.FAMILY.ignored,
)
