"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values; the upper layers may slide."""

from collections.abc import Mapping
from typing import Any

from jaxinfer.models import llama
from jaxinfer.models.family import Family

DEFAULTS = llama.DEFAULTS | {"num_key_value_heads": 32, "max_position_embeddings": 32768}


def windows(config: Mapping[str, Any]) -> dict[str, Any]:
    """The sliding window and the layers that use it; other keys mean nothing if it is off."""
    kinds = config.get("layer_types")
    if not config.get("use_sliding_window", False):
        return {}
    if kinds is None:
        first = config.get("max_window_layers", 28)
        layers = tuple(range(first, config["num_hidden_layers"]))
    else:
        layers = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    window = config.get("sliding_window", 4096)
    if window is None or not layers:
        return {}
    return {"sliding_window": window, "sliding_layers": layers}


FAMILY = Family(
    architectures=("Qwen2ForCausalLM",),
    fields=llama.FIELDS,
    defaults=DEFAULTS,
    facts={"qkv_bias": True},
    adjust=windows,
    weights=llama.WEIGHTS,
    ignored=llama.FAMILY.ignored,
)
