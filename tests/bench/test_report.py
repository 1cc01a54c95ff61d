"""The figures against hand arithmetic and the standard library's statistics."""

import json
import statistics

import numpy as np
import pytest

from jaxinfer.bench import report
from jaxinfer.bench.report import Timing

# Times in seconds, chosen so that every figure can be worked out by hand.
TIMINGS = [
    Timing("a", 10, 5, arrival=100.0, first_token=101.0, finished=103.0, cached_tokens=5),
    Timing("b", 30, 1, arrival=101.0, first_token=103.0, finished=103.0),
    Timing("c", 20, 3, arrival=104.0, first_token=104.5, finished=105.0),
]


def test_performance_by_hand():
    found = report.performance(TIMINGS, num_devices=2)
    assert found["total_latency_ms"] == pytest.approx(5000)
    assert found["avg_request_latency_ms"] == pytest.approx(2000)  # 3, 2 and 1 s
    assert found["request_throughput_req_s"] == pytest.approx(0.6)
    assert found["system_output_throughput_tok_s"] == pytest.approx(9 / 5)
    assert found["system_total_throughput_tok_s"] == pytest.approx(69 / 5)
    assert found["output_throughput_per_user_tok_s"] == pytest.approx((5 / 3 + 1 / 2 + 3) / 3)
    assert found["output_throughput_per_gpu_tok_s"] == pytest.approx(9 / 10)
    assert found["request_latency_percentiles_ms"]["p50"] == pytest.approx(2000)
    assert found["request_latency_percentiles_ms"]["maximum"] == pytest.approx(3000)


def test_streaming_metrics_by_hand():
    found = report.streaming_metrics(TIMINGS)
    assert found["avg_ttft_ms"] == pytest.approx((1000 + 2000 + 500) / 3)
    # "b" has one token, so no time per further token: 2 s for 4 tokens, 0.5 s for 2.
    assert found["avg_tpot_ms"] == pytest.approx((500 + 250) / 2)
    assert found["tpot_percentiles_ms"]["minimum"] == pytest.approx(250)
    assert found["token_output_speed_tok_s"] == pytest.approx((2 + 4) / 2)


def test_request_info_by_hand():
    found = report.request_info(TIMINGS)
    assert found == pytest.approx({
        "num_requests": 3, "avg_num_concurrent_requests": 6 / 5, "avg_input_length": 20,
        "avg_output_length": 3, "prefix_reuse_fraction": 5 / 60,
    })  # fmt: skip


def test_percentiles_as_the_standard_library_has_them():
    values = np.random.default_rng(0).exponential(size=201).tolist()
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    assert report.percentiles(values) == pytest.approx({
        "p50": cuts[49], "p90": cuts[89], "p95": cuts[94], "p99": cuts[98],
        "minimum": min(values), "maximum": max(values), "average": statistics.mean(values),
    })  # fmt: skip
    assert report.percentiles([]) is None


def test_one_token_outputs_have_no_speed():
    found = report.streaming_metrics(TIMINGS[1:2])
    assert found["avg_tpot_ms"] is None
    assert found["gen_tps_percentiles"] is None
    assert found["avg_ttft_ms"] == pytest.approx(2000)


def test_the_table_shows_every_name_and_number():
    figures = {
        "engine": {"model": "demo", "quantization": None, "inner": {"x": 12345}},
        "performance": report.performance(TIMINGS, 1),
        "dataset": {"skipped": ["line 3: bad", "line 9: worse"]},
    }
    text = report.table(figures)
    for name in ("engine", "model", "inner.x", *figures["performance"], "p99", "average"):
        assert name in text
    assert "12,345" in text
    assert "line 3: bad, line 9: worse" in text
    row = next(line for line in text.splitlines() if "request_latency_percentiles_ms" in line)
    assert row.split()[1:] == ["2,000", "2,800", "2,900", "2,980", "1,000", "3,000", "2,000"]
    json.dumps(figures, allow_nan=False)
