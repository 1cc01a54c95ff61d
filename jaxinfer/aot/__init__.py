"""Compiles for chips that are not there, and says what the programs need: see docs/aot.md."""

from jaxinfer.aot.compile import compile_for
from jaxinfer.aot.report import Memory, Moved, Report

__all__ = ["Memory", "Moved", "Report", "compile_for"]
