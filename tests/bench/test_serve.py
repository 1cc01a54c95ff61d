"""throughput and latency, end to end on a tiny model, against what must add up."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxinfer import LLM, SamplingParams
from jaxinfer.bench import drive, roofline
from jaxinfer.bench.__main__ import COMMANDS, DEVELOPER_COMMANDS, main
from jaxinfer.bench.dataset import Item
from jaxinfer.configs import Chip
from jaxinfer.work import Work

ENGINE = {"load_format": "dummy", "max_batch_size": 4, "max_num_tokens": 16, "max_seq_len": 64,
          "page_size": 8, "num_pages": 40}  # fmt: skip
WORDS = [word for name, value in ENGINE.items() for word in (f"--{name}", str(value))]
LENGTHS = [(5, 3), (20, 1), (1, 9), (13, 4), (7, 7), (30, 2)]
NO_COPY = roofline.Peaks(1e9, "a test", 1e12, "a test")


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(5)
    path = tmp_path / "data.jsonl"
    with open(path, "w") as file:
        for index, (inputs, outputs) in enumerate(LENGTHS):
            ids = rng.integers(3, 256, inputs).tolist()
            file.write(json.dumps({"task_id": index, "input_ids": ids, "output_tokens": outputs}))
            file.write("\n")
    return path


@pytest.fixture
def bench(tiny_model, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(roofline, "peaks", lambda *_: NO_COPY)

    def run(command, *words, code=0):
        options = ["--model", str(tiny_model), "--dataset", str(data), *WORDS, *words]
        assert main([command, *options]) == code, capsys.readouterr().err
        captured = capsys.readouterr()
        if code:
            return captured.err
        return json.loads(captured.out.splitlines()[-1]), captured.out

    return run


def test_throughput_end_to_end(bench, tmp_path):
    log, file = tmp_path / "log.jsonl", tmp_path / "report.json"
    report, out = bench("throughput", "--iteration_log", str(log), "--report-json", str(file))
    assert json.loads(file.read_text()) == report
    assert "system_output_throughput_tok_s" in out.splitlines()[-60:][0] or "p99" in out
    assert list(report) == [
        "engine", "machine", "world_info", "request_info", "performance", "streaming_metrics",
        "decoding_stats", "dataset", "steps", "roofline", "memory_bytes",
    ]  # fmt: skip
    assert report["request_info"]["num_requests"] == len(LENGTHS)
    assert report["request_info"]["avg_output_length"] == pytest.approx(26 / 6)
    assert report["steps"]["recompilations"] == 0
    assert report["steps"]["compile_seconds"] > 0
    assert report["world_info"]["max_batch_size"] == 4
    # The last token of a request is never computed, everything else once.
    scheduled = sum(inputs + outputs - 1 for inputs, outputs in LENGTHS)
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(report["steps"]["steps"]))
    assert set(steps[0]) == {"step", "running", "scheduled", "padded", "waiting", "ms"}
    assert sum(step["scheduled"] for step in steps) == scheduled
    assert report["steps"]["scheduled_tokens"] == scheduled
    padded = sum(step["padded"] for step in steps)
    assert report["steps"]["padded_token_fraction"] == pytest.approx(padded / (padded + scheduled))
    assert all(step["scheduled"] <= 16 and step["running"] <= 4 for step in steps)
    assert sum(step["ms"] for step in steps) <= report["performance"]["total_latency_ms"] * 1.01
    speeds = report["performance"]
    assert speeds["system_output_throughput_tok_s"] == pytest.approx(
        26 / speeds["total_latency_ms"] * 1000
    )
    assert set(report["memory_bytes"]) > {"weights", "workspace", "kv_cache"}
    ttft, latency = report["streaming_metrics"]["ttft_percentiles_ms"], speeds[
        "request_latency_percentiles_ms"]  # fmt: skip
    assert 0 < ttft["minimum"] <= ttft["p50"] < latency["p50"]


def test_concurrency_bounds_what_is_in_flight(bench, tmp_path):
    log = tmp_path / "log.jsonl"
    report, _ = bench("throughput", "--concurrency", "2", "--iteration-log", str(log))
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    assert max(step["running"] + step["waiting"] for step in steps) == 2
    assert report["request_info"]["avg_num_concurrent_requests"] <= 2.01


def test_latency_runs_one_at_a_time(bench, tmp_path):
    log = tmp_path / "log.jsonl"
    report, _ = bench(
        "latency", "--num-requests", "3", "--max-batch-size", "1", "--iteration-log", str(log)
    )
    assert report["request_info"]["num_requests"] == 3
    assert {json.loads(line)["running"] for line in log.read_text().splitlines()} == {1}
    # One after another: the latencies add up to the whole, but for the time between them.
    latency, whole = report["performance"]["avg_request_latency_ms"], report["performance"]
    assert 3 * latency == pytest.approx(whole["total_latency_ms"], rel=0.3)
    assert report["streaming_metrics"]["avg_ttft_ms"] < latency


def test_arrivals_spread_the_run(bench):
    report, _ = bench("throughput", "--request-rate", "20", "--seed", "1")
    last = drive.arrivals(len(LENGTHS), 20, np.random.default_rng(1))
    assert report["world_info"]["issue_rate"] == 20
    assert report["performance"]["total_latency_ms"] >= 50
    assert (np.diff(last) > 0).all()
    gaps = np.diff(drive.arrivals(20_000, 50, np.random.default_rng(0)))
    assert gaps.mean() == pytest.approx(0.02, rel=0.03)
    assert gaps.std() == pytest.approx(0.02, rel=0.03)  # as the exponential distribution has it
    assert not drive.arrivals(3, float("inf"), np.random.default_rng(0)).any()


def test_bad_requests_and_options_are_refused_by_name(bench, data):
    with open(data, "a") as file:
        file.write('{"input_ids": [9], "output_tokens": 200}\n{"input_ids": [300]\n')
    assert "line 8" in bench("throughput", code=2)
    report, _ = bench("throughput", "--skip-bad", "--warmup", "0")
    assert report["dataset"]["num_skipped"] == 2
    assert report["request_info"]["num_requests"] == len(LENGTHS)
    assert any("line 7: 1 prompt and 200 output" in line for line in report["dataset"]["skipped"])
    assert "--request-rate above 0" in bench("throughput", "--request-rate", "0", code=2)
    assert "--report-json cannot be" in bench("throughput", "--report-json", "/no/file", code=2)
    assert "EngineConfig.max_seq_len" in bench("throughput", "--max-seq-len", "0", code=2)


def test_what_fails_leaves_the_old_report(bench, tmp_path):
    file = tmp_path / "report.json"
    file.write_text("old")
    bench("throughput", "--dataset", "/no/file", "--report-json", str(file), code=2)
    assert file.read_text() == "old"


def test_an_unknown_preset_is_an_error_with_the_remedy(capsys):
    assert main(["throughput", "--model", "smollm2-134m", "--load-format", "dummy"]) == 2
    error = capsys.readouterr().err
    assert "smollm2-134m" in error
    assert "smollm2-135m" in error


def test_first_tokens_are_timed_without_streams(tiny_model):
    with LLM(tiny_model, skip_tokenizer_init=True, **ENGINE) as llm:
        outputs = llm.generate(
            [[5] * 40, [6]], SamplingParams(max_tokens=20, ignore_eos=True), use_tqdm=False
        )
    for times in (output.metrics for output in outputs):
        assert times.first_token_time is not None
        assert times.finished_time is not None
        # Three steps for the prompts, then nineteen for the other tokens.
        rest, whole = times.finished_time - times.first_token_time, times.finished_time
        assert 0.2 < rest / (whole - times.arrival_time) < 1


def test_work_is_what_the_weights_and_contexts_add_up_to(tiny_model):
    with LLM(tiny_model, skip_tokenizer_init=True, **ENGINE) as llm:
        work = Work(llm.step, llm._weights)
        llm.observer = lambda plan: work.add(plan.starts_B, plan.lens_B, len(plan.selected_B))
        llm.generate([3, 4, 5, 6, 7], SamplingParams(max_tokens=3, ignore_eos=True))
        weights, config = llm._weights, llm.model_config
        layers = sum(leaf.nbytes for leaf in jax.tree.leaves(weights["layers"]))
        pools = jax.tree.leaves(llm._state.cache)
        slot = sum(pool.nbytes for pool in pools) / (40 * 8)
        head = weights["head_VD"]
    # Three steps: the prompt of 5 tokens, then one token twice, over contexts of 5, 6 and 7.
    assert work.bytes == pytest.approx(3 * (layers + head.nbytes) + (5 + 6 + 7 + 5 + 1 + 1) * slot)
    pairs = (1 + 2 + 3 + 4 + 5) + 6 + 7
    attention = 2 * 2 * config.num_layers * config.num_heads * config.head_dim * pairs
    assert work.flops == pytest.approx(2 * 7 * layers / 4 + 2 * 3 * head.size + attention)


def test_utilisation_and_peaks(monkeypatch):
    class Device:
        device_kind = "TPU7x"

    peaks = roofline.peaks(Device(), "bfloat16")
    assert peaks.bytes_per_second == pytest.approx(7.38e12 / 2)  # a chip is two devices
    assert peaks.flops == pytest.approx(2307e12 / 2)
    assert roofline.peaks(Device(), "float32").flops is None
    monkeypatch.setattr(roofline, "READ_BYTES", 2**20)
    cpu = roofline.peaks(jax.devices()[0], "float32")
    assert cpu.bytes_per_second > 0
    assert "measured in this run" in cpu.bytes_source
    assert isinstance(roofline.find_chip("NVIDIA H200"), Chip)


def test_warm_up_uses_other_tokens(tiny_model):
    with LLM(tiny_model, skip_tokenizer_init=True, **ENGINE) as llm:
        items = [Item(1, 0, [9] * 30, 50)]
        drive.warm_up(llm, items, 5, np.random.default_rng(0))
        assert llm.stats()["prompt_tokens"] == 30
        (timing,) = drive.drive(llm, items, arrive=[0.0])
        assert timing.cached_tokens == 0
        assert timing.output_tokens == 34  # max_seq_len ends it


def test_recompilations_are_counted():
    with drive.compilations() as found:
        jax.jit(lambda x: x * 3 + 1)(np.float32(2))
    count = len(found)
    assert count >= 1
    jax.jit(lambda x: x * 5 + 1)(np.float32(2))
    assert len(found) == count, "nothing is counted afterwards"


def test_help_is_readable_and_loads_no_jax():
    script = f"""
import sys
from jaxinfer.bench.__main__ import main
for words in ([], *([name] for name in {[*COMMANDS, *DEVELOPER_COMMANDS]!r}),
              ["prepare-dataset", "real"]):
    try:
        main([*words, "--help"])
    except SystemExit as stop:
        assert stop.code == 0
print(sorted({{"jax", "flax"}} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], text=True, capture_output=True, check=True
    )
    assert done.stdout.endswith("[]\n")
    for words in ("for developers:", "--concurrency", "--input-stdev", "--sizes", "turnover"):
        assert words in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
