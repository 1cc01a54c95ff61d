"""SmolLM3: Llama in which some layers do not rotate."""

from collections.abc import Mapping
from typing import Any

from jaxinfer.models import family, llama
from jaxinfer.models.family import Family


def adjust(config: Mapping[str, Any]) -> dict[str, Any]:
    count, rotate = config["num_hidden_layers"], config.get("no_rope_layers")  # 1: it does rotate
    every = config.get("no_rope_layer_interval", 4)
    still = tuple(i for i in range(count) if (not rotate[i] if rotate else (i + 1) % every == 0))
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    slides = family.windows(config, window, lambda i: i in still)
    return llama.biases(config) | slides | {"no_rope_layers": still}


FAMILY = Family(
    architectures=("SmolLM3ForCausalLM",),
    fields=llama.FAMILY.fields,
    defaults=llama.DEFAULTS
    | {
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "rope_theta": 2e6,
    },
    adjust=adjust,
    weights=llama.WEIGHTS,
    ignored=llama.FAMILY.ignored,
)
