"""Llama 1, 2, 3 and what has their architecture: SmolLM2, and many others."""

from collections.abc import Mapping
from typing import Any

from jaxinfer.models.family import Family, Source

FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "hidden_act": "activation",
    "tie_word_embeddings": "tie_word_embeddings",
    "bos_token_id": "bos_token_id",
}
DEFAULTS = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False}

LAYER = "model.layers.{layer}."
ATTENTION = LAYER + "self_attn."
MLP = LAYER + "mlp."
WEIGHTS = {
    "embed_VD": (Source("model.embed_tokens.weight", "V,D"),),
    "attn_norm_D": (Source(LAYER + "input_layernorm.weight", "D"),),
    "qkv_KUHD": (
        Source(ATTENTION + "q_proj.weight", "KGH,D"),
        Source(ATTENTION + "k_proj.weight", "KH,D"),
        Source(ATTENTION + "v_proj.weight", "KH,D"),
    ),
    "qkv_bias_KUH": (
        Source(ATTENTION + "q_proj.bias", "KGH"),
        Source(ATTENTION + "k_proj.bias", "KH"),
        Source(ATTENTION + "v_proj.bias", "KH"),
    ),
    "out_DKGH": (Source(ATTENTION + "o_proj.weight", "D,KGH"),),
    "out_bias_D": (Source(ATTENTION + "o_proj.bias", "D"),),
    "mlp_norm_D": (Source(LAYER + "post_attention_layernorm.weight", "D"),),
    "gate_up_WFD": (Source(MLP + "gate_proj.weight", "F,D"), Source(MLP + "up_proj.weight", "F,D")),
    "gate_up_bias_WF": (Source(MLP + "gate_proj.bias", "F"), Source(MLP + "up_proj.bias", "F")),
    "down_DF": (Source(MLP + "down_proj.weight", "D,F"),),
    "down_bias_D": (Source(MLP + "down_proj.bias", "D"),),
    "final_norm_D": (Source("model.norm.weight", "D"),),
    "head_VD": (Source("lm_head.weight", "V,D"),),
}


def biases(config: Mapping[str, Any]) -> dict[str, Any]:
    """One key says whether all four projections of the attention have biases."""
    return dict.fromkeys(("qkv_bias", "out_bias"), config.get("attention_bias") or False)


FAMILY = Family(
    architectures=("LlamaForCausalLM",),
    fields=FIELDS | {"mlp_bias": "mlp_bias"},
    defaults=DEFAULTS | {"max_position_embeddings": 2048},
    adjust=biases,
    weights=WEIGHTS,
    ignored=("*.rotary_emb.inv_freq",),  # a table that old versions of transformers stored
)
