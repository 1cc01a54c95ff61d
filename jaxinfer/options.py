"""Fields of dataclasses as options of a command line, with the help of their docstrings."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from jaxinfer.config import field_names


def add_fields(
    group: Any,
    cls: type,
    *,
    without: Collection[str] = (),
    renamed: Mapping[str, str] = MappingProxyType({}),
    aliases: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> None:
    """One option for each field of a dataclass, absent from the result unless given.

    without: fields that get none.  renamed: fields whose option has another name.  aliases: further
    names.  All three speak of "Class.field".
    """
    hints, texts = typing.get_type_hints(cls), _field_docs(cls)
    for field in dataclasses.fields(cls):
        name = f"{cls.__name__}.{field.name}"
        if name in without:
            continue
        default: Any = field.default
        if isinstance(default, bool):
            default = "on" if default else "off"
        note = "" if default in (None, (), dataclasses.MISSING) else f" (default: {default})"
        group.add_argument(
            "--" + renamed.get(name, field.name).replace("_", "-"),
            *aliases.get(name, ()),
            dest=name,
            default=argparse.SUPPRESS,
            help=(texts[field.name] + note).replace("%", "%%"),
            **_how_to_read(hints[field.name]),
        )


def _how_to_read(hint: Any) -> dict[str, Any]:
    """argparse's settings for a field of a type: plain, one or several, or else as JSON."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    kinds = list(typing.get_args(hint)) if isinstance(hint, types.UnionType) else [hint]
    optional = type(None) in kinds
    kinds = [kind for kind in kinds if kind is not type(None)]
    for kind, metavar in ((str, "TEXT"), (int, "N"), (float, "X")):
        if Sequence[kind] in kinds:
            return {"type": kind, "nargs": "+", "action": "extend", "metavar": metavar}
        if kinds == [kind]:
            return {"type": _or_none(kind) if optional else kind, "metavar": metavar}
    return {"type": _json_value, "metavar": "JSON"}


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    read.__name__ = getattr(kind, "__name__", "value")  # argparse names it in messages
    return read


def seed(text: str) -> int:
    """argparse's type of a seed for NumPy."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {value}")
    return value


def _json_value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None


def _field_docs(cls: type) -> dict[str, str]:
    """Field name → its part of the class's docstring, whose entries begin with `name[, name]: `.

    A field without an entry of its own is explained in the first that mentions it with a colon.
    """
    found = re.findall(r"^    (\w+(?:, \w+)*): (.*(?:\n {5,}.*)*)", cls.__doc__ or "", re.MULTILINE)
    entries = [(heads, " ".join(text.split())) for heads, text in found]
    texts = {name: text for heads, text in entries for name in heads.split(", ")}
    for name in set(field_names(cls)) - set(texts):
        mentions = (f"{heads}: {text}" for heads, text in entries if f"{name}: " in text)
        texts[name] = next(mentions, "")
    return texts


def given(options: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """The fields of a dataclass that the options set."""
    names = {f"{cls.__name__}.{name}": name for name in field_names(cls)}
    return {names[key]: value for key, value in options.items() if key in names}
