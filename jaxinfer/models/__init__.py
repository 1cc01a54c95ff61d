"""The model families, as data, and the one decoder (`decoder`) that runs them all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.config import ModelConfig, RopeScaling
from jaxinfer.errors import CheckpointError, ConfigError, UnsupportedModelError
from jaxinfer.models import (
    gemma2,
    gemma3,
    granite,
    llama,
    mistral,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen3,
    smollm3,
)
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

FAMILIES = tuple(
    module.FAMILY
    for module in (
        llama, mistral, qwen2, qwen3, gemma2, gemma3, phi3, smollm3, olmo2, olmo3, granite,
    )
)  # fmt: skip

# Keys that change the mathematics, and the values with which it is the one that we have.  Absent
# and null are always that.
PLAIN: Mapping[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "logit_scale": (1,),
    "clip_qkv": (),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "use_bidirectional_attention": (False,),
}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
LAYER_TYPES = ("full_attention", "sliding_attention")
CONTEXT = "original_max_position_embeddings"
DIVISORS = (
    "query_pre_attn_scalar", "logits_scaling", "sliding_window_pattern", "no_rope_layer_interval",
    CONTEXT,
)  # fmt: skip
# Kind of scaling: the keys that it must have, and those that it may have.
ROPE_FIELDS = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", CONTEXT), ()),
    "yarn": (("factor", CONTEXT), ("beta_slow", "beta_fast", "attention_factor")),
    "longrope": (("short_factor", "long_factor", CONTEXT), ("factor", "attention_factor")),
}
ROPE_ALIASES = {"su": "longrope"}


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
    _refuse_nonsense(config, file)
    _refuse_unknown_mathematics(config, family, file)
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
    key = next(key for key, name in family.fields.items() if name == "activation")
    activation = values.get("activation", family.defaults[key])
    if activation not in tuple(ACTIVATIONS):
        raise UnsupportedModelError(f"{file}: {key} = {activation!r} is not supported")
    values["activation"] = ACTIVATIONS[activation]
    values.setdefault("head_dim", values["hidden_size"] // max(values["num_heads"], 1))
    values.setdefault("num_kv_heads", values["num_heads"])
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    try:
        values |= {**family.facts, **family.adjust(config), **_rope(config, family, file)}
        return ModelConfig(
            **values,
            eos_token_ids=token_ids(config.get("eos_token_id"), f"{file}: eos_token_id"),
            dtype=str(dtype).removeprefix("torch."),
        )
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{file}: {error}") from error


def _refuse_unknown_mathematics(config: Mapping[str, Any], family: Family, file: str) -> None:
    for key in ("quantization_config", "compression_config"):
        if config.get(key) is not None:
            method = config[key].get("quant_method") if isinstance(config[key], dict) else None
            raise UnsupportedModelError(
                f"{file}: {key}: the checkpoint is quantized ({method or 'method not named'}), "
                "which is not supported; use the model it was made from"
            )
    for key, values in PLAIN.items():
        value = config.get(key)
        known = key in family.fields or key in family.adjusted
        if value is not None and not known and value not in values:
            raise UnsupportedModelError(f"{file}: {key} = {value!r} is not supported")
    for kind in config.get("layer_types") or ():
        if kind not in LAYER_TYPES:
            raise UnsupportedModelError(f"{file}: layer_types: {kind!r} is not supported")


def _refuse_nonsense(config: Mapping[str, Any], file: str) -> None:
    for key in ("layer_types", "no_rope_layers"):
        values = config.get(key)
        if values is None:
            continue
        if not isinstance(values, list) or len(values) != config.get("num_hidden_layers"):
            raise CheckpointError(f"{file}: {key} must list one entry for each layer")
    for key in DIVISORS:
        value = config.get(key, 1)
        if value is not None and not (type(value) in (int, float) and value > 0):
            raise CheckpointError(f"{file}: {key} must be a number above 0, got {value!r}")


def _rope(config: Mapping[str, Any], family: Family, file: str) -> dict[str, Any]:
    """The fields about rotary embeddings, in either spelling."""
    key = "rope_parameters" if config.get("rope_parameters") is not None else "rope_scaling"
    rope = config.get(key)
    rope = {} if rope is None else rope
    if not isinstance(rope, dict):
        raise CheckpointError(f"{file}: {key} must be an object or null, got {rope!r}")
    where = f"{file}: {key}"
    if "sliding_rope_theta" not in family.fields.values() or key == "rope_scaling":
        return _one_rope(config, rope, family, where)
    # The new spelling of those that rotate otherwise where a window slides.
    for name, value in rope.items():
        if name not in LAYER_TYPES or not isinstance(value or {}, dict):
            raise CheckpointError(f"{where} must have an object for each of {LAYER_TYPES}")
    full, sliding = ({**(rope.get(kind) or {})} for kind in LAYER_TYPES)
    if "rope_scaling" in _one_rope(config, sliding, family, f"{where}: {LAYER_TYPES[1]}"):
        raise UnsupportedModelError(f"{where}: scaling in {LAYER_TYPES[1]} is not supported")
    own = {"sliding_rope_theta": sliding["rope_theta"]} if "rope_theta" in sliding else {}
    return own | _one_rope(config, full, family, f"{where}: {LAYER_TYPES[0]}")


def _one_rope(
    config: Mapping[str, Any], rope: Mapping[str, Any], family: Family, where: str
) -> dict[str, Any]:
    """The fields from one object of rotary parameters; where: what messages call it."""
    theta = rope.get("rope_theta", config.get("rope_theta", family.defaults.get("rope_theta")))
    kind = rope.get("rope_type", rope.get("type", "default"))
    kind = ROPE_ALIASES.get(kind, kind)
    if kind not in ROPE_FIELDS:
        raise UnsupportedModelError(
            f"{where}: rope_type {kind!r} is not supported; these are: {', '.join(ROPE_FIELDS)}"
        )
    partial = "partial_rotary_factor"
    if rope.get(partial) not in (None, 1) and partial not in family.adjusted:
        raise UnsupportedModelError(f"{where}: {partial} is not supported")
    required, optional = ROPE_FIELDS[kind]
    known = {"rope_type", "type", "rope_theta", partial, *required, *optional}
    for name, value in rope.items():
        if name not in known and value is not None:
            raise UnsupportedModelError(f"{where}: {name} is not supported for {kind!r}")
    fields: dict[str, Any] = {} if theta is None else {"rope_theta": theta}
    if kind == "default":
        return fields
    given: dict[str, Any] = {name: rope.get(name) for name in (*required, *optional)}
    if CONTEXT in given:  # some have it beside the object
        given[CONTEXT] = config.get(CONTEXT) or given[CONTEXT]
    missing = [name for name in required if given[name] is None]
    if missing:
        raise CheckpointError(f"{where}: {missing[0]} is missing")
    if kind == "longrope" and given["factor"] is None:
        longest = config.get("max_position_embeddings", family.defaults["max_position_embeddings"])
        given["factor"] = max(longest / max(given[CONTEXT], 1), 1.0)
    for name, value in given.items():
        given[name] = tuple(value) if isinstance(value, list) else value
    values = {name: value for name, value in given.items() if value is not None}
    fields["rope_scaling"] = RopeScaling(kind=kind, **values)
    return fields
