"""README's table of kernels is that of the record, and the record is of tests that passed."""

import json
from types import SimpleNamespace

from jaxinfer.kernels.quantized import FORMATS
from jaxinfer.kernels.workloads import OPS
from jaxinfer.kernels.write_pages import LARGEST
from tests import kernel_record
from tests.kernel_record import README, RECORD, ROOT, Recorder, table, with_table

BACKENDS = {"reference", "mosaic_tpu", "mosaic_gpu"}


def test_readme_has_the_records_table():
    record = json.loads(RECORD.read_text())
    assert README.read_text() == with_table(README.read_text(), record), "run: make kernel-table"


def test_the_record_speaks_of_what_there_is():
    record = json.loads(RECORD.read_text())
    lines = [line for entry in record["tests"].values() for line in entry["passed"]]
    lines += [f"{line} x" for entry in record["devices"].values() for line in entry["passed"]]
    assert lines
    for line in lines:
        op, backend, dtype, _ = line.split(" ")
        assert op in OPS
        assert backend in BACKENDS
        assert dtype in {"bfloat16", "float32", *LARGEST, *FORMATS}
    for file in record["tests"]:
        assert "kernel_ran" in (ROOT / file).read_text(), f"{file} records nothing any more"


def test_the_table_by_hand():
    record = {
        "tests": {
            "a.py": {"passed": ["op reference int8 cpu", "op mosaic_tpu int8 interpreted"]},
            "b.py": {"passed": [
                "op mosaic_tpu int8 tpu-v6e", "op mosaic_tpu int8 tpu-v5e",
                "op mosaic_tpu fp8 b200", "op mosaic_tpu fp8 tpu-v6e",
            ]},
        },
        "devices": {"tpu-v6e": {"passed": ["op mosaic_tpu fp8", "op mosaic_tpu int8"]}},
    }  # fmt: skip
    assert table(record).splitlines()[2:] == [
        "| op | reference | int8 | – | – | cpu |",
        "| op | mosaic_tpu | fp8, int8 | yes: int8 | tpu-v6e; b200: fp8; tpu-v5e: int8 | tpu-v6e |",
    ]


def report(nodeid, *said, passed=True, when="call"):
    properties = [("kernel", words) for words in said] + [("other", 3)]
    return SimpleNamespace(nodeid=nodeid, user_properties=properties, passed=passed, when=when)


def test_only_what_passed_is_recorded_and_other_files_stay(tmp_path):
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"tests": {"old.py": {"passed": ["x"]}, "new.py": {"passed": ["y"]}},
                                "devices": {}}))  # fmt: skip
    recorder = Recorder(path)
    good, bad = ("op", "backend", "int8", "cpu"), ("op", "backend", "fp8", "cpu")
    recorder.pytest_runtest_logreport(report("new.py::one", good))
    recorder.pytest_runtest_logreport(report("new.py::two", bad, passed=False))
    recorder.pytest_runtest_logreport(report("new.py::three", bad, when="teardown"))
    recorder.pytest_runtest_logreport(report("silent.py::four"))
    recorder.pytest_sessionfinish()
    tests = json.loads(path.read_text())["tests"]
    assert tests["old.py"] == {"passed": ["x"]}
    assert tests["new.py"]["passed"] == ["op backend int8 cpu"]
    assert set(tests) == {"old.py", "new.py"}


def test_marks_stand_in_readme_once():
    text = README.read_text()
    assert text.count(kernel_record.BEGIN) == text.count(kernel_record.END) == 1
