"""Two sides in turn: loads, clocks, whether outputs agree, and the ratios.  Imports no jax."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from jaxinfer.bench import drive
from jaxinfer.bench.side import Generator, Side
from jaxinfer.errors import ComparisonError

# Two tokens are as good as equal if their logits differ by less than this share of the largest
# one: float32 has seven digits, and deep sums of some thousand terms, in any order, keep five.
NEAR_TIE = 1e-4
QUARTILES = {"minimum": 0, "p25": 25, "p50": 50, "p75": 75, "maximum": 100}


@dataclass(frozen=True)
class Load:
    """Requests that begin together: the lengths of their prompts and outputs, in tokens.

    split: also measured with outputs of one token, which tells prefill from decode.
    """

    name: str
    inputs: Sequence[int]
    outputs: Sequence[int]
    split: bool = True

    @property
    def longest(self) -> int:
        return max(sum(pair) for pair in zip(self.inputs, self.outputs, strict=True))


@dataclass
class Agreement:
    """How often both sides' outputs for a prompt were the same.

    rows_near_tie: they part where the other side's logits of both tokens are as good as the best
        (see `NEAR_TIE`); what follows cannot be compared.
    rows_different: they part elsewhere.
    largest_gap: of these logits to the best, as a share of the largest logit, over all rows that
        part.
    """

    rows_compared: int = 0
    rows_equal: int = 0
    rows_near_tie: int = 0
    rows_different: int = 0
    largest_gap: float = 0.0

    def add(self, prompt: list[int], ours: list[int], theirs: list[int], other: Side) -> None:
        """Compare two outputs; the other side says how close a call it was where they part."""
        self.rows_compared += 1
        first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
        if first is None:
            self.rows_equal += 1
            return
        scores_V = other.next_scores(prompt + theirs[:first])
        worse = min(scores_V[ours[first]], scores_V[theirs[first]])
        gap = float((scores_V.max() - worse) / np.abs(scores_V).max())
        self.largest_gap = max(self.largest_gap, gap)
        if gap < NEAR_TIE:
            self.rows_near_tie += 1
        else:
            self.rows_different += 1


@dataclass
class Clocked:
    """What the counted rounds of a load took, in seconds, on each side: ours, theirs.

    first: with outputs of one token (none for a load that is not split).  whole: with all tokens.
    recompilations: while a clock ran.
    """

    load: Load
    first: list[tuple[float, float]] = field(default_factory=list)
    whole: list[tuple[float, float]] = field(default_factory=list)
    agreement: Agreement = field(default_factory=Agreement)
    recompilations: int = 0

    def rates(self, side: int) -> dict[str, np.ndarray]:
        """Tokens a second of each round, of side 0 (ours) or 1 (theirs): see docs/benchmarks.md."""
        inputs, outputs = sum(self.load.inputs), sum(self.load.outputs)
        whole = np.array(self.whole)[:, side]
        found = {"output": outputs / whole}
        if self.load.split:
            first = np.array(self.first)[:, side]
            found["prefill"] = inputs / first
            # On models so small that the clock's noise is all, the difference may not be positive.
            decode = np.maximum(whole - first, 1e-9)
            found["decode"] = (outputs - len(self.load.outputs)) / decode
        return found


def measure(
    engine: Generator,
    other: Side,
    load: Load,
    *,
    rounds: int,
    vocab_size: int,
    rng: np.random.Generator,
    strict: bool,
    tick: Callable[[], object],
) -> Clocked:
    """Run a load on both sides in turn, `rounds` times after one that is not counted.

    strict: outputs that differ by more than a near-tie raise `ComparisonError`, in the uncounted
        round before anything is timed.  tick: called after each round.
    """
    clocked = Clocked(load)
    parts = [(clocked.whole, list(load.outputs))]
    if load.split:
        parts.insert(0, (clocked.first, [1] * len(load.outputs)))
    for number in range(rounds + 1):
        for times, lengths in parts:
            # New prompts each time: nothing of them is in a prefix cache.
            prompts = [rng.integers(vocab_size, size=n).tolist() for n in load.inputs]
            ours, our_seconds, our_compiled = _clock(engine, prompts, lengths)
            theirs, their_seconds, their_compiled = _clock(other, prompts, lengths)
            if number:
                times.append((our_seconds, their_seconds))
                clocked.recompilations += our_compiled + their_compiled
            for row in zip(prompts, ours, theirs, strict=True):
                clocked.agreement.add(*row, other)
            if strict and clocked.agreement.rows_different:
                raise ComparisonError(
                    f"{other.name} generates other tokens than jaxinfer for {load.name}, and not "
                    f"in a near-tie: {asdict(clocked.agreement)}; the two do not run the same model"
                )
        tick()
    return clocked


def _clock(
    side: Generator, prompts: Sequence[list[int]], lengths: Sequence[int]
) -> tuple[list[list[int]], float, int]:
    """Outputs, seconds, and how many programs were compiled meanwhile."""
    with drive.compilations() as compiled:
        started = time.perf_counter()
        outputs = side.generate(prompts, lengths)
        seconds = time.perf_counter() - started
    if [len(output) for output in outputs] != list(lengths):
        raise ComparisonError(f"{side.name} did not generate as many tokens as it was asked for")
    return outputs, seconds, len(compiled)


def report(found: Sequence[Clocked], other: str) -> dict[str, Any]:
    """Sections of ratios, speeds, agreement and raw times, each by load."""
    ratios: dict[str, Any] = {}
    speeds: tuple[dict[str, Any], ...] = {}, {}
    for clocked in found:
        rates = [clocked.rates(side) for side in (0, 1)]
        for figure, ours in rates[0].items():
            ratio = ours / rates[1][figure]
            ratios.setdefault(figure, {})[clocked.load.name] = spread(ratio)
            for side, section in enumerate(speeds):
                section.setdefault(figure, {})[clocked.load.name] = spread(rates[side][figure])
    return {
        "ratio": ratios,
        "jaxinfer_tok_s": speeds[0],
        f"{other}_tok_s": speeds[1],
        "agreement": {c.load.name: asdict(c.agreement) for c in found},
        "recompilations": sum(c.recompilations for c in found),
        "seconds": {
            f"{name}.{part}": {
                c.load.name: [round(times[side], 6) for times in getattr(c, part)] for c in found
            }
            for side, name in enumerate(("jaxinfer", other))
            for part in ("first", "whole")
        },
    }


def spread(values: np.ndarray) -> dict[str, float]:
    """Smallest, quartiles (linear between values) and largest."""
    return {name: float(np.percentile(values, at)) for name, at in QUARTILES.items()}
