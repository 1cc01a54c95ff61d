"""Everything that a GPU has to show, in one go, and a report of it.

    python -m tests.on_gpu --output /tmp/shown                       # all of it, about an hour
    python -m tests.on_gpu --output /tmp/shown --only steps 1000/1000
    CUDA_VISIBLE_DEVICES=1 python -m tests.on_gpu --output /tmp/more --only products grouped

Each part is a process with a limit of its own.  What a part says is written to OUTPUT/report.txt
while it runs, so whatever ends the whole leaves what was found; a summary (how each part ended,
and its last lines) is printed.  The exit code counts the parts that failed.

The model has Llama-3.1-8B's shape and random weights.  The part `transformers` needs the extra
`compare`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from jaxinfer.configs import load_model_preset

MODEL = "llama-3.1-8b"
# Requests of so many tokens in and out, that keep an H200 busy for a minute or two.
LOADS = {"1000/1000": (828, 512), "128/2048": (768, 384), "2048/128": (320, 512)}
LAST_LINES = 40


@dataclass(frozen=True)
class Part:
    """Commands of Python, one after the other; `seconds`: the limit of each; `share`: of the
    device's memory that JAX takes at once, None: what it needs, when it needs it."""

    commands: tuple[tuple[str, ...], ...]
    seconds: int
    share: float | None = None


def parts(scratch: Path) -> dict[str, Part]:
    """By name, the engine's first; scratch: a folder for data sets and a model of 16 GB."""
    bench = ("-m", "jaxinfer.bench")
    vocabulary = load_model_preset(MODEL).config.vocab_size
    engine = ("--model", MODEL, "--load-format", "dummy", "--max-seq-len", "8300")
    decode = ("--decode", "1x1000", "64x1000", "512x100", "--prefill", "8192")
    steps = (*bench, "steps", *engine, "--max-batch-size", "512", *decode)
    found = {"steps": Part((steps,), 300, 0.94)}
    for name, (requests, rows) in LOADS.items():
        tokens, outputs = name.split("/")
        dataset = str(scratch / f"{tokens}.jsonl")
        made = (
            *bench, "prepare-dataset", "token-norm-dist", "--num-requests", str(requests),
            "--input-mean", tokens, "--input-stdev", "0", "--output-mean", outputs,
            "--output-stdev", "0", "--vocab-size", str(vocabulary), "--output", dataset,
        )  # fmt: skip
        run = (
            *bench, "throughput", *engine, "--max-batch-size", str(rows), "--dataset", dataset,
            "--no-enable-prefix-caching",
        )  # fmt: skip
        found[name] = Part((made, run), 400, 0.94)
    kernels = "tests.kernels"
    return found | {
        "engine": Part((("-m", "tests.engine_on_gpu"),), 400),
        "attention": Part((("-m", f"{kernels}.attention_on_gpu"),), 500),
        "products": Part((("-m", f"{kernels}.products_on_gpu"),), 200),
        "int8 products": Part((("-m", f"{kernels}.products_on_gpu", "--format", "int8"),), 200),
        "grouped": Part((("-m", f"{kernels}.grouped_on_gpu"),), 600),
        "kernels": Part(((*bench, "kernels", "--limit-seconds", "400"),), 500),
        "transformers": Part(
            (("-m", "tests.transformers_on_gpu", "--folder", str(scratch / "model")),), 600
        ),
    }


def run(part: Part, report: Path) -> tuple[str, list[str]]:
    """How a part ended ("good", "code 1", "out of time"), and the last lines that it said."""
    memory = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if part.share is None else {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": str(part.share)
    }  # fmt: skip
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **memory}
    begin, ended = report.stat().st_size, "good"
    with report.open("ab") as said:
        for command in part.commands:
            try:
                code = subprocess.run(
                    [sys.executable, *command], stdout=said, stderr=subprocess.STDOUT,
                    env=environment, timeout=part.seconds, check=False,
                ).returncode  # fmt: skip
                ended = "good" if code == 0 else f"code {code}"
            except subprocess.TimeoutExpired:
                ended = "out of time"
            if ended != "good":
                break
    with report.open("rb") as said:
        said.seek(begin)
        text = said.read().decode(errors="replace")
    # Bars that draw themselves anew, and reports for machines, are for the file.
    lines = [
        line.rpartition("\r")[2] for line in text.split("\n") if line and not line.startswith("{")
    ]
    return ended, lines[-LAST_LINES:]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the report")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts, in this order")
    parser.add_argument("--limit-seconds", type=float, help="begin no further part after this time")
    parser.add_argument("--list", action="store_true", help="say what would be run")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        known = parts(Path(scratch))
        names = args.only or list(known)
        if unknown := set(names) - set(known):
            parser.error(f"--only: {', '.join(sorted(unknown))}: not of {', '.join(known)}")
        if not args.list:
            args.output.mkdir(parents=True, exist_ok=True)
            wanted = {name: known[name] for name in names}
            return run_all(wanted, args.output / "report.txt", args.limit_seconds)
        for name in names:
            for command in known[name].commands:
                print(f"{name}: python {' '.join(command)}")
        return 0


def run_all(wanted: dict[str, Part], report: Path, limit_seconds: float | None) -> int:
    """Run the parts one after the other; returns how many failed or were left out."""
    report.write_text("")
    began, failed = time.monotonic(), 0
    for name, part in wanted.items():
        started = time.monotonic()
        if limit_seconds is not None and started - began > limit_seconds:
            print(f"== {name}: left out, for want of time", flush=True)
            failed += 1
            continue
        with report.open("a") as said:
            said.write(f"== {name}\n")
        ended, lines = run(part, report)
        failed += ended != "good"
        print(f"== {name}: {ended}, {time.monotonic() - started:.0f} s", *lines, sep="\n")
        sys.stdout.flush()
    return min(failed, 100)


if __name__ == "__main__":
    sys.exit(main())
