"""The record of which kernels were interpreted, compiled and run, and README's table of it.

Tests say through the fixture `kernel_ran` what they ran; with `pytest --record-kernels` what those
that passed said is written to docs/kernels.json, file by file.  `bench kernels --record` enters
what ran on a device.  `python -m tests.kernel_record` makes README's table; a test compares.
"""

from __future__ import annotations

import datetime
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).parents[1]
RECORD, README = ROOT / "docs" / "kernels.json", ROOT / "README.md"
BEGIN, END = "<!-- kernels: made by `make kernel-table` -->\n", "<!-- end of kernels -->\n"
# How tests run what: in an interpreter, on the CPU (references), or compiled for "chip".
INTERPRETED, ON_CPU = "interpreted", "cpu"


class Recorder:
    """A pytest plugin that notes what passed tests ran, and writes it when all are done."""

    def __init__(self, path: Path = RECORD):
        self.path = path
        self.passed: dict[str, set[str]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        said = [" ".join(value) for name, value in report.user_properties if name == "kernel"]
        if report.when == "call" and said:
            lines = self.passed.setdefault(report.nodeid.partition("::")[0], set())
            lines.update(said if report.passed else ())

    def pytest_sessionfinish(self) -> None:
        record = json.loads(self.path.read_text())
        for file, lines in self.passed.items():
            record["tests"][file] = {
                "jax": jax.__version__, "date": datetime.date.today().isoformat(),
                "passed": sorted(lines),
            }  # fmt: skip
        record["tests"] = dict(sorted(record["tests"].items()))
        self.path.write_text(json.dumps(record, indent=1) + "\n")


def table(record: dict[str, Any]) -> str:
    """The record as a table in Markdown: a line for each operation and backend."""
    # Of each operation and backend: how it was run → with which dtypes.
    ways: dict[tuple[str, str], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for entry in record["tests"].values():
        for line in entry["passed"]:
            op, backend, dtype, how = line.split(" ")
            ways[op, backend][how].add(dtype)
    for chip, entry in record["devices"].items():
        for line in entry["passed"]:
            op, backend, dtype = line.split(" ")
            ways[op, backend][f"on {chip}"].add(dtype)
    lines = [
        "| operation | backend | dtypes and formats | interpreted | compiled for | run on |",
        "|---|---|---|---|---|---|",
    ]
    for (op, backend), found in sorted(ways.items(), key=_order):
        known = set.union(*found.values())
        interpreted = {"yes": found.pop(INTERPRETED)} if INTERPRETED in found else {}
        on = {how.removeprefix("on "): found[how] for how in found if _on_device(how)}
        compiled = {how: found[how] for how in found if not _on_device(how)}
        cells = [_cell(part, known) for part in (interpreted, compiled, on)]
        lines.append(f"| {op} | {backend} | {', '.join(sorted(known))} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _order(item: tuple[tuple[str, str], Any]) -> tuple[str, bool, str]:
    (op, backend), _ = item
    return op, backend != "reference", backend


def _on_device(how: str) -> bool:
    return how == ON_CPU or how.startswith("on ")


def _cell(found: dict[str, set[str]], known: set[str]) -> str:
    """`a, b; c: only int8`: those with all known dtypes first."""
    whole = sorted(name for name, dtypes in found.items() if dtypes == known)
    groups = defaultdict(list)
    for name, dtypes in sorted(found.items()):
        if dtypes != known:
            groups[", ".join(sorted(dtypes))].append(name)
    parts = [", ".join(whole)] if whole else []
    parts += [f"{', '.join(names)}: {dtypes}" for dtypes, names in groups.items()]
    return "; ".join(parts) or "–"


def with_table(readme: str, record: dict[str, Any]) -> str:
    """README's text with the record's table between the marks."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert rest, f"README.md has no line {BEGIN!r}"
    return f"{before}{BEGIN}\n{table(record)}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(), json.loads(RECORD.read_text())))
