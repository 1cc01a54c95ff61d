"""OLMo 3: OLMo 2 with a sliding window in three of four layers, whose ropes are not scaled."""

from collections.abc import Mapping
from typing import Any

from jaxinfer.models import family, llama, olmo2
from jaxinfer.models.family import Family


def adjust(config: Mapping[str, Any]) -> dict[str, Any]:
    window = config.get("sliding_window", 4096)
    slides = family.windows(config, window, lambda i: (i + 1) % 4 != 0)
    return llama.biases(config) | slides


FAMILY = Family(
    architectures=("Olmo3ForCausalLM",),
    fields=llama.FIELDS | {"rope_theta": "sliding_rope_theta"},
    defaults={**olmo2.FAMILY.defaults, "rope_theta": 5e5},
    facts=olmo2.FAMILY.facts,
    adjust=adjust,
    weights=olmo2.WEIGHTS,
    ignored=llama.FAMILY.ignored,
)
