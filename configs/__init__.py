"""Fact sheets in YAML and their strict loader: `models/` has one file per public model,
`hardware/` one per chip.

A file is data about the world and says where it comes from; a key that is unknown, missing or of
the wrong type raises.  Imports no jax.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jaxinfer.config import ModelConfig, field_names, reject_unknown
from jaxinfer.errors import ConfigError

MODELS = Path(__file__).with_name("models")
HARDWARE = Path(__file__).with_name("hardware")

# Facts that a sheet must state although `ModelConfig` has a default.
STATED = (
    "rms_norm_eps", "rope_theta", "tie_word_embeddings", "bos_token_id", "eos_token_ids", "dtype",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelPreset:
    """A public model without its weights.

    source: its hub id, from whose config.json and generation_config.json the facts are.
    architecture: the name of its class there.
    num_parameters: weights it has; tied ones count once.
    """

    name: str
    source: str
    architecture: str
    num_parameters: int
    config: ModelConfig


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What a compiler must know of an NVIDIA GPU.  All sizes are bytes.

    source: of these figures.
    compute_capability: with "a" where code for the architecture's own instructions is wanted.
    shared_memory_per_block: the most that a block may ask for.
    visible_bytes: of the memory, what a program can see.
    """

    source: str
    compute_capability: str
    sm_count: int
    fpus_per_sm: int
    threads_per_sm: int
    clock_ghz: float
    l2_bytes: int
    shared_memory_per_sm: int
    shared_memory_per_block: int
    visible_bytes: int


@dataclass(frozen=True, kw_only=True)
class Tpu:
    """What the compiler and the kernels must know of a TPU.

    topology: what the compiler calls the chip.  host: the slice of chips that one host has.
    vmem_bytes: vector memory that a kernel may use: less than all, for the program around it uses
        some, too.  cores: how many act as one device.
    """

    topology: str
    host: str
    vmem_bytes: int
    cores: int


@dataclass(frozen=True, kw_only=True)
class Chip:
    """What an accelerator can do at most, as its vendor says.

    device_kinds: what jax calls it.  devices_per_chip: jax devices that share the chip.
    memory_bytes, bytes_per_second, flops: of the whole chip; flops by number format, dense.
    gpu, tpu: for the compiler; a chip has one of them.
    """

    name: str
    source: str
    device_kinds: list[str]
    devices_per_chip: int = 1
    memory_bytes: int
    bytes_per_second: float
    flops: dict[str, float]
    gpu: Gpu | None = None
    tpu: Tpu | None = None


def chips() -> list[str]:
    """The names of all chips that have a sheet."""
    return sorted(path.stem for path in HARDWARE.glob("*.yaml"))


def load_chip(name: str) -> Chip:
    """Read a chip's sheet; raises `ConfigError` if there is none or it is unsound."""
    if name not in chips():
        raise ConfigError(f"there is no chip {name!r}; there are: {', '.join(chips())}")
    path = HARDWARE / f"{name}.yaml"
    values = read_mapping(path)
    if len({"gpu", "tpu"} & set(values)) != 1:
        raise ConfigError(f"{path}: it must have one of gpu and tpu")
    for key, kind in (("gpu", Gpu), ("tpu", Tpu)):
        if key in values:
            values[key] = from_mapping(kind, values[key], f"{path}: {key}")
    return from_mapping(Chip, {"name": name, **values}, str(path))


def from_mapping(kind: Any, values: Any, where: str) -> Any:
    """A dataclass from its fields; raises `ConfigError` for unknown, missing or ill-typed ones."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be a mapping of keys to values, got {values!r}")
    reject_unknown(where, values, field_names(kind), ConfigError)
    for field in dataclasses.fields(kind):
        if field.name not in values:
            if field.default is field.default_factory is dataclasses.MISSING:
                raise ConfigError(f"{where}: {field.name} is missing")
            continue
        value, declared = values[field.name], str(field.type)
        good = {"str": str, "int": int, "float": (int, float)}.get(declared, object)
        if not isinstance(value, good) or (good is not object and isinstance(value, bool)):
            raise ConfigError(f"{where}: {field.name} must be of type {declared}, got {value!r}")
    return kind(**values)


def find_chip(device_kind: str) -> Chip | None:
    """The chip that jax calls by this name; None if it has no sheet."""
    found = (load_chip(name) for name in chips())
    return next((chip for chip in found if device_kind in chip.device_kinds), None)


def model_presets() -> list[str]:
    """The names of all presets."""
    return sorted(path.stem for path in MODELS.glob("*.yaml"))


def find_model_preset(name: str) -> str | None:
    """The preset that is meant by a name, or by a hub id, in any case; None if there is none."""
    wanted, names = name.lower(), model_presets()
    if "/" not in name:
        return wanted if wanted in names else None
    # A hub id most often ends in the preset's name: look into that file first.
    names.sort(key=lambda stem: stem != wanted.rpartition("/")[2])
    for stem in names:
        if str(read_mapping(MODELS / f"{stem}.yaml").get("source")).lower() == wanted:
            return stem
    return None


def load_model_preset(name: str) -> ModelPreset:
    """Read a preset by name or hub id; raises `ConfigError` if there is none."""
    stem = find_model_preset(name)
    if stem is None:
        known = model_presets()
        close = difflib.get_close_matches(name.lower().rpartition("/")[2], known, n=3)
        raise ConfigError(
            f"there is no model preset {name!r}; "
            + (f"close to it: {', '.join(close)}" if close else f"there are: {', '.join(known)}")
        )
    return _model_preset(MODELS / f"{stem}.yaml")


def _model_preset(path: Path) -> ModelPreset:
    values = read_mapping(path)
    own = [name for name in field_names(ModelPreset) if name not in ("name", "config")]
    known = [*own, *field_names(ModelConfig)]
    reject_unknown(str(path), values, known, ConfigError)
    required = [field.name for field in dataclasses.fields(ModelConfig)
                if field.default is dataclasses.MISSING]  # fmt: skip
    for key in (*own, *required, *STATED):
        if key not in values:
            raise ConfigError(f"{path}: {key} is missing")
    for key, kind, noun in (
        ("source", str, "a hub id"), ("architecture", str, "a name"),
        ("num_parameters", int, "a whole number"),
    ):  # fmt: skip
        if type(values[key]) is not kind:
            raise ConfigError(f"{path}: {key} must be {noun}, got {values[key]!r}")
    top = {key: values.pop(key) for key in own}
    try:
        return ModelPreset(name=path.stem, **top, config=ModelConfig.from_dict(values))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML libraries silently take the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen = []  # a key may be anything, also what cannot be hashed
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key} stands twice", problem_mark=key_node.start_mark
                )
            seen.append(key)
        return super().construct_mapping(node, deep)


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises `ConfigError`."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must be a mapping of keys to values")
    return values
