"""The command line: `python -m jaxinfer.bench COMMAND`.

A command is a module with `HELP` (one line), `add_arguments(parser)` and `run(args)`, which returns
its report, or {} if there is none, and `table(report)` unless `report.table` is good enough.  It
imports jax no earlier than in `run`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from jaxinfer.bench import (
    compare,
    host,
    kernels,
    latency,
    prepare_dataset,
    report,
    steps,
    throughput,
)
from jaxinfer.errors import ConfigError, DatasetError, JaxinferError, RequestError

COMMANDS: dict[str, Any] = {
    "throughput": throughput,
    "latency": latency,
    "compare": compare,
    "prepare-dataset": prepare_dataset,
}
DEVELOPER_COMMANDS: dict[str, Any] = {
    "host": host,
    "kernels": kernels,
    "steps": steps,
}

EPILOG = """\
A table for people goes to standard output, and after it, on the last line, the report as one JSON
object.  Progress goes to standard error.  Options may be written with underscores, too, as
trtllm-bench has them.  docs/benchmarks.md says what the figures mean.

Exit codes: 0 all good, 1 the engine failed, 2 bad options or data, 130 interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args([_with_dashes(word) for word in words])
    try:
        if args.report_json:  # better now than after an hour; what is there stays until then
            _write(args.report_json, "", mode="a")
        found = args.run(args)
        if found:
            line = json.dumps(found, allow_nan=False)
            if args.report_json:
                _write(args.report_json, json.dumps(found, indent=2) + "\n")
            print(args.table(found) + "\n")
            print(line, flush=True)
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except (ConfigError, DatasetError, RequestError) as error:
        return _say(f"error: {error}", 2)
    except (JaxinferError, OSError) as error:
        return _say(f"error: {error}", 1)
    return 0


def _say(message: str, code: int) -> int:
    print(f"jaxinfer.bench: {message}", file=sys.stderr, flush=True)
    return code


def _write(path: str, text: str, mode: str = "w") -> None:
    try:
        with open(path, mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"--report-json cannot be written: {error}") from error


def _with_dashes(word: str) -> str:
    """`--max_batch_size=8` as `--max-batch-size=8`."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _parser() -> argparse.ArgumentParser:
    as_written = argparse.RawDescriptionHelpFormatter
    groups = {"commands": COMMANDS, "for developers": DEVELOPER_COMMANDS}
    width = max(len(name) for group in groups.values() for name in group)
    listing = "\n\n".join(
        "\n".join([
            f"{title}:",
            *(f"  {name:<{width}}  {module.HELP}" for name, module in group.items()),
        ])
        for title, group in groups.items()
    )  # fmt: skip
    parser = argparse.ArgumentParser(
        "python -m jaxinfer.bench", description="Measure the engine.\n\n" + listing, epilog=EPILOG,
        formatter_class=as_written, usage="python -m jaxinfer.bench COMMAND [options]",
    )  # fmt: skip
    commands = parser.add_subparsers(
        required=True, metavar="COMMAND", help="see above", prog="python -m jaxinfer.bench"
    )
    for name, module in {**COMMANDS, **DEVELOPER_COMMANDS}.items():
        command = commands.add_parser(name, formatter_class=as_written, allow_abbrev=False)
        module.add_arguments(command)
        table = getattr(module, "table", report.table)
        command.set_defaults(run=module.run, table=table, report_json=None)
        if module is not prepare_dataset:  # it has no report
            command.add_argument(
                "--report-json", metavar="FILE", help="write the report there, too"
            )
    return parser


if __name__ == "__main__":
    sys.exit(main())
