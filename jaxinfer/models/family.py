"""What a model family is, as data: how Hugging Face spells its configuration and its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Source:
    """A Hugging Face tensor from which a parameter, or a part of one, is read.

    tensor: its name; "{layer}" stands for the index of the layer.
    axes: for each axis of the tensor the letters that are merged in it, slowest first:
        "KGH,D" is a matrix of K·G·H rows and D columns.  Sources of one parameter that name the
        same tensor lie in it one after the other, along its first axis.
    """

    tensor: str
    axes: str


@dataclass(frozen=True)
class Part:
    """A `Source` of one parameter of one model: where its tensor goes.

    groups, shape: the letters merged in each axis of the source, and its size.
    above, rows: of the tensor's first axis: places before the source, and all places.
    stacked: the letter of the axis along which the sources lie; "" if there is only one.
    extra: the letter of the tensor that lies along that axis; "" if it fills just one place.
    start, stop: the places that it fills there.
    """

    tensor: str
    groups: tuple[str, ...]
    shape: tuple[int, ...]
    above: int
    rows: int
    stacked: str
    extra: str
    start: int
    stop: int


def _nothing(config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Family:
    """How the checkpoints of one family of models are spelled.

    architectures: the names in config.json that mean this family.
    fields: key in config.json → field of `ModelConfig`.
    defaults: key in config.json → what its absence means.
    facts: fields of `ModelConfig` that the family fixes and no key tells.
    adjust: config.json → further fields, where renaming a key does not do.
    adjusted: keys that `adjust` reads and that other families refuse.
    weights: parameter → its sources.  Where there are several they lie one after the other along
        the one axis that none of them has: "KGH,D", "KH,D" and "KH,D" make up `DKUH`, the first
        filling G places of U, the others one each.
    ignored: patterns (fnmatch) of tensors that may be in a checkpoint and are not needed.
    """

    architectures: tuple[str, ...]
    fields: Mapping[str, str]
    weights: Mapping[str, tuple[Source, ...]]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    adjust: Callable[[Mapping[str, Any]], dict[str, Any]] = _nothing
    adjusted: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def parts(self, name: str, layer: int | None, sizes: Mapping[str, int]) -> list[Part]:
        """What the parameter `name` is read from; sizes: axis letter → size."""
        letters, parts, start = name.rpartition("_")[2], [], 0
        rows: dict[str, int] = {}
        for source in self.weights[name]:
            groups = tuple(source.axes.split(","))
            theirs = "".join(groups)
            stacked = "".join(letter for letter in letters if letter not in theirs)
            extra = "".join(letter for letter in theirs if letter not in letters)
            shape = tuple(math.prod(sizes[letter] for letter in group) for group in groups)
            stop = start + (sizes[extra] if extra else 1)
            tensor = source.tensor.format(layer=layer)
            above = rows.get(tensor, 0)
            rows[tensor] = above + shape[0]
            parts.append(Part(tensor, groups, shape, above, 0, stacked, extra, start, stop))
            start = stop
        return [replace(part, rows=rows[part.tensor]) for part in parts]


def windows(
    config: Mapping[str, Any], window: int | None, slides: Callable[[int], bool]
) -> dict[str, Any]:
    """Fields for a sliding window in the layers that config.json's `layer_types` names.

    window: in tokens, None if there is none.  slides: tells of each layer if there is no such list.
    """
    kinds = config.get("layer_types")
    layers = tuple(
        i
        for i in range(config["num_hidden_layers"])
        if (kinds[i] == "sliding_attention" if kinds else slides(i))
    )
    if window is None or not layers:
        return {}
    return {"sliding_window": window, "sliding_layers": layers}
