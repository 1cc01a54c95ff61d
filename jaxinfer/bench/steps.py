"""`steps`: how long steps of given shapes take on the device, and what the host adds to them."""

from __future__ import annotations

import argparse
import re
import statistics
import time
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

Decoding is greedy, prompts are random tokens.  All programs are compiled and run once before."""
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
    """Tokens that a row must be able to decode: while the later rows' prompts are computed, too."""
    prompts = -(-rows * context // llm.limits.max_num_tokens)
    return prompts + ROUNDS * (steps + 1) + 2


def _check_fits(llm: LLM, rows: int, length: int) -> None:
    """Raise `ConfigError` unless rows of so many tokens can run together."""
    limits, pages = llm.limits, llm.scheduler.pages.capacity
    needed = rows * -(-length // limits.page_size)
    if rows > limits.max_batch_size or length > limits.max_seq_len or needed > pages:
        raise ConfigError(
            f"{rows} rows of {length} tokens need max_batch_size {rows}, max_seq_len {length} and "
            f"{needed} pages of {limits.page_size}; there are {limits.max_batch_size}, "
            f"{limits.max_seq_len} and {pages}"
        )


class _Measure:
    """Times steps of one engine."""

    def __init__(self, llm: LLM, steps: int, limits: Peaks, rng: np.random.Generator):
        self.llm, self.steps, self.limits, self.rng = llm, steps, limits, rng

    def _submit(self, tokens: int, outputs: int) -> None:
        ids = self.rng.integers(self.llm.model_config.vocab_size, size=tokens).tolist()
        params = SamplingParams(
            temperature=0, max_tokens=outputs, ignore_eos=True, detokenize=False
        )
        self.llm.submit(ids, params)

    def decode(self, rows: int, context: int) -> dict[str, Any]:
        """Steps in which `rows` rows decode, in turn with the same step without the host."""
        llm, plans = self.llm, _Plans(self.llm)
        for _ in range(rows):
            self._submit(context, _outputs(llm, rows, context, self.steps))
        while not plans.all or plans.all[-1].num_single < rows:
            llm.turn()
        turns, alone, measured = [], [], []
        for _ in range(ROUNDS):
            llm.turn()
            turns.append(self._timed(llm.turn))
            measured += plans.all[-self.steps :]
            alone.append(self._alone(plans.batch))
        plans.stop()
        for request_id in list(llm._live):
            llm.cancel(request_id)
        while llm.has_work:
            llm.turn()
        seconds, device = statistics.median(turns), statistics.median(alone)
        return {
            "rows": rows, "context": context,
            "ms": 1e3 * seconds, "ms_without_host": 1e3 * device,
            "exposed_host_us": 1e6 * (seconds - device), "tok_s": rows / seconds,
            **self._utilisation(measured, self.steps * sum(turns)),
        }  # fmt: skip

    def prefill(self, tokens: int) -> dict[str, Any]:
        """A prompt alone, until its first token is there."""
        times, plans = [], _Plans(self.llm)
        for _ in range(ROUNDS):
            self._submit(tokens, 1)
            started = time.perf_counter()
            while self.llm.has_work:
                self.llm.turn()
            times.append(time.perf_counter() - started)
        plans.stop()
        seconds = statistics.median(times)
        return {
            "tokens": tokens, "ms": 1e3 * seconds, "tok_s": tokens / seconds,
            **self._utilisation(plans.all, sum(times)),
        }  # fmt: skip

    def _timed(self, call: Any) -> float:
        """Seconds that each of `steps` calls takes."""
        started = time.perf_counter()
        for _ in range(self.steps):
            call()
        return (time.perf_counter() - started) / self.steps

    def _alone(self, batch: Batch) -> float:
        """Seconds that a step takes if nothing but its programs is run.

        To run a greedy step again changes nothing: it writes what it wrote.
        """
        import jax

        llm = self.llm
        jax.block_until_ready(llm._state)
        started = time.perf_counter()
        for _ in range(self.steps):
            llm._state, _ = llm.step(llm._weights, llm._state, batch)
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


class _Plans:
    """Watches an engine: the plans whose results came in, and the inputs of the latest step."""

    batch: Batch

    def __init__(self, llm: LLM):
        self._llm, self._step = llm, llm.step
        self.all: list[Plan] = []
        llm.observer = self.all.append
        llm.step = self  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step, name)

    def __call__(self, weights: Any, state: Any, batch: Batch) -> Any:
        self.batch = batch
        return self._step(weights, state, batch)

    def stop(self) -> None:
        self._llm.step, self._llm.observer = self._step, None


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
