"""The command line: `python -m jaxinfer.kernels.tuning`: which blocks are fastest on this device?

Every choice of `candidates.sweeps` is timed, and its result compared with the reference's; the best
is written to `kernels/tuned/<chip>.yaml`, from where the kernels take it (`blocks.choose`).
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import yaml
from tqdm import tqdm

from jaxinfer.configs import Chip, find_chip, load_chip
from jaxinfer.errors import ConfigError, DeviceError, JaxinferError, ShapeError
from jaxinfer.kernels import blocks as tuned_blocks
from jaxinfer.kernels import candidates, cases, timing, workloads
from jaxinfer.kernels.blocks import Entry, Tuned
from jaxinfer.kernels.candidates import Sweep

DESCRIPTION = "Time the kernels' blocks on the present TPU or GPU, and keep the best."
EPILOG = """\
The file is written after each case, so an interrupted sweep goes on where it was; what has an entry
by the same versions of jax and the driver is not timed again, unless --again is given.

Exit codes: 0 all good, 1 no such device or nothing could be timed, 2 bad options, 130 interrupted.
"""
HEADER = "# Written by `python -m jaxinfer.kernels.tuning`; see docs/kernels.md.\n"
# Seconds that the calls of one timing take together.
SECONDS = 0.1
# Times blocks on a case of a sweep: seconds of a call.  Raises anything if they do not work.
Timer = Callable[[Sweep, str, Any], float]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        if args.list:
            print(_listing(_jobs(args, load_chip(args.device))))
            return 0
        chip, kind = present_chip(args.device)
        path = Path(args.output) if args.output else tuned_blocks.path_of(chip.name)
        jobs, timer = _jobs(args, chip), DeviceTimer(chip)
        tuned, left = tune(
            jobs, path, Tuned(chip=chip.name, device_kind=kind, entries=[]), timer,
            versions=timing.versions(), again=args.again, limit_seconds=args.limit_seconds,
        )  # fmt: skip
    except KeyboardInterrupt:
        return _say("interrupted; what was timed is in the file", 130)
    except ConfigError as error:
        return _say(f"error: {error}", 2)
    except (JaxinferError, OSError) as error:
        return _say(f"error: {error}", 1)
    print(_table(tuned, jobs))
    for job in left:
        print(f"left out: {_name(job)}: call again, or with a greater --limit-seconds")
    print(f"written: {path}", flush=True)
    return 0 if any(tuned.find(job.looked_up_as, job.key) for job in jobs) else 1


def _say(message: str, code: int) -> int:
    print(f"jaxinfer.kernels.tuning: {message}", file=sys.stderr, flush=True)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m jaxinfer.kernels.tuning", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--device", default="auto", metavar="CHIP", help="the chip that must be present, by the "
        "name of its sheet in configs/hardware (default: whichever is)")  # fmt: skip
    add("--op", nargs="+", metavar="OP", help=f"of {', '.join(candidates.OPS)} (default: all)")
    add("--case", metavar="TEXT", default="", help="only cases with TEXT in their names, and "
        "what is tuned together with them")  # fmt: skip
    add("--limit-seconds", type=float, default=270.0, metavar="X",
        help="begin no further case after this time (default: %(default)s)")  # fmt: skip
    add("--again", action="store_true", help="time what has an entry, too")
    add("--output", metavar="FILE", help="(default: kernels/tuned/CHIP.yaml)")
    add("--list", action="store_true", help="say what would be tried on --device, which need not "
        "be here")  # fmt: skip
    return parser


def present_chip(asked: str) -> tuple[Chip, str]:
    """The chip of the default device, and what jax calls it.

    Raises `DeviceError` if the device is not what is needed, `ConfigError` for unknown chips.
    """
    import jax

    if asked != "auto":
        load_chip(asked)  # there is such a chip
    try:
        device = jax.devices()[0]
    except RuntimeError as error:
        raise DeviceError(f"jax finds no device: {error}") from error
    if device.platform == "cpu":
        raise DeviceError(
            "there is nothing to tune: the kernels are for TPUs and NVIDIA GPUs, and jax sees only "
            "a CPU here.  Run this where one is, with pip install 'jaxinfer[tpu]' or "
            "'jaxinfer[gpu]'; --list --device CHIP says what would be tried"
        )
    chip = find_chip(device.device_kind)
    if chip is None:
        raise DeviceError(
            f"{device.device_kind!r} has no sheet: add configs/hardware/<name>.yaml with that name "
            "among its device_kinds"
        )
    if asked not in ("auto", chip.name):
        raise DeviceError(f"--device {asked}: the device here is {chip.name}: leave --device out")
    return chip, device.device_kind


def _jobs(args: argparse.Namespace, chip: Chip) -> list[Sweep]:
    wrong = [op for op in args.op or () if op not in candidates.OPS]
    if wrong:
        raise ConfigError(f"--op: {', '.join(wrong)} has no blocks to tune; there are: "
                          f"{', '.join(candidates.OPS)}")  # fmt: skip
    jobs: dict[str, Sweep] = {}
    asked = [op for op in candidates.OPS if op in (args.op or candidates.OPS)]
    for op in asked:
        for name in cases.TUNED[op]:
            case = workloads.case_of(op, name)
            try:
                workloads.implementation(op, case, backend_of(chip), chip)
                for job in candidates.sweeps(op, name, case, chip):
                    key = f"{job.looked_up_as} {job.key}"
                    known = jobs.setdefault(key, job)
                    if known is not job and known.op == op:
                        jobs[key] = dataclasses.replace(known, cases=known.cases + job.cases)
            except (ConfigError, ShapeError) as error:
                if args.case in name:
                    _say(f"no kernel for {op}, {name}: {error}", 0)
    found = [job for job in jobs.values() if any(args.case in case for case in job.cases)]
    if not found:
        raise ConfigError(f"--case {args.case!r}: {chip.name} has no kernel for any such case")
    return found


def backend_of(chip: Chip) -> str:
    return "mosaic_tpu" if chip.tpu is not None else "mosaic_gpu"


# -- the sweep --------------------------------------------------------------------------------


def tune(
    jobs: Sequence[Sweep],
    path: Path,
    empty: Tuned,
    timer: Timer,
    *,
    versions: dict[str, Any],
    again: bool = False,
    limit_seconds: float = float("inf"),
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Tuned, list[Sweep]]:
    """Time the choices of each job, and keep the best in a file, which is written after each job.

    empty: what the file is to begin with; if there is one already, it goes on.  versions: of now.
    Returns what the file holds in the end, and the jobs that time did not suffice for.
    Raises `ConfigError` if there is a file that is unsound or for another chip.
    """
    tuned = tuned_blocks.read(path) if path.exists() else empty
    if tuned.chip != empty.chip:
        raise ConfigError(f"{path} is for {tuned.chip}, but the device is {empty.chip}")
    started, left = clock(), []
    total = sum(_timings(job) for job in jobs)
    with tqdm(total=total, desc="tuning", disable=None) as bar:
        for job in jobs:
            found = tuned.find(job.looked_up_as, job.key)
            same = found is not None and (found.versions, found.cases) == (versions, _cases(job))
            if same and not again:
                bar.update(_timings(job))
            elif clock() - started > limit_seconds:
                left.append(job)
            else:
                bar.set_postfix_str(_name(job))
                tuned = _tune_one(job, tuned, path, timer, versions, bar.update)
    return tuned, left


def _tune_one(
    job: Sweep,
    tuned: Tuned,
    path: Path,
    timer: Timer,
    versions: dict[str, Any],
    progress: Callable[[], Any],
) -> Tuned:
    """The file's contents with the job's entry, or its failure; they are written."""
    trying = {"op": job.looked_up_as, "key": job.key}
    before = tuned.trying or {}
    ended = before.get("ended", []) if {**before, "ended": 0} == {**trying, "ended": 0} else []
    times: dict[Any, list[float]] = {
        blocks: [] for blocks in job.choices if tuned_blocks.fields(blocks) not in ended
    }
    refused = [f"{_words(fields)}: ended the process" for fields in ended]
    try:
        for case, blocks in itertools.product(job.cases, job.choices):
            if blocks in times:
                fields = tuned_blocks.fields(blocks)
                write(
                    path, dataclasses.replace(tuned, trying={**trying, "ended": [*ended, fields]})
                )
                try:
                    times[blocks].append(timer(job, case, blocks))
                except Exception as error:  # of any kind: compilers and devices have their own
                    text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                    refused.append(f"{_words(fields)}: {text}")
                    del times[blocks]
            progress()
    except BaseException:  # interrupted, not ended
        write(
            path, dataclasses.replace(tuned, trying={**trying, "ended": ended} if ended else None)
        )
        raise
    failures = {name: why for name, why in tuned.failures.items() if name != _name(job)}
    entries = [e for e in tuned.entries if (e.op, e.key) != (job.looked_up_as, job.key)]
    if times:
        means = {blocks: geometric_mean(seconds) for blocks, seconds in times.items()}
        entries.append(_entry(job, means, refused, versions))
    else:
        failures[_name(job)] = "; ".join(refused)
    tuned = dataclasses.replace(tuned, entries=entries, failures=failures, trying=None)
    write(path, tuned)
    return tuned


def _entry(job: Sweep, times: dict[Any, float], refused: list[str], versions: Any) -> Entry:
    best = min(times, key=lambda blocks: times[blocks])
    works = [workloads.work(job.op, workloads.case_of(job.op, case)) for case in job.cases]
    num_bytes, flops = (geometric_mean(some) for some in zip(*works, strict=True))
    usual = times.get(job.choices[0])
    return Entry(
        op=job.looked_up_as, cases=_cases(job), key=job.key,
        blocks=tuned_blocks.fields(best), microseconds=round(1e6 * times[best], 3),
        gb_per_s=round(num_bytes / times[best] / 1e9, 1),
        tflop_per_s=round(flops / times[best] / 1e12, 2),
        heuristic=tuned_blocks.fields(job.choices[0]),
        heuristic_microseconds=None if usual is None else round(1e6 * usual, 3),
        tried=len(times), refused=refused, date=datetime.date.today().isoformat(),
        versions=versions,
    )  # fmt: skip


def write(path: Path, tuned: Tuned) -> None:
    """Replace the file in one go: whoever reads it finds the old or the new one."""
    text = yaml.safe_dump(dataclasses.asdict(tuned), sort_keys=False, width=100)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(HEADER + text)
    os.replace(new, path)


class DeviceTimer:
    """Times on the default device.  Raises `ValueError` if the result is not the reference's."""

    def __init__(self, chip: Chip):
        self.chip = chip
        self.name = ""
        self.arrays: list[tuple[Any, ...]] = []
        self.expected: Any = None

    def __call__(self, job: Sweep, name: str, blocks: Any) -> float:
        import jax

        case = workloads.case_of(job.op, name)
        if self.name != f"{job.op}: {name}":
            self.arrays, self.expected = [], None  # before the next ones need the memory
            copies = timing.copies_needed(workloads.work(job.op, case)[0], self.chip)
            self.arrays = [workloads.arguments(job.op, case, seed) for seed in range(copies)]
            self.expected = workloads.implementation(job.op, case, "reference", self.chip)(
                *self.arrays[0]
            )
            self.name = f"{job.op}: {name}"
        call = workloads.implementation(
            job.op, case, backend_of(self.chip), self.chip, {job.argument: blocks}
        )
        program = workloads.in_one_program(job.op, case, call, self.arrays)
        result = jax.block_until_ready(program())[0]
        far = workloads.difference(result, self.expected)
        if far > workloads.AGREES:
            raise ValueError(f"differs from the reference by {far:.2g} of its largest number")
        return workloads.seconds_of_one(program, SECONDS)


# -- for people -------------------------------------------------------------------------------


def _cases(job: Sweep) -> list[str]:
    return [f"{job.op}: {case}" for case in job.cases]


def _name(job: Sweep) -> str:
    return _short(_cases(job))


def _short(cases: list[str]) -> str:
    return cases[0] + (f" (+ {len(cases) - 1})" if len(cases) > 1 else "")


def _timings(job: Sweep) -> int:
    return len(job.cases) * len(job.choices)


def _words(fields: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in fields.items())


def _listing(jobs: Sequence[Sweep]) -> str:
    return "\n".join(
        "\n".join(_cases(job))
        + "\n"
        + "\n".join(f"    {_words(tuned_blocks.fields(blocks))}" for blocks in job.choices)
        for job in jobs
    )


def _table(tuned: Tuned, jobs: Sequence[Sweep]) -> str:
    keys = [(job.looked_up_as, job.key) for job in jobs]
    lines = [f"{'':<58}{'us':>9}{'before':>9}{'GB/s':>8}{'TFLOP/s':>9}  blocks"]
    for entry in tuned.entries:
        if (entry.op, entry.key) in keys:
            before = entry.heuristic_microseconds
            lines.append(
                f"{_short(entry.cases):<58}{entry.microseconds:>9.1f}"
                f"{'failed' if before is None else f'{before:.1f}':>9}"
                f"{entry.gb_per_s:>8.0f}{entry.tflop_per_s:>9.1f}  {_words(entry.blocks)}"
            )
            lines += [f"    refused: {text}" for text in entry.refused]
    lines += [f"failed: {name}: {why}" for name, why in tuned.failures.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
