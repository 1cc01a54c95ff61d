"""Gemma 2: norms before and after, soft caps, every other layer slides, scaled embeddings."""

from collections.abc import Mapping
from typing import Any

from jaxinfer.models import family, llama
from jaxinfer.models.family import Family, Source

FIELDS = {key: name for key, name in llama.FIELDS.items() if key != "hidden_act"} | {
    "hidden_activation": "activation",
    "final_logit_softcapping": "logit_soft_cap",
}
DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}
FACTS = {"post_norm": True, "norm_offset": 1.0}
WEIGHTS = llama.WEIGHTS | {
    "attn_post_norm_D": (Source(llama.LAYER + "post_attention_layernorm.weight", "D"),),
    "mlp_norm_D": (Source(llama.LAYER + "pre_feedforward_layernorm.weight", "D"),),
    "mlp_post_norm_D": (Source(llama.LAYER + "post_feedforward_layernorm.weight", "D"),),
}


def scales(config: Mapping[str, Any]) -> dict[str, Any]:
    """Factors that follow from sizes."""
    return {
        "embedding_scale": config["hidden_size"] ** 0.5,
        "attention_scale": config.get("query_pre_attn_scalar", 256) ** -0.5,
    }


def adjust(config: Mapping[str, Any]) -> dict[str, Any]:
    window = config.get("sliding_window", 4096)
    slides = family.windows(config, window, lambda i: i % 2 == 0)
    return llama.biases(config) | scales(config) | slides


FAMILY = Family(
    architectures=("Gemma2ForCausalLM",),
    fields=FIELDS | {"attn_logit_softcapping": "attention_soft_cap"},
    defaults=DEFAULTS
    | {
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    facts=FACTS,
    adjust=adjust,
    weights=WEIGHTS,
    ignored=llama.FAMILY.ignored,
)
