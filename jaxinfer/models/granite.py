"""Granite, the dense ones: Llama with factors on embeddings, residuals, scores and logits."""

from collections.abc import Mapping
from typing import Any

from jaxinfer.models import llama
from jaxinfer.models.family import Family


def adjust(config: Mapping[str, Any]) -> dict[str, Any]:
    return llama.biases(config) | {"logit_scale": 1 / config.get("logits_scaling", 1.0)}


FAMILY = Family(
    architectures=("GraniteForCausalLM",),
    fields={
        **llama.FAMILY.fields,
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "attention_multiplier": "attention_scale",
    },
    defaults={**llama.FAMILY.defaults, "attention_multiplier": 1.0},
    adjust=adjust,
    weights=llama.WEIGHTS,
    ignored=llama.FAMILY.ignored,
)
