"""The model families, as data, and the one decoder (`decoder`) that runs them all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.config import ModelConfig, RopeScaling
from jaxinfer.errors import CheckpointError, ConfigError, UnsupportedModelError
from jaxinfer.models import llama, mistral, qwen2, qwen3
from jaxinfer.models.family import Family, Source

__all__ = [
    "FAMILIES",
    "Family",
    "Source",
    "architecture_of",
    "family_of",
    "model_config",
    "token_ids",
]

FAMILIES = (llama.FAMILY, mistral.FAMILY, qwen2.FAMILY, qwen3.FAMILY)

# Keys that change the mathematics, and the values with which it is the one that we have.  Absent
# and null are always that.
PLAIN: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "logit_scale": (1,),
    "clip_qkv": (),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}
LAYER_TYPES = ("full_attention", "sliding_attention")
ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    ),
}  # fmt: skip


def family_of(architecture: str) -> Family:
    """The family whose checkpoints have this architecture; raises `UnsupportedModelError`."""
    for family in FAMILIES:
        if architecture in family.architectures:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.architectures)
    raise UnsupportedModelError(
        f"architecture {architecture!r} is not supported; these are: {known}"
    )


def architecture_of(config: Mapping[str, Any], file: str = "config.json") -> str:
    """The architecture that a config.json names."""
    names = config.get("architectures")
    if not (isinstance(names, list) and names and isinstance(names[0], str)):
        raise CheckpointError(
            f"{file}: architectures must name the model's class, such as ['LlamaForCausalLM'], "
            f"got {names!r}"
        )
    return names[0]


def token_ids(value: Any, where: str) -> tuple[int, ...]:
    """The ids in a JSON value that is absent (None), one id or a list of them."""
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not all(type(token) is int for token in ids):
        raise CheckpointError(f"{where} must be a token id or a list of them, got {value!r}")
    return ids


def model_config(config: Mapping[str, Any], file: str = "config.json") -> ModelConfig:
    """Translate the object in a config.json, in the spelling of transformers 4 or 5.

    file: what messages call it.  Raises `UnsupportedModelError` naming the key of a feature that is
    not implemented, `CheckpointError` if a key is missing or its value makes no sense.
    """
    try:
        family = family_of(architecture_of(config, file))
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{file}: {error}") from None
    _refuse_unknown_mathematics(config, file)
    values: dict[str, Any] = {}
    for key, name in family.fields.items():
        value = config.get(key, family.defaults.get(key))
        if value is not None:
            values[name] = value
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                "num_attention_heads", "max_position_embeddings"):  # fmt: skip
        if family.fields[key] not in values:
            raise CheckpointError(f"{file}: {key} is missing")
        if type(config.get(key, 0)) is not int:
            raise CheckpointError(f"{file}: {key} must be a whole number, got {config[key]!r}")
    values.setdefault("head_dim", values["hidden_size"] // max(values["num_heads"], 1))
    values.setdefault("num_kv_heads", values["num_heads"])
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    try:
        return ModelConfig(
            **values,
            **family.facts,
            **family.adjust(config),
            **_rope(config, file),
            eos_token_ids=token_ids(config.get("eos_token_id"), f"{file}: eos_token_id"),
            dtype=str(dtype).removeprefix("torch."),
        )
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{file}: {error}") from error


def _refuse_unknown_mathematics(config: Mapping[str, Any], file: str) -> None:
    for key in ("quantization_config", "compression_config"):
        if config.get(key) is not None:
            method = config[key].get("quant_method") if isinstance(config[key], dict) else None
            raise UnsupportedModelError(
                f"{file}: {key}: the checkpoint is quantized ({method or 'method not named'}), "
                "which is not supported; use the model it was made from"
            )
    for key, values in PLAIN.items():
        value = config.get(key)
        if value is not None and value not in values:
            raise UnsupportedModelError(f"{file}: {key} = {value!r} is not supported")
    kinds = config.get("layer_types")
    if kinds is None:
        return
    if not isinstance(kinds, list) or len(kinds) != config.get("num_hidden_layers"):
        raise CheckpointError(f"{file}: layer_types must list one kind for each layer")
    for kind in kinds:
        if kind not in LAYER_TYPES:
            raise UnsupportedModelError(f"{file}: layer_types: {kind!r} is not supported")


def _rope(config: Mapping[str, Any], file: str) -> dict[str, Any]:
    """The fields about rotary embeddings, in either spelling."""
    key = "rope_parameters" if config.get("rope_parameters") is not None else "rope_scaling"
    rope = config.get(key)
    rope = {} if rope is None else rope
    if not isinstance(rope, dict):
        raise CheckpointError(f"{file}: {key} must be an object or null, got {rope!r}")
    theta = rope.get("rope_theta", config.get("rope_theta"))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_FIELDS:
        raise UnsupportedModelError(
            f"{file}: {key}: rope_type {kind!r} is not supported; these are: "
            f"{', '.join(ROPE_FIELDS)}"
        )
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise UnsupportedModelError(f"{file}: {key}: partial_rotary_factor is not supported")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *ROPE_FIELDS[kind]}
    for name, value in rope.items():
        if name not in known and value is not None:
            raise UnsupportedModelError(f"{file}: {key}: {name} is not supported for {kind!r}")
    fields: dict[str, Any] = {} if theta is None else {"rope_theta": theta}
    if kind != "default":
        missing = [name for name in ROPE_FIELDS[kind] if rope.get(name) is None]
        if missing:
            raise CheckpointError(f"{file}: {key}: {missing[0]} is missing")
        fields["rope_scaling"] = RopeScaling(
            kind=kind, **{name: rope[name] for name in ROPE_FIELDS[kind]}
        )
    return fields
