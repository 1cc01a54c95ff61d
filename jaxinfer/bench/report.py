"""From the times of requests to trtllm-bench's figures, and to a table.  Imports no jax."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import jaxinfer

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Timing:
    """One finished request: tokens in and out, and moments in seconds of one clock.

    cached_tokens: of the prompt, those whose keys and values were there already.
    """

    task_id: int | str
    input_tokens: int
    output_tokens: int
    arrival: float
    first_token: float
    finished: float
    cached_tokens: int = 0

    @property
    def latency(self) -> float:
        return self.finished - self.arrival

    @property
    def ttft(self) -> float:
        """Time to the first token."""
        return self.first_token - self.arrival

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None if there was only one."""
        if self.output_tokens < 2:
            return None
        return (self.finished - self.first_token) / (self.output_tokens - 1)


def percentiles(values: Sequence[float] | np.ndarray) -> dict[str, float] | None:
    """p50, p90, p95, p99 (linear between values), minimum, maximum, average; None without values.

    For rates, where larger is better, p99 is still the value that 99 % do not exceed.
    """
    if len(values) == 0:
        return None
    found = {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}
    found |= {"minimum": float(np.min(values)), "maximum": float(np.max(values))}
    return {**found, "average": float(np.mean(values))}


def request_info(timings: Sequence[Timing]) -> dict[str, Any]:
    """How many requests there were, of which lengths, and how many at once on average.

    The average concurrency is the sum of all latencies over the time that the run took.
    """
    count, inputs = len(timings), sum(t.input_tokens for t in timings)
    return {
        "num_requests": count,
        "avg_num_concurrent_requests": sum(t.latency for t in timings) / _total(timings),
        "avg_input_length": inputs / count,
        "avg_output_length": sum(t.output_tokens for t in timings) / count,
        "prefix_reuse_fraction": sum(t.cached_tokens for t in timings) / inputs,
    }


def performance(timings: Sequence[Timing], num_devices: int) -> dict[str, Any]:
    """Throughput and request latency.  The run lasts from the first arrival to the last finish.

    output_throughput_per_user_tok_s: mean of each request's own output tokens over its latency.
    """
    total = _total(timings)
    outputs = sum(t.output_tokens for t in timings)
    inputs = sum(t.input_tokens for t in timings)
    latencies = [1000 * t.latency for t in timings]
    return {
        "total_latency_ms": 1000 * total,
        "avg_request_latency_ms": float(np.mean(latencies)),
        "request_throughput_req_s": len(timings) / total,
        "system_output_throughput_tok_s": outputs / total,
        "system_total_throughput_tok_s": (inputs + outputs) / total,
        "output_throughput_per_user_tok_s": float(
            np.mean([t.output_tokens / t.latency for t in timings])
        ),
        "output_throughput_per_gpu_tok_s": outputs / total / num_devices,
        "request_latency_percentiles_ms": percentiles(latencies),
    }


def streaming_metrics(timings: Sequence[Timing]) -> dict[str, Any]:
    """What a reader of the streams sees: time to first token, time per further token, speed.

    Requests of a single output token have no time per further token and are left out of it.
    """
    ttft = percentiles([1000 * t.ttft for t in timings])
    tpots = [t.tpot for t in timings if t.tpot is not None]
    tpot = percentiles([1000 * tpot for tpot in tpots])
    speed = percentiles([1 / tpot for tpot in tpots if tpot > 0])
    return {
        "token_output_speed_tok_s": speed and speed["average"],
        "avg_ttft_ms": ttft and ttft["average"],
        "avg_tpot_ms": tpot and tpot["average"],
        "ttft_percentiles_ms": ttft,
        "tpot_percentiles_ms": tpot,
        "gen_tps_percentiles": speed,
    }


def decoding_stats() -> dict[str, Any]:
    """Speculative decoding, of which there is none: one token a decode iteration."""
    return {
        "mode": None,
        "num_draft_tokens": 0,
        "num_accepted_draft_tokens": 0,
        "draft_acceptance_rate": None,
        "acceptance_length_percentiles": None,
    }


def _total(timings: Sequence[Timing]) -> float:
    return max(t.finished for t in timings) - min(t.arrival for t in timings)


def machine() -> dict[str, Any]:
    """What the host is."""
    return {
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "jaxinfer": jaxinfer.__version__,
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# -- for people -------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> str:
    """A report for people: a block for each section; percentiles as rows of one table."""
    lines: list[str] = []
    for section, values in report.items():
        lines += ["", section, "-" * len(section)]
        lines += _section(values) if isinstance(values, dict) else [f"  {_show(values)}"]
    return "\n".join(lines[1:])


def _section(values: dict[str, Any]) -> list[str]:
    plain, wide = {}, {}
    for name, value in _flat(values):
        (wide if _is_distribution(value) else plain)[name] = value
    width = max(map(len, [*plain, *wide]), default=0)
    lines = [f"  {name:<{width}}  {_show(value)}" for name, value in plain.items()]
    for number, (name, found) in enumerate(wide.items()):
        if number == 0:
            lines.append(" " * (width + 2) + "".join(f"{column:>11}" for column in found))
        lines.append(
            f"  {name:<{width}}" + "".join(f"{_show(value):>11}" for value in found.values())
        )
    return lines


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, value in values.items():
        if isinstance(value, dict) and not _is_distribution(value):
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((prefix + name, value))
    return found


def _is_distribution(value: Any) -> bool:
    return isinstance(value, dict) and "p50" in value


def _show(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:,.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return str(value)
