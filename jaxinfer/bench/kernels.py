"""`kernels`: how fast each kernel is, beside its reference and what the device can do."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from jaxinfer.bench.report import machine
from jaxinfer.bench.report import table as plain_table
from jaxinfer.configs import Chip, find_chip
from jaxinfer.errors import ConfigError

if TYPE_CHECKING:
    from jaxinfer.kernels.timing import Ceilings

HELP = "time each kernel beside its reference and the device's limits"
DESCRIPTION = """\
Times the operations that have kernels on the present device, by the shapes of kernels/cases.py: on
a TPU or GPU the kernel and the reference, on a CPU the reference alone, which is what runs there.

Before that, in the same run, a large copy and a large matrix product are timed.  The floor of a
case is the larger of its bytes at the speed of that copy and its operations at the speed of that
product; "of floor" is the floor over the time, so 1 is as good as it gets.  Compilation is not in
any time.  A case that fails says so in its row, and the others run.
"""
COLUMNS = ("us", "floor_us", "of_floor", "gb_per_s", "tflop_per_s", "difference")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    add = parser.add_argument
    add("--op", nargs="+", metavar="OP", help="only these operations (default: all)")
    add("--backend", choices=("all", "reference", "kernel"), default="all",
        help="only the reference, or the device's own kernels (default: %(default)s)")  # fmt: skip
    add("--case", metavar="TEXT", default="", help="only cases with TEXT in their names")
    add("--all-cases", action="store_true", help="every real case, not only a choice of them")
    add("--limit-seconds", type=float, default=170.0, metavar="X",
        help="begin no further case after this time (default: %(default)s)")  # fmt: skip
    add("--record", metavar="FILE", help="a JSON file to enter what ran and agreed with its "
        "reference: docs/kernels.json, from which the table of kernels is made")  # fmt: skip


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; raises `ConfigError` for options that make no sense."""
    import jax

    from jaxinfer.hardware import enable_compile_cache
    from jaxinfer.kernels import timing, workloads

    wrong = [op for op in args.op or () if op not in workloads.OPS]
    if wrong:
        raise ConfigError(f"--op: no {', '.join(wrong)}; there are: {', '.join(workloads.OPS)}")
    if not args.limit_seconds > 0:
        raise ConfigError(f"--limit-seconds must be more than 0, got {args.limit_seconds}")
    device = jax.devices()[0]
    chip = find_chip(device.device_kind)
    if args.record and chip is None:
        raise ConfigError("--record is for chips that have a sheet in configs/hardware")
    backends = _backends(args.backend, device.platform, chip)
    jobs = _jobs(args, device.platform)
    started = time.perf_counter()
    enable_compile_cache()
    limits = timing.ceilings(device.platform)
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    with tqdm(jobs, desc="timing", unit="case", disable=None) as bar:
        for op, name in bar:
            bar.set_postfix_str(f"{op}: {name}")
            if time.perf_counter() - started > args.limit_seconds:
                left_out.append(f"{op}: {name}")
                continue
            rows += measure(op, name, backends, chip, limits)
    found: dict[str, Any] = {
        "machine": machine(),
        "device": {
            "kind": device.device_kind, "platform": device.platform,
            "chip": None if chip is None else chip.name, **timing.versions(),
        },
        "ceilings": asdict(limits),
        "kernels": rows,
        "run": {
            "date": datetime.date.today().isoformat(), "seconds": time.perf_counter() - started,
            "left_out": left_out,
        },
    }  # fmt: skip
    if args.record:
        record(Path(args.record), found)
    return found


def _backends(asked: str, platform: str, chip: Chip | None) -> list[str]:
    own = {"tpu": "mosaic_tpu", "gpu": "mosaic_gpu"}.get(platform)
    if asked == "kernel" and own is None:
        raise ConfigError(
            f"--backend kernel: a {platform} has no kernels of its own: use --backend reference, "
            "or a TPU or NVIDIA GPU and jax for it (pip install 'jaxinfer[tpu]' or 'jaxinfer[gpu]')"
        )
    # The reference first: kernels are compared with it.
    return ([] if asked == "kernel" else ["reference"]) + (
        [own] if own is not None and asked != "reference" else []
    )


def _jobs(args: argparse.Namespace, platform: str) -> list[tuple[str, str]]:
    from jaxinfer.kernels import cases

    chosen = cases.TIMED_ON_CPU if platform == "cpu" else cases.TIMED
    if args.all_cases:
        single = {name for name, case in cases.REAL_PRODUCTS.items() if case.single}
        chosen = {
            "paged_attention": tuple(cases.REAL), "write_pages": tuple(cases.REAL),
            "quantized_matmul": tuple(single),
            "grouped_matmul": tuple(n for n in cases.REAL_PRODUCTS if n not in single),
        }  # fmt: skip
    jobs = [
        (op, name) for op, names in chosen.items() if op in (args.op or chosen)
        for name in names if args.case in name
    ]  # fmt: skip
    if not jobs:
        raise ConfigError(f"--case {args.case!r}: no case of these operations has that in its name")
    return jobs


def measure(
    op: str, name: str, backends: list[str], chip: Chip | None, limits: Ceilings
) -> list[dict[str, Any]]:
    """A row for each backend.  What fails is in its row, as `error`."""
    from jaxinfer.kernels import workloads

    case = workloads.case_of(op, name)
    num_bytes, flops = workloads.work(op, case)
    floor = limits.floor(num_bytes, flops)
    rows, reference = [], None
    for backend in backends:
        row: dict[str, Any] = {
            "op": op, "case": name, "stored": workloads.stored(case), "backend": backend,
            **dict.fromkeys(COLUMNS), "compile_seconds": None, "error": None,
        }  # fmt: skip
        rows.append(row)
        try:
            call = workloads.implementation(op, case, backend, chip)
            seconds, row["compile_seconds"], result = _time(op, case, call, num_bytes, chip)
        except Exception as error:  # of any kind: compilers and devices have their own
            row["error"] = _short(error)
            continue
        row |= {
            "us": 1e6 * seconds, "floor_us": 1e6 * floor, "of_floor": floor / seconds,
            "gb_per_s": num_bytes / seconds / 1e9, "tflop_per_s": flops / seconds / 1e12,
        }  # fmt: skip
        if backend == "reference":
            reference = result
        elif reference is not None:
            found = workloads.difference(result, reference)
            row["difference"] = found if math.isfinite(found) else None
            if found > workloads.AGREES:
                row["error"] = f"differs from the reference by {found:.2g} of its largest number"
    return rows


def _time(op: str, case: Any, call: Any, num_bytes: int, chip: Chip | None) -> Any:
    """Seconds of a call, of the first time (which compiles), and the result."""
    import jax

    from jaxinfer.kernels import timing, workloads

    donates = op == "write_pages"
    started = time.perf_counter()
    first = workloads.arguments(op, case)
    made = time.perf_counter()
    # Making many arrays costs time, too: as many as keep caches cold, but not for long.
    copies = timing.copies_needed(num_bytes, chip) if made - started < 5 else 1
    sets = [first, *(workloads.arguments(op, case, seed) for seed in range(1, copies))]
    made = time.perf_counter()
    if jax.default_backend() != "cpu" and not donates:
        program = workloads.in_one_program(op, case, call, sets)
        result = jax.block_until_ready(program())[0]
        compile_seconds = time.perf_counter() - made
        return workloads.seconds_of_one(program), compile_seconds, result
    # On a CPU calls of one program would run side by side.
    result = jax.block_until_ready(call(*sets[0]))
    compile_seconds = time.perf_counter() - made
    if donates:  # what came first is gone
        sets[0] = workloads.arguments(op, case)

    def turn(number: int) -> Any:
        index = number % copies
        out = call(*sets[index])
        if donates:
            sets[index] = (out, *sets[index][1:])
        return out

    return timing.seconds_per_call(turn), compile_seconds, result


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (text if isinstance(error, ConfigError) else f"{type(error).__name__}: {text}")[:500]


# -- for people, and for the table of kernels --------------------------------------------------


def table(found: dict[str, Any]) -> str:
    """The report for people: the kernels as one table, a line for each backend of a case."""
    rest = {name: values for name, values in found.items() if name != "kernels"}
    heads = ("us", "floor us", "of floor", "GB/s", "TFLOP/s", "difference")
    width = max(len(row["case"]) for row in found["kernels"]) if found["kernels"] else 0
    lines = ["kernels", "-------", f"  {'':<{width + 13}}" + "".join(f"{h:>11}" for h in heads)]
    previous = None
    for row in found["kernels"]:
        if row["op"] != previous:
            lines.append(f"  {row['op']}")
            previous = row["op"]
        figures = "".join(f"{_number(row[column]):>11}" for column in COLUMNS)
        lines.append(f"  {row['case']:<{width}}  {row['backend']:<10} {figures}".rstrip())
        if row["error"]:
            lines.append(f"      {row['error']}")
    return plain_table(rest) + "\n\n" + "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def record(path: Path, found: dict[str, Any]) -> None:
    """Enter what ran on this device and agreed with its reference; raises `ConfigError`.

    What did so earlier stays, unless it failed now.
    """
    chip = found["device"]["chip"]
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--record {path} cannot be read: {error}") from error
    before = kept["devices"].get(chip, {"passed": []})["passed"]
    kernels = [row for row in found["kernels"] if row["backend"] != "reference"]

    def lines(rows: list[dict[str, Any]]) -> set[str]:
        return {f"{row['op']} {row['backend']} {row['stored']}" for row in rows}

    failed = lines([row for row in kernels if row["error"] is not None])
    compared = lines([row for row in kernels if row["difference"] is not None])
    versions = {name: found["device"][name] for name in ("jax", "jaxlib", "driver", "plugin")}
    kept["devices"][chip] = {
        "date": found["run"]["date"], **versions,
        "passed": sorted((set(before) | compared) - failed),
    }  # fmt: skip
    path.write_text(json.dumps(kept, indent=1) + "\n")
