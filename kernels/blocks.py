"""How kernels cut their work: as was measured best on a chip, else as a heuristic says.

`kernels/tuned/<chip>.yaml` holds what `python -m jaxinfer.kernels.tuning` measured.  `choose` is
the one way in which a kernel comes by its blocks.  An entry is for exactly its key; where there is
none, the kernel's heuristic, a pure function of shapes, dtypes and the chip's facts, decides.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp

from jaxinfer.configs import from_mapping, read_mapping
from jaxinfer.errors import ConfigError, ShapeError
from jaxinfer.kernels.quantized import Quantized
from jaxinfer.kernels.write_pages import Pool

TUNED = Path(__file__).with_name("tuned")
# What an entry is for: letters and names with their values.
Key = dict[str, int | str | None]
Blocks = TypeVar("Blocks")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The best blocks for a key, and how they were found.

    op: whose entries a kernel looks through.
    cases: what was timed, by operation and name in kernels/cases.py.
    key: see `pages_key` and `product_key`.  blocks: the fields of the kernel's own class of blocks.
    microseconds, gb_per_s, tflop_per_s: of the best, geometric means over the cases; bytes and
        operations as in `workloads.work`.
    heuristic, heuristic_microseconds: what would be taken without the entry, and its time (None if
        it failed).
    tried: how many blocks were timed.  refused: those that failed, with the reason.
    date, versions: of the measurement; see `timing.versions`.
    """

    op: str
    cases: list[str]
    key: Key
    blocks: dict[str, Any]
    microseconds: float
    gb_per_s: float
    tflop_per_s: float
    heuristic: dict[str, Any]
    heuristic_microseconds: float | None
    tried: int
    refused: list[str]
    date: str
    versions: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A file of tuned blocks.

    device_kind: what jax calls the chip.
    failures: cases without an entry, each with the reason.
    trying: what a sweep was about to time when this was written: `op`, `key`, and `ended`, a list
        of blocks of which the last was next.  Found in a file, it says that these ended the
        process: they are not tried again.
    """

    chip: str
    device_kind: str
    entries: list[Entry]
    failures: dict[str, str] = dataclasses.field(default_factory=dict)
    trying: dict[str, Any] | None = None

    def find(self, op: str, key: Key) -> Entry | None:
        return next((e for e in self.entries if e.op == op and e.key == key), None)


def path_of(chip: str) -> Path:
    return TUNED / f"{chip}.yaml"


def choose(
    op: str,
    chip: str | None,
    key: Key,
    kind: Callable[..., Blocks],
    check: Callable[[Blocks], None],
    heuristic: Callable[[], Blocks],
) -> Blocks:
    """The blocks for a key on a chip: tuned ones if there are any, else the heuristic's.

    op: whose entries count.  chip: the name of its sheet; None: the heuristic decides.
    kind: makes blocks of an entry's fields.  check: raises `ShapeError` if blocks do not fit.

    Raises `ConfigError`, which names file and entry, if tuned blocks are not blocks or do not fit.
    """
    path = None if chip is None else path_of(chip)
    entry = None if path is None or not path.exists() else read(path).find(op, key)
    if entry is None:
        return heuristic()
    try:
        blocks = kind(**entry.blocks)
        check(blocks)
    except (TypeError, ShapeError) as error:
        raise ConfigError(
            f"{path}: the blocks of {', '.join(entry.cases)} cannot be used: {error}; delete the "
            f"entry, or tune it again: python -m jaxinfer.kernels.tuning --op {op}"
        ) from error
    return blocks


def read(path: Path) -> Tuned:
    """Read a file of tuned blocks; raises `ConfigError` if it is unsound."""
    return _read(path, path.stat().st_mtime_ns)


@functools.cache
def _read(path: Path, stamp: int) -> Tuned:
    values = read_mapping(path)
    entries = values.get("entries")
    if not isinstance(entries, list):
        raise ConfigError(f"{path}: entries must be a list, got {entries!r}")
    values["entries"] = [
        from_mapping(Entry, entry, f"{path}: entry {number}")
        for number, entry in enumerate(entries, 1)
    ]
    tuned: Tuned = from_mapping(Tuned, values, str(path))
    if tuned.chip != path.stem:
        raise ConfigError(f"{path}: chip must be {path.stem!r} as in the file's name")
    return tuned


def pages_key(part: str, q_TKGH: Any, pool: Pool, window: int | None) -> Key:
    """part: "single" for rows of one token, "tiles" for longer ones."""
    _, K, S, H = pool.shape
    return {
        "part": part, "K": K, "G": q_TKGH.shape[2], "H": H, "S": S,
        "queries": jnp.dtype(q_TKGH.dtype).name, "stored": jnp.dtype(pool.k_PKSH.dtype).name,
        "window": window,
    }  # fmt: skip


def product_key(x_TD: Any, weight: Any) -> Key:
    """Of tokens and a weight `[E, D, F]`; the number of tokens is rounded up to a power of two."""
    E, D, F = weight.shape
    stored = weight.format if isinstance(weight, Quantized) else jnp.dtype(weight.dtype).name
    return {
        "E": E, "D": D, "F": F, "format": stored, "tokens_dtype": jnp.dtype(x_TD.dtype).name,
        "tokens": 1 << max(x_TD.shape[0] - 1, 0).bit_length(),
    }  # fmt: skip


def fields(blocks: Any) -> dict[str, Any]:
    """Blocks as an entry has them."""
    return dataclasses.asdict(blocks)


def require(conditions: Mapping[str, bool], blocks: Any) -> None:
    """Raise `ShapeError` with the first condition that does not hold."""
    for words, good in conditions.items():
        if not good:
            raise ShapeError(f"{blocks}: {words}")
