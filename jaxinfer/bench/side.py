"""What `compare` asks of the engine and of what it is compared with.  Imports no jax."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from jaxinfer.errors import ConfigError


class Generator(Protocol):
    """One of the two that are measured."""

    name: str

    def generate(self, prompts: Sequence[list[int]], lengths: Sequence[int]) -> list[list[int]]:
        """Greedy continuations of exactly these lengths, whatever tokens come; blocks."""
        ...


class Side(Generator, Protocol):
    """What the engine is compared with.

    how: in a line, how it was run.  versions: of what it is made of.
    """

    how: str
    versions: dict[str, str]

    def next_scores(self, tokens: list[int]) -> np.ndarray:
        """Logits [V] of the token that follows these."""
        ...

    def close(self) -> None: ...


def load_extra(against: str, *names: str) -> list[Any]:
    """Import modules of the extra `compare`; raises `ConfigError` with the remedy."""
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise ConfigError(
            f"--against {against} needs {' and '.join(names)}, which cannot be imported ({error}): "
            "pip install 'jaxinfer[compare]'"
        ) from error


def left_padded(prompts: Sequence[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids `[B, longest]` that end together, and the padding in front of each row: int32."""
    pads_B = np.array([len(prompt) for prompt in prompts], np.int32)
    pads_B = pads_B.max() - pads_B
    rows = [[0] * pad + prompt for pad, prompt in zip(pads_B, prompts, strict=True)]
    return np.array(rows, np.int32), pads_B
