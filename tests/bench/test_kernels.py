"""`bench kernels` on the CPU with tiny cases; what it makes of kernels that fail or are wrong."""

import json

import pytest

from jaxinfer.bench import kernels
from jaxinfer.bench.__main__ import main
from jaxinfer.configs import load_chip
from jaxinfer.errors import ConfigError
from jaxinfer.kernels import cases, timing, workloads
from jaxinfer.kernels.timing import Ceilings

LIMITS = Ceilings(1e9, 1, 1e12, "float32", 1, 1e-6)
PAGES = cases.Case(((1, 20), (4, 9)), K=1, G=2, H=16, S=16, stored="float32")
PRODUCTS = {
    "quantized_matmul": cases.Product((4,), 128, 32, "int8", "float32", single=True),
    "grouped_matmul": cases.Product((2, 0, 2), 128, 32, None, "float32"),
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(timing, "SECONDS", 0.01)
    monkeypatch.setattr(timing, "MOST_COPIES", 2)
    monkeypatch.setattr(cases, "MODEST", {"pages": PAGES})
    monkeypatch.setattr(cases, "MODEST_PRODUCTS", PRODUCTS)
    names = {"paged_attention": ("pages",), "write_pages": ("pages",)}
    names |= {op: (op,) for op in PRODUCTS}
    monkeypatch.setattr(cases, "TIMED_ON_CPU", names)
    monkeypatch.setattr(timing, "ceilings", lambda platform: LIMITS)


def test_every_operation_is_timed(capsys, tmp_path):
    file = tmp_path / "report.json"
    assert main(["kernels", "--report-json", str(file)]) == 0
    said = capsys.readouterr().out
    report = json.loads(said.splitlines()[-1])
    assert json.loads(file.read_text()) == report
    assert [row["op"] for row in report["kernels"]] == list(workloads.OPS)
    for row in report["kernels"]:
        assert row["error"] is None
        assert row["backend"] == "reference"
        num_bytes, flops = workloads.work(row["op"], workloads.case_of(row["op"], row["case"]))
        assert row["gb_per_s"] == pytest.approx(num_bytes / row["us"] / 1e3)
        assert row["tflop_per_s"] == pytest.approx(flops / row["us"] / 1e6)
        floor = max(num_bytes / 1e9, flops / 1e12)
        assert row["of_floor"] == pytest.approx(floor / row["us"] * 1e6)
        assert row["compile_seconds"] > 0
    assert report["ceilings"]["bytes_per_second"] == 1e9
    assert report["device"]["platform"] == "cpu"
    assert report["run"]["left_out"] == []
    table = said[: said.rindex("{")]
    for op in workloads.OPS:
        assert f"  {op}\n" in table


def test_one_operation_and_a_limit(capsys):
    assert main(["kernels", "--op", "write_pages", "grouped_matmul", "--case", "page"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["op"] for row in report["kernels"]] == ["write_pages"]
    assert main(["kernels", "--limit-seconds", "1e-9"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["kernels"] == []
    assert len(report["run"]["left_out"]) == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--op", "attention"], "--op: no attention; there are: paged_attention"),
        (["--backend", "kernel"], "a cpu has no kernels of its own"),
        (["--case", "zzz"], "no case of these operations"),
        (["--limit-seconds", "0"], "--limit-seconds must be more than 0"),
        (["--record", "x.json"], "--record is for chips that have a sheet"),
    ],
)
def test_senseless_options_are_refused(capsys, words, message):
    assert main(["kernels", *words]) == 2
    assert message in capsys.readouterr().err


def with_kernel(monkeypatch, kernel):
    """As if this were a device with a kernel, which is given the reference."""
    real = workloads.implementation

    def implementation(op, case, backend, chip, blocks=None):
        reference = real(op, case, "reference", chip)
        return reference if backend == "reference" else kernel(reference)

    monkeypatch.setattr(workloads, "implementation", implementation)
    return kernels.measure(
        "grouped_matmul", "grouped_matmul", ["reference", "mosaic_gpu"], load_chip("h100"), LIMITS
    )


def test_a_kernel_is_compared_with_the_reference(monkeypatch):
    _, row = with_kernel(monkeypatch, lambda reference: reference)
    assert (row["difference"], row["error"]) == (0.0, None)


def test_a_wrong_kernel_is_called_wrong(monkeypatch):
    _, row = with_kernel(monkeypatch, lambda reference: lambda *a: reference(*a) * 1.1)
    assert row["difference"] == pytest.approx(0.1, rel=0.01)
    assert "differs from the reference by 0.1" in row["error"]
    assert row["us"] > 0
    _, row = with_kernel(monkeypatch, lambda reference: lambda *a: reference(*a) * float("nan"))
    assert row["difference"] is None
    assert "differs" in row["error"]
    json.dumps(row, allow_nan=False)


def test_a_kernel_that_fails_is_a_row_of_its_own(monkeypatch):
    def fail(*_):
        raise RuntimeError("no\n  such instruction")

    reference, row = with_kernel(monkeypatch, lambda reference: fail)
    assert reference["error"] is None
    assert row["error"] == "RuntimeError: no such instruction"
    assert row["us"] is None
    table = kernels.table({"device": {}, "kernels": [reference, row]})
    assert "      RuntimeError: no such instruction" in table


def test_only_what_agreed_is_recorded(tmp_path):
    path = tmp_path / "kernels.json"
    before = {"passed": ["a mosaic_gpu int8", "b mosaic_gpu x"]}
    path.write_text(json.dumps({"tests": {"kept": 1}, "devices": {"h100": before}}))

    def row(op, stored, error=None, difference=0.01, backend="mosaic_gpu"):
        return {"op": op, "stored": stored, "error": error, "difference": difference,
                "backend": backend}  # fmt: skip

    found = {
        "device": {"chip": "h100", "jax": "1", "jaxlib": "1", "driver": None, "plugin": None},
        "run": {"date": "2026-01-01"},
        "kernels": [
            row("a", "int8", error="wrong"), row("c", "fp8"), row("d", "fp8", difference=None),
            row("e", "fp8"), row("e", "fp8", error="wrong in one case"),
            row("f", "fp8", backend="reference"),
        ],
    }  # fmt: skip
    kernels.record(path, found)
    record = json.loads(path.read_text())
    assert record["tests"] == {"kept": 1}
    assert record["devices"]["h100"]["passed"] == ["b mosaic_gpu x", "c mosaic_gpu fp8"]
    assert record["devices"]["h100"]["date"] == "2026-01-01"
    with pytest.raises(ConfigError, match="cannot be read"):
        kernels.record(tmp_path / "none.json", found)
