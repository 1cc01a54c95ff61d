"""`host`: what a step costs on the host, with the real scheduler and a device that does nothing."""

from __future__ import annotations

import argparse
import itertools
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from jaxinfer.bench.report import machine, percentiles
from jaxinfer.errors import ConfigError
from jaxinfer.options import seed
from jaxinfer.pages import Pages
from jaxinfer.request import Request, SamplingParams
from jaxinfer.scheduler import Limits, Plan, Scheduler

if TYPE_CHECKING:
    from jaxinfer.batch import Buckets
    from jaxinfer.sampling import SamplingRows

HELP = "time the host's share of a step, without a device"
DESCRIPTION = """\
Times what the host does for a step: plan, enter the parameters of admitted requests, pack, commit.
Scheduler, page pool, packing and sampling table are the real ones.  The device is not: nothing is
dispatched, and tokens are there at once.  Nothing is detokenised, which for requests that are not
streams and have no stop strings happens once, when they have finished.

Two loads for each number of running requests:
  decode    every request decodes and none ends
  turnover  each request ends after output tokens of its own number (normally distributed, at least
            1), and at once another one waits, whose prompt is computed beside the decoding rows;
            the page pool is so full of reusable pages that each page taken evicts one

Times are wall-clock in microseconds; the garbage collector is on; the first steps are not measured.
"""

PARTS = ("plan", "admit", "pack", "commit")
CLOCKS = {"wall": time.perf_counter_ns, "thread": time.thread_time_ns}
WARM_UP_STEPS = 300
VOCAB_SIZE = 32000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    add = parser.add_argument
    add("--sizes", type=int, nargs="+", default=[256, 1024, 2048], metavar="N",
        help="numbers of running requests (default: 256 1024 2048)")  # fmt: skip
    add("--steps", type=int, default=1000, help="steps that are measured (default: %(default)s)")
    add("--input-len", type=int, default=128, help="mean tokens of a prompt (default: %(default)s)")
    add("--output-mean", type=int, default=256, help="mean output tokens (default: %(default)s)")
    add("--output-stdev", type=int, default=64, help="their deviation (default: %(default)s)")
    add("--max-seq-len", type=int, default=2048, help="page tables are made for this length "
        "(default: %(default)s)")  # fmt: skip
    add("--page-size", type=int, default=32, help="token slots in a page (default: %(default)s)")
    add("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True,
        help="name full pages, so that other requests can use them (default: on)")  # fmt: skip
    add("--clock", choices=CLOCKS, default="wall", help="wall-clock, or the CPU time of "
        "this thread, for a machine that has other work (default: %(default)s)")  # fmt: skip
    add("--seed", type=seed, default=0, help="of prompts and lengths (default: %(default)s)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure both loads at each size; raises `ConfigError` for sizes that make no sense."""
    least = {"steps": 1, "input_len": 1, "output_mean": 1, "output_stdev": 0, "page_size": 1}
    for name, bound in least.items():
        if getattr(args, name) < bound:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {bound}")
    if min(args.sizes) < 1:
        raise ConfigError("--sizes must be at least 1")
    if args.max_seq_len < longest_sequence(args):
        raise ConfigError(
            f"--max-seq-len {args.max_seq_len} is less than the longest prompt and output, "
            f"{longest_sequence(args)}"
        )
    options = ("steps", "input_len", "output_mean", "output_stdev", "max_seq_len", "page_size")
    report: dict[str, Any] = {"machine": machine()}
    report["load"] = {name: getattr(args, name) for name in (*options, "seed")}
    with tqdm(total=2 * len(args.sizes), desc="measuring", unit="load", disable=None) as bar:
        for load in ("decode", "turnover"):
            by_size = {}
            for rows in args.sizes:
                by_size[rows] = _Load(rows, args, turnover=load == "turnover").measure(args.steps)
                bar.update()
            report[f"host_{load}_us"] = {str(rows): found for rows, found in by_size.items()}
            slope = _slope({rows: found["step"]["p50"] for rows, found in by_size.items()})
            report[f"host_{load}_us"]["slope_per_1000_rows"] = slope
    return report


def longest_sequence(args: argparse.Namespace) -> int:
    """Tokens of the longest sequence of the turnover load."""
    return 2 * args.input_len + args.output_mean + 4 * args.output_stdev


def _slope(microseconds: dict[int, float]) -> float | None:
    """Microseconds that each further 1000 rows add, by least squares over the medians."""
    if len(microseconds) < 2:
        return None
    return 1000 * float(np.polyfit(list(microseconds), list(microseconds.values()), 1)[0])


class _Load:
    """A scheduler kept full of requests, and the loop of `LLM._turn` around it."""

    def __init__(self, rows: int, args: argparse.Namespace, *, turnover: bool):
        from jaxinfer.batch import Buckets, pack  # jax, only now
        from jaxinfer.sampling import SamplingRows

        self.pack = pack
        self.rows, self.args, self.turnover = rows, args, turnover
        self.rng = np.random.default_rng(args.seed)
        self.limits = Limits(
            max_batch_size=rows,
            # Room for prompts beside the rows that decode.
            max_num_tokens=rows + max(512, rows),
            max_seq_len=args.max_seq_len,
            page_size=args.page_size,
        )
        longest = longest_sequence(args) if turnover else args.max_seq_len
        num_pages = rows * -(-longest // args.page_size) + 1
        pages = Pages(num_pages, args.page_size)
        self.scheduler = Scheduler(
            self.limits, pages, enable_prefix_caching=args.enable_prefix_caching
        )
        self.buckets: Buckets = Buckets.for_limits(self.limits, "cpu")
        self.sampling: SamplingRows = SamplingRows(rows + 1, lambda array: array)
        self.numbers = itertools.count()
        self.tokens_B = self.rng.integers(VOCAB_SIZE, size=rows, dtype=np.int32)
        self.pending: Plan | None = None
        self.full = False  # every row was admitted

    def _request(self, output_tokens: int) -> Request:
        number, args = next(self.numbers), self.args
        # Of several lengths, or all rows would come to the end of a page in the same step.
        length = int(self.rng.integers(args.input_len // 2, args.input_len * 3 // 2)) + 1
        prompt = self.rng.integers(VOCAB_SIZE, size=length, dtype=np.int32)
        return Request(
            request_id=str(number),
            prompt_token_ids=prompt,
            params=SamplingParams(temperature=0.7, max_tokens=output_tokens, detokenize=False),
            seed=int(self.rng.integers(2**63)),
            limit=min(length + output_tokens, self.limits.max_seq_len),
            stop_ids=(VOCAB_SIZE,),
            select_from=length - 1,
            arrival=number,
        )

    def _add(self, count: int, *, first: bool = False) -> None:
        """Queue requests; the first ones end at any time, as in a load that runs for long."""
        args = self.args
        for _ in range(count):
            tokens = args.max_seq_len
            if self.turnover:
                drawn = round(self.rng.normal(args.output_mean, args.output_stdev))
                tokens = min(max(drawn, 1), args.output_mean + 4 * args.output_stdev)
                tokens = int(self.rng.integers(1, tokens + 1)) if first else tokens
            self.scheduler.add(self._request(tokens))

    def measure(self, steps: int) -> dict[str, Any]:
        self._add(self.rows, first=True)
        while self.scheduler.num_waiting:
            self._turn()
        self.full = True
        for _ in range(WARM_UP_STEPS if self.turnover else 10):
            self._turn()
        times = np.array([self._turn() for _ in range(steps)]) / 1000
        found = {"step": percentiles(times.sum(axis=1))}
        for index, part in enumerate(PARTS):
            found[part] = percentiles(times[:, index])
        return found

    def _turn(self) -> list[int]:
        """One turn with its step in flight; nanoseconds of each of `PARTS`."""
        clock, scheduler = CLOCKS[self.args.clock], self.scheduler
        started = clock()
        plan, done = scheduler.plan(), self.pending
        planned = clock()
        if plan is None or (len(plan.slots_B) < self.rows and not self.turnover and self.full):
            raise ConfigError("requests reached --max-seq-len: raise it, or lower --steps")
        for request in plan.admitted:
            self.sampling.set(request.slot, request)
        admitted = clock()
        self.pack(plan, self.buckets, self.limits, self.sampling)
        packed = clock()
        commit = done and scheduler.commit(done, self.tokens_B[: len(done.selected_B)])
        ended = clock()
        self.pending = plan
        if commit and self.turnover:
            self._add(len(commit.finished))
        return [planned - started, admitted - planned, packed - admitted, ended - packed]
