"""Device meshes, and the rules that map axis letters to mesh axes.

A name carries its sharding: with the rules below `down_DF` is split along F over the axes
("expert", "tensor") and whole along D.  Models name letters only; which devices there are, and how
many, is decided here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxinfer.errors import ConfigError

AXES = ("data", "pipe", "expert", "tensor")
TENSOR = ("expert", "tensor")

# Letters that are not named here are whole on every device.
RULES: Mapping[str, Any] = {"N": TENSOR, "K": TENSOR, "F": TENSOR, "V": TENSOR, "E": "expert"}


def spec(letters: str, rules: Mapping[str, Any] = RULES) -> PartitionSpec:
    """The partition spec of an array from its axis letters: `spec("TKGH")`."""
    return PartitionSpec(*(rules.get(letter) for letter in letters))


def mesh(tensor_parallel_size: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over the first devices present, or over `devices`.

    Raises `ConfigError` if there are fewer devices than the sizes multiply to.
    """
    devices = list(devices if devices is not None else jax.devices())
    if tensor_parallel_size > len(devices):
        raise ConfigError(
            f"EngineConfig.tensor_parallel_size is {tensor_parallel_size}, but only {len(devices)} "
            f"device(s) are present ({devices[0].platform}); lower it or name more `devices`"
        )
    grid = np.array(devices[:tensor_parallel_size]).reshape(1, 1, 1, tensor_parallel_size)
    return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def named(mesh: Mesh, letters: str) -> NamedSharding:
    """The sharding of an array with these axis letters on this mesh."""
    return NamedSharding(mesh, spec(letters))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def abstract(mesh: Mesh, parameters: Any, dtype: Any) -> Any:
    """The arrays, without memory, of a tree of parameters (what has letters and a shape)."""
    return jax.tree.map(
        lambda one: jax.ShapeDtypeStruct(one.shape, dtype, sharding=named(mesh, one.letters)),
        parameters,
    )


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree's arrays, abstract or not, without padding."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def check_divisible(sizes: Mapping[str, int], tensor_parallel_size: int) -> None:
    """Raise `ConfigError` if a split axis of the model does not divide over the devices."""
    words = {"K": "num_kv_heads", "F": "intermediate_size", "V": "vocab_size"}
    for letter, word in words.items():
        if sizes[letter] % tensor_parallel_size:
            raise ConfigError(
                f"EngineConfig.tensor_parallel_size ({tensor_parallel_size}) does not divide the "
                f"model's {word} ({sizes[letter]})"
            )
