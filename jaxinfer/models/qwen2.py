"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values; the upper layers may slide."""

from collections.abc import Mapping
from typing import Any

from jaxinfer.models import family, llama
from jaxinfer.models.family import Family

DEFAULTS = llama.DEFAULTS | {"num_key_value_heads": 32, "max_position_embeddings": 32768}


def windows(config: Mapping[str, Any]) -> dict[str, Any]:
    """The sliding window and the layers that use it; other keys mean nothing if it is off."""
    if not config.get("use_sliding_window", False):
        return {}
    first = config.get("max_window_layers", 28)
    return family.windows(config, config.get("sliding_window", 4096), lambda i: i >= first)


FAMILY = Family(
    architectures=("Qwen2ForCausalLM",),
    fields=llama.FIELDS,
    defaults=DEFAULTS,
    facts={"qkv_bias": True},
    adjust=windows,
    weights=llama.WEIGHTS,
    ignored=llama.FAMILY.ignored,
)
