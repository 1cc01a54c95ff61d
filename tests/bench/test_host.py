"""The host's yardstick, at sizes that take no time."""

import argparse
import json

import pytest

from jaxinfer.bench import host
from jaxinfer.bench.__main__ import main

SMALL = [
    "host",
    "--sizes",
    "8",
    "24",
    "--steps",
    "40",
    "--max-seq-len",
    "128",
    "--input-len",
    "16",
    "--output-mean",
    "12",
    "--output-stdev",
    "3",
    "--page-size",
    "8",
]


@pytest.mark.parametrize("clock", ["wall", "thread"])
def test_both_loads_at_each_size(capsys, monkeypatch, clock):
    monkeypatch.setattr(host, "WARM_UP_STEPS", 20)
    assert main([*SMALL, "--clock", clock]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    for load in ("host_decode_us", "host_turnover_us"):
        for size in ("8", "24"):
            parts = report[load][size]
            assert set(parts) == {"step", *host.PARTS}
            assert 0 < parts["step"]["p50"] <= parts["step"]["p99"] <= parts["step"]["maximum"]
            total = sum(parts[part]["average"] for part in host.PARTS)
            assert parts["step"]["average"] == pytest.approx(total)
        small, large = (report[load][size]["step"]["p50"] for size in ("8", "24"))
        slope = (large - small) / 16 * 1000
        assert report[load]["slope_per_1000_rows"] == pytest.approx(slope)
    assert report["load"]["steps"] == 40


def test_turnover_keeps_the_rows_full_and_loses_no_page():
    parser = argparse.ArgumentParser()
    host.add_arguments(parser)
    args = parser.parse_args(SMALL[1:])
    load = host._Load(24, args, turnover=True)
    load.measure(300)
    scheduler = load.scheduler
    scheduler.check()
    # A request that ended gives up its slot after the step in flight, and a new one takes it.
    assert 24 - 8 <= scheduler.num_running <= 24
    assert next(load.numbers) > 24 * 10
    assert scheduler.pages.stats()["cached_pages"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-seq-len", "30"], "--max-seq-len 30 is less than"),
        (["--max-seq-len", "60", "--steps", "100"], "raise it, or lower --steps"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--sizes", "0"], "--sizes must be at least 1"),
        (["--output-stdev", "-1"], "--output-stdev must be at least 0"),
    ],
)
def test_senseless_options_are_refused(capsys, words, message):
    assert main([*SMALL, *words]) == 2
    assert message in capsys.readouterr().err
