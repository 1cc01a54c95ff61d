"""Qwen3: queries and keys are normalised per head instead of having biases."""

from collections.abc import Mapping
from typing import Any

from jaxinfer.models import llama, qwen2
from jaxinfer.models.family import Family, Source


def adjust(config: Mapping[str, Any]) -> dict[str, Any]:
    biases = dict.fromkeys(("qkv_bias", "out_bias"), config.get("attention_bias") or False)
    return biases | qwen2.windows(config)


FAMILY = Family(
    architectures=("Qwen3ForCausalLM",),
    fields=llama.FIELDS,
    defaults=qwen2.DEFAULTS | {"head_dim": 128},
    facts={"qk_norm": True},
    adjust=adjust,
    weights=llama.WEIGHTS
    | {
        "q_norm_H": (Source(llama.ATTENTION + "q_norm.weight", "H"),),
        "k_norm_H": (Source(llama.ATTENTION + "k_norm.weight", "H"),),
    },
    ignored=llama.FAMILY.ignored,
)
