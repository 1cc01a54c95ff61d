"""Qwen3: queries and keys are normalised per head instead of having biases."""

from jaxinfer.models import llama, qwen2
from jaxinfer.models.family import Family, Source

QK_NORMS = {
    "q_norm_H": (Source(llama.ATTENTION + "q_norm.weight", "H"),),
    "k_norm_H": (Source(llama.ATTENTION + "k_norm.weight", "H"),),
}

FAMILY = Family(
    architectures=("Qwen3ForCausalLM",),
    fields=llama.FIELDS,
    defaults=qwen2.DEFAULTS | {"head_dim": 128},
    facts={"qk_norm": True},
    adjust=lambda config: llama.biases(config) | qwen2.windows(config),
    weights=llama.WEIGHTS | QK_NORMS,
    ignored=llama.FAMILY.ignored,
)
