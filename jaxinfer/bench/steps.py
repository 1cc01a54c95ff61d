"""`steps`: how long steps of given shapes take on the device, and what the host adds to them."""

from __future__ import annotations

import argparse
import math
import re
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from jaxinfer.bench.serve import ALIASES, WITHOUT_OPTION
from jaxinfer.config import EngineConfig
from jaxinfer.errors import ConfigError
from jaxinfer.options import add_fields, given, seed
from jaxinfer.request import SamplingParams

if TYPE_CHECKING:
    from jaxinfer.batch import Batch
    from jaxinfer.bench.roofline import Peaks
    from jaxinfer.llm import LLM
    from jaxinfer.scheduler import Plan

HELP = "time steps of given shapes on the device, and what the host adds to them"
DESCRIPTION = """\
Times whole steps of an engine, between the end of one and the end of the next, in rounds:

  decode   so many rows, each of a context of so many tokens, that decode; in turn with the same
           step again and again without the host (nothing planned, packed or read back).  What the
           former takes longer is the host's time that does not hide behind the device
  prefill  a prompt of so many tokens, alone, to its first token

Rows decode while the later ones' prompts are computed, so that contexts are a little longer than
asked for: their mean is reported.  Decoding is greedy, prompts are random tokens.  All programs are
compiled and run once before."""
ROUNDS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    add = parser.add_argument
    add("--model", required=True, help='a folder, "demo", a preset\'s name or a hub id')
    add("--decode", nargs="*", default=["1x128", "8x128"], metavar="ROWSxCONTEXT",
        help="steps that decode (default: 1x128 8x128)")  # fmt: skip
    add("--prefill", nargs="*", type=int, default=[128], metavar="N",
        help="tokens of prompts (default: 128)")  # fmt: skip
    add("--steps", type=int, default=20, metavar="N",
        help=f"steps in each of the {ROUNDS} rounds (default: %(default)s)")  # fmt: skip
    add("--seed", type=seed, default=0, help="of dummy weights and tokens (default: %(default)s)")
    without = (*WITHOUT_OPTION, "EngineConfig.enable_prefix_caching")  # no prompt finds another's
    add_fields(parser.add_argument_group("engine"), EngineConfig, without=without, aliases=ALIASES)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, and return the report; raises a `JaxinferError`."""
    shapes = [_shape(text) for text in args.decode]
    if not shapes and not args.prefill:
        raise ConfigError("there is nothing to time: name shapes for --decode or --prefill")
    if args.steps < 1 or min(args.prefill, default=1) < 1:
        raise ConfigError("--steps and --prefill must be at least 1")
    engine = {**given(vars(args), EngineConfig), "seed": args.seed}
    EngineConfig.from_dict(engine)
    from jaxinfer.bench import drive, roofline, serve  # jax, only now
    from jaxinfer.llm import LLM

    engine |= {"enable_prefix_caching": False, "skip_tokenizer_init": True}
    with LLM(args.model, **engine) as llm:
        for rows, context in shapes:
            _check_fits(llm, rows, context + _outputs(llm, rows, context, args.steps))
        for tokens in args.prefill:
            _check_fits(llm, 1, tokens + 1)
        llm.warm_up()
        device = llm.step.mesh.devices.flat[0]
        limits = roofline.peaks(device, str(llm.step.dtype))
        measure = _Measure(llm, args.steps, limits, np.random.default_rng(args.seed))
        jobs = [(measure.decode, shape) for shape in shapes]
        jobs += [(measure.prefill, (tokens,)) for tokens in args.prefill]
        found: dict[str, list[dict[str, Any]]] = {"decode": [], "prefill": []}
        with drive.compilations() as compiled:
            for job, shape in tqdm(jobs, desc="timing", unit="shape", disable=None):
                found[job.__name__].append(job(*shape))
        return {
            "engine": serve.engine_section(llm, args.model),
            "machine": serve.machine_section(device),
            "world_info": serve.world_section(llm, request_rate=math.inf, concurrency=0),
            "limits": {
                "peak_bytes_per_s": limits.bytes_per_second,
                "peak_bytes_source": limits.bytes_source,
                "peak_flops_per_s": limits.flops,
                "peak_flops_source": limits.flops_source,
            },
            "compile_seconds": llm.stats()["compile_seconds"],
            "recompilations": len(compiled),
            **found,
        }


def _shape(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise ConfigError(f"--decode {text!r} is no ROWSxCONTEXT, such as 8x128")
    return int(found[1]), int(found[2])


def _outputs(llm: LLM, rows: int, context: int, steps: int) -> int:
    """Tokens that the first row decodes until the last step was timed."""
    budget, left, prompts = llm.limits.max_num_tokens, rows * context, 0
    while left > 0:  # rows whose prompts are done take their token of the budget first
        left -= max(budget - (rows - -(-left // context)), 1)
        prompts += 1
    return prompts + ROUNDS * (steps + 1) + 2


def _check_fits(llm: LLM, rows: int, length: int) -> None:
    """Raise `ConfigError` unless rows of so many tokens can run together."""
    limits, pages = llm.limits, llm.scheduler.pages.capacity
    needed = rows * -(-length // limits.page_size)
    for name, need, there in (
        ("max_batch_size", rows, limits.max_batch_size),
        ("max_seq_len", length, limits.max_seq_len),
        (f"pages of {limits.page_size} tokens", needed, pages),
    ):
        if need > there:
            raise ConfigError(
                f"{rows} rows of up to {length} tokens need {name}: {need}, and there are {there}"
            )


class _Measure:
    """Times steps of one engine."""

    def __init__(self, llm: LLM, steps: int, limits: Peaks, rng: np.random.Generator):
        self.llm, self.steps, self.limits, self.rng = llm, steps, limits, rng

    def _submit(self, tokens: int, outputs: int) -> str:
        ids = self.rng.integers(self.llm.model_config.vocab_size, size=tokens).tolist()
        params = SamplingParams(
            temperature=0, max_tokens=outputs, ignore_eos=True, detokenize=False
        )
        return self.llm.submit(ids, params)

    def decode(self, rows: int, context: int) -> dict[str, Any]:
        """Steps in which `rows` rows decode, in turn with the same step without the host."""
        llm, turns, alone, measured = self.llm, [], [], []
        with _watched(llm) as watch:
            outputs = _outputs(llm, rows, context, self.steps)
            ids = [self._submit(context, outputs) for _ in range(rows)]
            while llm.has_work and not (watch.plans and _all_decode(watch.plans[-1], rows)):
                llm.turn()
            for _ in range(ROUNDS):
                llm.turn()
                turns.append(self._turns())
                measured += watch.plans[-self.steps :]
                alone.append(self._alone(watch.batch))
            for request_id in ids:
                llm.cancel(request_id)
            while llm.has_work:
                llm.turn()
        if not all(_all_decode(plan, rows) for plan in measured):
            raise ConfigError(
                f"not all of {rows} rows decoded in each step: some were preempted; more pages, or "
                "scheduling_policy=guaranteed_no_evict, keep them"
            )
        seconds, device = statistics.median(turns), statistics.median(alone)
        return {
            "rows": rows, "context": float(np.mean([plan.starts_B + 1 for plan in measured])),
            "ms": 1e3 * seconds, "ms_without_host": 1e3 * device,
            "exposed_host_us": 1e6 * (seconds - device), "tok_s": rows / seconds,
            **self._utilisation(measured, self.steps * sum(turns)),
        }  # fmt: skip

    def prefill(self, tokens: int) -> dict[str, Any]:
        """A prompt alone, until its first token is there."""
        times, llm = [], self.llm
        with _watched(llm) as watch:
            for _ in range(ROUNDS):
                self._submit(tokens, 1)
                started = time.perf_counter()
                while llm.has_work:
                    llm.turn()
                times.append(time.perf_counter() - started)
        seconds = statistics.median(times)
        return {
            "tokens": tokens, "ms": 1e3 * seconds, "tok_s": tokens / seconds,
            **self._utilisation(watch.plans, sum(times)),
        }  # fmt: skip

    def _turns(self) -> float:
        """Seconds that a turn of the engine takes."""
        started = time.perf_counter()
        for _ in range(self.steps):
            self.llm.turn()
        return (time.perf_counter() - started) / self.steps

    def _alone(self, batch: Any) -> float:
        """Seconds that a step takes if nothing but its programs is run, two in flight at most.

        To run a greedy step again changes nothing: it writes what it wrote.
        """
        import jax

        llm, before = self.llm, None
        jax.block_until_ready(llm._state)
        started = time.perf_counter()
        for _ in range(self.steps):
            llm._state, sampled = llm.step(llm._weights, llm._state, batch)
            jax.block_until_ready(before)
            before = sampled
        jax.block_until_ready(llm._state)
        return (time.perf_counter() - started) / self.steps

    def _utilisation(self, plans: list[Plan], seconds: float) -> dict[str, float | None]:
        from jaxinfer.bench import roofline
        from jaxinfer.work import Work

        work = Work(self.llm.step, self.llm._weights)
        for plan in plans:
            work.add(plan.starts_B, plan.lens_B, len(plan.selected_B))
        found = roofline.utilisation(work, seconds, self.limits)
        return {"mbu": found["mbu"], "mfu": found["mfu"]}


def _all_decode(plan: Plan, rows: int) -> bool:
    """Whether a step had so many rows, each of one token, and a token of each was wanted."""
    return plan.num_single == len(plan.lens_B) == len(plan.selected_B) == rows


class _Watch:
    """Stands for an engine's step: notes the plans whose results came in, and the latest inputs."""

    def __init__(self, step: Any):
        self.step, self.batch = step, None
        self.plans: list[Plan] = []

    def __call__(self, weights: Any, state: Any, batch: Batch) -> Any:
        self.batch = batch
        return self.step(weights, state, batch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.step, name)


@contextmanager
def _watched(llm: Any) -> Iterator[_Watch]:
    watch = llm.step = _Watch(llm.step)
    llm.observer = watch.plans.append
    try:
        yield watch
    finally:
        llm.step, llm.observer = watch.step, None


def table(found: dict[str, Any]) -> str:
    """The report for people: a line for each shape."""
    from jaxinfer.bench.report import table as plain_table

    rest = {name: values for name, values in found.items() if name not in ("decode", "prefill")}
    lines = [plain_table(rest)]
    for name in ("decode", "prefill"):
        if not found[name]:
            continue
        lines += ["", name, "-" * len(name)]
        lines.append("".join(f"{head:>17}" for head in found[name][0]))
        for row in found[name]:
            lines.append("".join(f"{_show(value):>17}" for value in row.values()))
    return "\n".join(lines)


def _show(value: float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"
