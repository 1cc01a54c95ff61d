"""Compiles for chips that are not there, and says what the programs need: see docs/aot.md."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxinfer.aot.compile import compile_for
    from jaxinfer.aot.engine import Estimate, Workload, compile_engine
    from jaxinfer.aot.report import Memory, Moved, Report

_HOME = {
    "Estimate": "engine", "Memory": "report", "Moved": "report", "Report": "report",
    "Workload": "engine", "compile_engine": "engine", "compile_for": "compile",
}  # fmt: skip
__all__ = [
    "Estimate",
    "Memory",
    "Moved",
    "Report",
    "Workload",
    "compile_engine",
    "compile_for",
]


def __getattr__(name: str) -> Any:
    """Imports on first use: the command's `--help` needs no jax."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
