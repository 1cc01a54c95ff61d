"""Mistral: Llama with a sliding window in all layers."""

from jaxinfer.models import llama
from jaxinfer.models.family import Family

FAMILY = Family(
    architectures=("MistralForCausalLM",),
    fields=llama.FIELDS | {"sliding_window": "sliding_window"},
    defaults=llama.DEFAULTS
    | {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    weights=llama.WEIGHTS,
    ignored=llama.FAMILY.ignored,
)
