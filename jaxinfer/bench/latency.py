"""`latency`: how long one request takes when it is alone."""

from __future__ import annotations

import argparse
import math
from typing import Any

from jaxinfer.bench import serve

HELP = "time to first token, per further token and per request, one request at a time"
DESCRIPTION = """\
Runs a data set one request after another (concurrency 1) and reports time to first token (TTFT),
time per further token (TPOT) and per request.  Unless told otherwise max_batch_size is 1.  Decoding
is greedy, and outputs have the length that the data set says.  All programs are compiled and run
once, and a few requests served, before the measurement."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    serve.add_arguments(parser, num_requests=32, warmup=2)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, and return the report; raises a `JaxinferError`."""
    if "EngineConfig.max_batch_size" not in vars(args):
        vars(args)["EngineConfig.max_batch_size"] = 1
    return serve.measure(args, concurrency=1, request_rate=math.inf)
