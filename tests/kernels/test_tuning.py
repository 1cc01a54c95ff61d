"""The sweep with a timer that does not time, and the command where there is no device for it."""

from dataclasses import dataclass

import pytest
import yaml

from jaxinfer.configs import load_chip
from jaxinfer.errors import ConfigError, DeviceError
from jaxinfer.kernels import blocks, cases, tuning, workloads
from jaxinfer.kernels.blocks import Tuned
from jaxinfer.kernels.candidates import Sweep


@dataclass(frozen=True)
class Fake:
    size: int


VERSIONS = {"jax": "1.0", "jaxlib": "1.0", "driver": "5", "plugin": None}
EMPTY = Tuned(chip="h100", device_kind="some H100", entries=[])
DECODE, PREFILL = "llama-3.1-8b, decode 64 x 1k", "llama-3.1-8b, prefill 2048"


def job(*names, part="single", sizes=(4, 2, 8)):
    key = {"part": part, "K": 8}
    return Sweep(
        "paged_attention", names or (DECODE,), "paged_attention", key, part, tuple(map(Fake, sizes))
    )


JOBS = [job(), job(PREFILL, part="tiles")]


class Timer:
    """By a table of sizes, or of names and sizes; what is no number is raised."""

    def __init__(self, seconds):
        self.seconds, self.calls = seconds, []

    def __call__(self, job, name, fake):
        self.calls.append((job.argument, fake.size))
        found = self.seconds.get(name, self.seconds)[fake.size]
        if isinstance(found, BaseException):
            raise found
        return found


def tune(path, timer, jobs=JOBS, **options):
    return tuning.tune(jobs, path, EMPTY, timer, versions=VERSIONS, **options)


def test_the_fastest_blocks_are_kept_with_their_figures(tmp_path):
    path = tmp_path / "h100.yaml"
    timer = Timer({4: 200e-6, 2: 400e-6, 8: 100e-6})
    tuned, left = tune(path, timer)
    assert left == []
    assert blocks.read(path) == tuned
    one, other = tuned.entries
    assert (one.blocks, one.microseconds) == ({"size": 8}, 100.0)
    assert (one.heuristic, one.heuristic_microseconds, one.tried) == ({"size": 4}, 200.0, 3)
    assert one.versions == VERSIONS
    # 64 rows of 1,024 slots, keys and values of 8 heads of 128 numbers of 2 bytes, and 64 queries
    # and results of 32 heads, in 100 us.
    num_bytes = 64 * 1024 * 2 * 8 * 128 * 2 + 2 * 64 * 32 * 128 * 2
    assert one.gb_per_s == pytest.approx(num_bytes / 100e-6 / 1e9, abs=0.1)
    # 2,048 queries that see 1, 2, … positions: two products of 32 heads of 128 numbers each.
    flops = 2048 * 2049 // 2 * 32 * 128 * 4
    assert other.tflop_per_s == pytest.approx(flops / 100e-6 / 1e12, abs=0.01)
    assert path.read_text().startswith("# Written by `python -m jaxinfer.kernels.tuning`")


def test_blocks_serve_all_cases_of_a_key(tmp_path):
    """By the geometric mean of their times; what fails on one case is for none."""
    path = tmp_path / "h100.yaml"
    long = "llama-3.1-8b, decode 4 x 32k"
    both = job(DECODE, long, sizes=(4, 2, 8, 1))
    slow = MemoryError("too long")
    timer = Timer(
        {DECODE: {4: 4e-3, 2: 3e-3, 8: 1e-3, 1: 1e-4}, long: {4: 4e-3, 2: 3e-3, 8: 25e-3, 1: slow}}
    )
    tuned, _ = tune(path, timer, [both])
    (entry,) = tuned.entries
    assert entry.cases == [f"paged_attention: {name}" for name in (DECODE, long)]
    assert (entry.blocks, entry.microseconds, entry.tried) == ({"size": 2}, 3e3, 3)
    assert entry.heuristic_microseconds == 4e3
    assert entry.refused == ["size=1: MemoryError: too long"]
    timer.calls.clear()
    tune(path, timer, [both])
    assert timer.calls == []
    tune(path, timer, [job(sizes=(4, 2))])
    assert len(timer.calls) == 2, "what was timed on other cases is timed anew"


def test_cases_of_a_key_are_tuned_together(capsys):
    asked = "--list", "--device", "tpu-v6e", "--case", "llama-3.1-8b, decode 1 x 1k"
    asked += "--op", "paged_attention", "paged_attention"  # named twice, timed once
    assert tuning.main(asked) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if not line.startswith(" ")] == [
        f"paged_attention: llama-3.1-8b, decode {rows}" for rows in ("64 x 1k", "1 x 1k", "4 x 32k")
    ]


def test_what_fails_is_reported_and_the_rest_goes_on(tmp_path):
    path = tmp_path / "h100.yaml"
    timer = Timer({4: 2e-3, 2: RuntimeError("out of\n registers"), 8: MemoryError("too much")})
    tuned, _ = tune(path, timer, [job(), job(PREFILL, part="tiles", sizes=(2, 8))])
    (entry,) = tuned.entries
    assert entry.blocks == {"size": 4}
    assert entry.refused == [
        "size=2: RuntimeError: out of registers", "size=8: MemoryError: too much",
    ]  # fmt: skip
    assert set(tuned.failures) == {f"paged_attention: {PREFILL}"}
    assert "too much" in tuned.failures[f"paged_attention: {PREFILL}"]
    # Once it works, it is no failure any more.
    tuned, _ = tune(path, Timer({2: 1e-3, 8: 1e-3}), [job(PREFILL, part="tiles", sizes=(2, 8))])
    assert tuned.failures == {}
    assert len(tuned.entries) == 2


def test_an_interrupted_sweep_goes_on_where_it_was(tmp_path):
    path = tmp_path / "h100.yaml"
    timer = Timer({4: 1e-3, 2: 2e-3, 8: 3e-3})

    def interrupted(job, name, fake):
        if job.argument == "tiles" and fake.size == 2:
            raise KeyboardInterrupt
        return timer(job, name, fake)

    with pytest.raises(KeyboardInterrupt):
        tune(path, interrupted)
    assert len(blocks.read(path).entries) == 1
    assert blocks.read(path).trying is None
    timer.calls.clear()
    tuned, _ = tune(path, timer)
    assert timer.calls == [("tiles", 4), ("tiles", 2), ("tiles", 8)]
    assert len(tuned.entries) == 2
    timer.calls.clear()
    tune(path, timer)
    assert timer.calls == [], "all is there"
    tune(path, timer, again=True)
    assert len(timer.calls) == 6
    assert len(blocks.read(path).entries) == 2
    tuning.tune(JOBS, path, EMPTY, timer, versions={**VERSIONS, "jax": "2.0"})
    assert len(timer.calls) == 12, "another jax may be another story"


class Killed(BaseException):
    """What no handler sees: the process is gone."""


def test_blocks_that_ended_the_process_are_not_tried_again(tmp_path, monkeypatch):
    path = tmp_path / "h100.yaml"
    deadly = {2, 8}

    def timer(job, name, fake):
        if fake.size in deadly:
            # From here on nothing is written any more.
            monkeypatch.setattr(tuning, "write", lambda *_: None)
            raise Killed
        return 1e-3

    write = tuning.write
    for died in ([{"size": 4}, {"size": 2}], [{"size": 4}, {"size": 2}, {"size": 8}]):
        with pytest.raises(Killed):
            tune(path, timer, [job()])
        monkeypatch.setattr(tuning, "write", write)
        trying = blocks.read(path).trying
        assert trying is not None
        assert trying["ended"][-1] == died[-1]
    tuned, _ = tune(path, timer, [job()])
    (entry,) = tuned.entries
    assert entry.blocks == {"size": 4}
    assert entry.refused == ["size=2: ended the process", "size=8: ended the process"]
    assert tuned.trying is None


def test_time_runs_out_between_cases(tmp_path):
    path, now = tmp_path / "h100.yaml", [0.0]

    def timer(job, name, fake):
        now[0] += 10
        return 1e-3

    tuned, left = tune(path, timer, limit_seconds=25, clock=lambda: now[0])
    assert [job.argument for job in left] == ["tiles"]
    assert len(tuned.entries) == 1
    _, left = tune(path, timer, limit_seconds=25, clock=lambda: now[0])
    assert left == []


def test_a_file_of_another_chip_is_left_alone(tmp_path):
    path = tmp_path / "h200.yaml"
    path.write_text(yaml.safe_dump({"chip": "h200", "device_kind": "x", "entries": []}))
    with pytest.raises(ConfigError, match=r"is for h200, but the device is h100"):
        tune(path, Timer({}))


def test_without_a_device_the_command_says_what_to_do(capsys):
    assert tuning.main([]) == 1
    said = capsys.readouterr().err
    assert "there is nothing to tune" in said
    assert "pip install 'jaxinfer[tpu]'" in said
    with pytest.raises(DeviceError, match="only a CPU"):
        tuning.present_chip("h100")
    assert tuning.main(["--device", "h900"]) == 2
    assert "there is no chip 'h900'" in capsys.readouterr().err


def test_another_device_than_named_is_refused(monkeypatch):
    import jax

    @dataclass
    class Device:
        device_kind: str
        platform: str = "tpu"

    monkeypatch.setattr(jax, "devices", lambda: [Device("TPU v6 lite")])
    chip, kind = tuning.present_chip("auto")
    assert (chip.name, kind) == ("tpu-v6e", "TPU v6 lite")
    with pytest.raises(DeviceError, match="--device tpu-v5e: the device here is tpu-v6e"):
        tuning.present_chip("tpu-v5e")
    monkeypatch.setattr(jax, "devices", lambda: [Device("TPU v99")])
    with pytest.raises(DeviceError, match="'TPU v99' has no sheet"):
        tuning.present_chip("auto")


def test_what_would_be_tried_can_be_listed_anywhere(capsys):
    assert tuning.main(["--list", "--device", "tpu-v6e", "--op", "grouped_matmul"]) == 0
    said = capsys.readouterr().out
    assert "grouped_matmul: gpt-oss-20b, decode 64, mxfp4" in said
    assert "tokens=" in said
    assert "paged_attention" not in said
    assert tuning.main(["--list", "--device", "tpu-v6e", "--op", "write_pages"]) == 2
    assert "write_pages has no blocks to tune" in capsys.readouterr().err
    assert tuning.main(["--list", "--device", "tpu-v6e", "--case", "nonsense"]) == 2


def test_blocks_are_timed_on_the_device_and_must_agree_with_the_reference(monkeypatch):
    """With the CPU's reference in the role of a kernel."""
    case = cases.Product((3, 0, 5), 64, 32, None, "float32")
    monkeypatch.setattr(cases, "REAL_PRODUCTS", {"tiny": case})
    monkeypatch.setattr(tuning, "SECONDS", 0.01)
    real, asked = workloads.implementation, []

    def implementation(op, case, backend, chip, blocks=None):
        reference = real(op, case, "reference", chip)
        if backend == "reference":
            return reference
        asked.append((backend, blocks))
        return lambda *arrays: reference(*arrays) * (blocks or {})["blocks"].size

    monkeypatch.setattr(workloads, "implementation", implementation)
    timer = tuning.DeviceTimer(load_chip("h100"))
    tiny = Sweep("grouped_matmul", ("tiny",), "grouped_matmul", {}, "blocks", (Fake(1), Fake(2)))
    assert 0 < timer(tiny, "tiny", Fake(1)) < 1
    with pytest.raises(ValueError, match="differs from the reference by 1 of its largest"):
        timer(tiny, "tiny", Fake(2))
    assert asked == [("mosaic_gpu", {"blocks": Fake(1)}), ("mosaic_gpu", {"blocks": Fake(2)})]
