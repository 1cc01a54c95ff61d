"""The command line: `python -m jaxinfer.aot`: will this model fit on those chips, how fast?"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from jaxinfer.aot.engine import Bound, Estimate, Workload, compile_engine
from jaxinfer.errors import ConfigError, JaxinferError
from jaxinfer.options import add_fields, given

DESCRIPTION = "Compile a model's steps for chips that need not be here; do they fit, how fast?"
EPILOG = """\
A table for people goes to standard output, and after it, on the last line, all that was found as
one JSON object.  docs/aot.md says what the figures mean.

Exit codes: 0 it fits, 1 it does not, or does not compile, 2 bad options.
"""
GIB = 2**30
ALIASES = {"Workload.tensor_parallel_size": ["--tp"]}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = vars(_parser().parse_args(argv))
    try:
        found = compile_engine(options["target"], Workload(**given(options, Workload)))
    except ConfigError as error:
        return _say(f"error: {error}", 2)
    except JaxinferError as error:
        return _say(f"error: {error}", 1)
    print(table(found) + "\n")
    print(json.dumps(found.as_dict(), allow_nan=False), flush=True)
    return 0 if found.fits else 1


def _say(message: str, code: int) -> int:
    print(f"jaxinfer.aot: {message}", file=sys.stderr, flush=True)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m jaxinfer.aot", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python -m jaxinfer.aot --model MODEL --target CHIP:N [options]",
    )  # fmt: skip
    parser.add_argument(
        "--target", required=True, help="such as h200:1, v6e:8 or v5e:2x4", metavar="CHIP:N"
    )
    add_fields(parser, Workload, aliases=ALIASES)
    return parser


def table(found: Estimate) -> str:
    """The estimate for people."""
    work = found.workload
    lines = [
        f"{work.model} on {found.target}, {found.devices} device(s): {work.batch} requests, "
        f"{work.context} tokens each",
        "",
        "memory on each device",
        _size("weights", found.weights),
        _size("KV cache", found.kv_cache),
    ]
    if found.needed is not None:
        lines.append(_size("programs and buffers", found.needed - found.weights - found.kv_cache))
        lines.append(_size("needed", found.needed))
    lines += [_size("there is", found.available), f"  {_verdict(found)}", ""]
    for name, report in found.programs.items():
        exchanged = ", ".join(f"{one.count} {one.kind} {one.shape}" for one in report.collectives)
        lines += [
            f"program {name}: compiled in {report.compile_seconds:.1f} s",
            _size("temporaries", report.memory.temporaries),
            _size("moved in memory", report.hbm_bytes),
            f"  {'donated arguments reused':<26}{len(report.aliased)} of {report.donated}",
            f"  {'exchanged':<26}{exchanged or 'nothing'}",
            f"  {'kernels':<26}{_counts(report.kernels)}",
        ]
        lines += [f"  {'warning':<26}{one}" for one in report.warnings]
    lines += [f"program {name}: {message}" for name, message in found.refused.items()]
    lines.append("")
    for title, bound in (
        ("decode, at most", found.decode),
        ("decode, by what these programs move", found.compiled_decode),
        ("prefill, at most", found.prefill),
    ):
        if bound is not None:
            lines.append(f"{title:<38}{_speed(bound)}")
    return "\n".join(lines)


def _verdict(found: Estimate) -> str:
    if found.fits:
        return "it fits"
    return (
        "it does not fit: lower batch or context, use smaller number formats, or more devices "
        "with tensor_parallel_size"
    )


def _size(name: str, size: int) -> str:
    return f"  {name:<26}{size / GIB:9.3f} GiB"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


def _speed(bound: Bound) -> str:
    limit = "operations" if (bound.flop_seconds or 0) > bound.byte_seconds else "memory"
    return (
        f"{bound.tokens_per_second:12,.0f} tokens/s  ({bound.seconds * 1e3:.3f} ms a step of "
        f"{bound.tokens}, by {limit})"
    )


if __name__ == "__main__":
    sys.exit(main())
