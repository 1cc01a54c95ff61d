"""A tree of weights, and the configuration of a model, as Hugging Face spells them.

The inverse of `checkpoint.load` and of `models.model_config`.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import numpy as np

from jaxinfer.checkpoint import ModelFiles, place
from jaxinfer.errors import CheckpointError, UnsupportedModelError
from jaxinfer.models import ACTIVATIONS, ROPE_FIELDS, Family, model_config


def tensors(weights: dict[str, Any], files: ModelFiles) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint by name, each copied whole to the host, in the weights' dtype.

    A tied output projection is not among them.
    """
    found: dict[str, np.ndarray] = {}
    family = _family(files)
    for path, leaf in jax.tree_util.tree_flatten_with_path(weights)[0]:
        name, layer = place(path)
        letters, array = name.rpartition("_")[2], np.asarray(leaf)
        for part in family.parts(name, layer, files.config.sizes):
            values, theirs = array, letters
            if part.stacked:
                axis = letters.index(part.stacked)
                values = values[(slice(None),) * axis + (slice(part.start, part.stop),)]
                values = values if part.extra else values.squeeze(axis)
                theirs = letters.replace(part.stacked, part.extra)
            order = [theirs.index(letter) for letter in "".join(part.groups)]
            whole = (part.rows, *part.shape[1:])
            tensor = found.setdefault(part.tensor, np.empty(whole, array.dtype))
            below = part.above + part.shape[0]
            tensor[part.above : below] = values.transpose(order).reshape(part.shape)
    return found


def _family(files: ModelFiles) -> Family:
    if files.family is None:
        raise UnsupportedModelError(
            f"{files.path} was saved without the names that its tensors had: use the folder or "
            "preset that it was made of"
        )
    return files.family


def config_json(files: ModelFiles) -> dict[str, Any]:
    """The object for a config.json: the folder's own, or a preset's facts spelled that way.

    Raises `UnsupportedModelError` for a preset with facts that reading the result back would lose:
    those that no single key tells.
    """
    config, family = files.config, _family(files)
    if files.path is not None:
        return json.loads((files.path / "config.json").read_text(encoding="utf-8"))
    spelled = {ours: theirs for theirs, ours in ACTIVATIONS.items() if theirs != "swish"}
    values: dict[str, Any] = {key: getattr(config, name) for key, name in family.fields.items()}
    for key, name in family.fields.items():
        if name == "activation":
            values[key] = spelled[config.activation]
    values |= {
        "architectures": [family.architectures[0]],
        "attention_bias": config.qkv_bias,
        "dtype": config.dtype,
        "eos_token_id": list(config.eos_token_ids),
        "rope_parameters": _rope_parameters(config),
    }
    if config.sliding_layers is not None:
        kinds = ("full_attention", "sliding_attention")
        values["layer_types"] = [
            kinds[layer in config.sliding_layers] for layer in range(config.num_layers)
        ]
    remedy = "cannot be written as config.json: name a model folder, which has one"
    try:
        again = model_config(values, "the preset as config.json")
    except CheckpointError as error:
        raise UnsupportedModelError(f"the preset {remedy} ({error})") from error
    for field in dataclasses.fields(config):
        if getattr(again, field.name) != getattr(config, field.name):
            raise UnsupportedModelError(f"the preset's {field.name} {remedy}")
    return values


def _rope_parameters(config: Any) -> dict[str, Any]:
    scaling, values = config.rope_scaling, {"rope_theta": config.rope_theta}
    if scaling is None:
        return values | {"rope_type": "default"}
    names = [name for names in ROPE_FIELDS[scaling.kind] for name in names]
    known = {name: getattr(scaling, name) for name in names}
    known = {name: list(v) if isinstance(v, tuple) else v for name, v in known.items()}
    return values | {"rope_type": scaling.kind} | {k: v for k, v in known.items() if v is not None}
