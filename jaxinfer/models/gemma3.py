"""Gemma 3, its text part: Gemma 2 with norms of queries and keys for soft caps, and two ropes."""

from collections.abc import Mapping
from typing import Any

from jaxinfer.models import family, gemma2, llama, qwen3
from jaxinfer.models.family import Family


def adjust(config: Mapping[str, Any]) -> dict[str, Any]:
    window, every = config.get("sliding_window", 4096), config.get("sliding_window_pattern", 6)
    slides = family.windows(config, window, lambda i: (i + 1) % every != 0)
    return llama.biases(config) | gemma2.scales(config) | slides


FAMILY = Family(
    architectures=("Gemma3ForCausalLM",),
    fields=gemma2.FIELDS | {"rope_local_base_freq": "sliding_rope_theta"},
    defaults=gemma2.DEFAULTS
    | {"max_position_embeddings": 131072, "rope_theta": 1e6, "rope_local_base_freq": 1e4},
    facts=gemma2.FACTS | {"qk_norm": True},
    adjust=adjust,
    weights=gemma2.WEIGHTS | qwen3.QK_NORMS,
    ignored=llama.FAMILY.ignored,
)
