"""Feed requests to an engine as they arrive, and note what happened when."""

from __future__ import annotations

import contextlib
import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
from tqdm import tqdm

from jaxinfer.bench.dataset import Item
from jaxinfer.bench.report import Timing
from jaxinfer.request import SamplingParams
from jaxinfer.scheduler import Plan

if TYPE_CHECKING:
    from jaxinfer.llm import LLM

COMPILED = "/jax/core/compile/backend_compile_duration"


def arrivals(count: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Seconds after the start at which requests arrive: a Poisson process, or all at once."""
    if np.isinf(rate):
        return np.zeros(count)
    return np.cumsum(rng.exponential(1 / rate, count))


class StepLog:
    """Observes the steps of an engine: totals, what they had to compute, a line for each.

    Times are from the end of one step to the end of the next: a step's planning overlaps the one
    before it.  file: gets a JSON line a step.  work: adds up what steps had to move and compute.
    """

    def __init__(self, llm: LLM, file: TextIO | None = None, work: Any = None):
        self._llm, self._file, self._work = llm, file, work
        self._last = time.monotonic()
        self.steps = self.scheduled_tokens = self.padded_tokens = 0
        self.seconds = 0.0

    def mark(self) -> None:
        """The engine was idle up to now."""
        self._last = time.monotonic()

    def __call__(self, plan: Plan) -> None:
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        padding = self._llm.step.buckets.num_tokens(plan.num_tokens) - plan.num_tokens
        if self._work is not None:
            self._work.add(plan.starts_B, plan.lens_B, len(plan.selected_B))
        if self._file is not None:
            scheduler = self._llm.scheduler
            record = {
                "step": self.steps,
                "running": len(plan.slots_B),
                "scheduled": plan.num_tokens,
                "padded": padding,
                "waiting": scheduler.num_waiting,
                "ms": round(1000 * seconds, 4),
            }
            self._file.write(json.dumps(record) + "\n")
        self.steps += 1
        self.scheduled_tokens += plan.num_tokens
        self.padded_tokens += padding
        self.seconds += seconds

    def summary(self) -> dict[str, Any]:
        total = self.scheduled_tokens + self.padded_tokens
        return {
            "steps": self.steps,
            "avg_step_ms": 1000 * self.seconds / self.steps if self.steps else None,
            "scheduled_tokens": self.scheduled_tokens,
            "padded_tokens": self.padded_tokens,
            "padded_token_fraction": self.padded_tokens / total if total else None,
        }


def drive(
    llm: LLM,
    items: Sequence[Item],
    *,
    arrive: Sequence[float] | np.ndarray,
    concurrency: int = 0,
    eos_id: int = -1,
    streaming: bool = False,
    detokenize: bool = False,
    log: StepLog | None = None,
    progress: str | None = None,
) -> list[Timing]:
    """Run all requests to their end; returns their times in the order of `items`.

    arrive: seconds after the start at which each request arrives, rising.
    concurrency: most requests in flight; 0: any number.  One that must wait for another to finish
        counts as arrived when it may go.
    eos_id: the token that ends an output early; -1: none, every output has its full length.
    progress: what the progress bar calls this; None: no bar.
    """
    most = concurrency if concurrency > 0 else len(items)
    waiting = deque(enumerate(items))
    running: dict[str, tuple[int, Item, float]] = {}
    timings: dict[int, Timing] = {}
    stop = [eos_id] if eos_id >= 0 else []
    llm.observer = log
    start = freed = time.monotonic()
    if log is not None:
        log.mark()
    with tqdm(
        total=len(items), desc=progress, unit="request", disable=None if progress else True
    ) as bar:
        while waiting or running:
            while waiting and len(running) < most:
                due = max(start + float(arrive[waiting[0][0]]), freed)
                if due > time.monotonic():
                    break
                index, item = waiting.popleft()
                params = SamplingParams(
                    temperature=0, max_tokens=item.output_tokens, ignore_eos=True,
                    stop_token_ids=stop, detokenize=detokenize,
                )  # fmt: skip
                request_id = llm.submit(list(item.input_ids), params, streaming=streaming)
                running[request_id] = index, item, due
            if not llm.has_work:  # nobody is here
                time.sleep(max(start + float(arrive[waiting[0][0]]) - time.monotonic(), 0))
                if log is not None:
                    log.mark()
                continue
            full = len(running) == most
            for output in llm.turn():
                index, item, due = running.pop(output.request_id)
                times = output.metrics
                assert times.first_token_time is not None
                assert times.finished_time is not None
                timings[index] = Timing(
                    item.task_id, len(item.input_ids), len(output.outputs[0].token_ids), due,
                    times.first_token_time, times.finished_time, output.num_cached_tokens,
                )  # fmt: skip
                freed = times.finished_time if full else freed
                bar.update()
    llm.observer = None
    while llm.has_work:  # a step may be in flight whose tokens nobody wants any more
        llm.turn()
    return [timings[index] for index in range(len(items))]


def warm_up(llm: LLM, items: Sequence[Item], count: int, rng: np.random.Generator) -> None:
    """Run all programs, then `count` requests of the lengths to come, with other tokens, so that no
    prefix is reused later."""
    llm.warm_up()
    size = llm.model_config.vocab_size
    chosen = [
        Item(0, index, rng.integers(size, size=len(item.input_ids)).tolist(),
             min(item.output_tokens, 32))
        for index, item in enumerate(items[:count])
    ]  # fmt: skip
    if chosen:
        drive(llm, chosen, arrive=np.zeros(len(chosen)), progress="warming up")


@contextlib.contextmanager
def compilations() -> Iterator[list[float]]:
    """Collects the seconds of every compilation meanwhile, loads from the persistent cache too."""
    import jax.monitoring

    found: list[float] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILED:
            found.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
