"""OLMo 2: norms only after attention and feed-forward, and over all heads of queries and keys."""

from jaxinfer.models import gemma2, llama
from jaxinfer.models.family import Family, Source

WEIGHTS = {
    name: sources
    for name, sources in gemma2.WEIGHTS.items()
    if name not in ("attn_norm_D", "mlp_norm_D")
} | {
    "q_norm_KGH": (Source(llama.ATTENTION + "q_norm.weight", "KGH"),),
    "k_norm_KH": (Source(llama.ATTENTION + "k_norm.weight", "KH"),),
}

FAMILY = Family(
    architectures=("Olmo2ForCausalLM",),
    fields=llama.FIELDS,
    defaults=llama.DEFAULTS | {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048},
    facts={"pre_norm": False, "post_norm": True, "qk_norm": True, "qk_norm_across_heads": True},
    adjust=llama.biases,
    weights=WEIGHTS,
    ignored=llama.FAMILY.ignored,
)
