"""`throughput`: how many tokens a second come out under load."""

from __future__ import annotations

import argparse
import math
from typing import Any

from jaxinfer.bench import serve

HELP = "tokens per second, and latencies, of a data set under load"
DESCRIPTION = """\
Runs a data set as fast as the engine takes it, or as it arrives, and reports throughput, latency,
time to first token (TTFT) and per further token (TPOT), padding, MBU and MFU, memory.  Decoding is
greedy, and outputs have the length that the data set says.  All programs are compiled and run
once, and a few requests served, before the measurement."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument(
        "--concurrency", type=int, default=-1, metavar="N",
        help="most requests in flight; 0 or less: no limit (default)",
    )  # fmt: skip
    parser.add_argument(
        "--request-rate", type=float, default=math.inf, metavar="X",
        help="requests a second, arriving at random (Poisson); inf: all at once (default)",
    )  # fmt: skip
    serve.add_arguments(parser, num_requests=0, warmup=2)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, and return the report; raises a `JaxinferError`."""
    return serve.measure(args, concurrency=args.concurrency, request_rate=args.request_rate)
