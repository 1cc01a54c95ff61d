"""The run of all that a GPU has to show: how parts end, what stays of them, and their commands."""

from importlib.util import find_spec

import pytest

from jaxinfer.bench.__main__ import _parser
from tests import on_gpu
from tests.engine_on_gpu import far
from tests.on_gpu import Part


@pytest.fixture
def folder(tmp_path, monkeypatch):
    says = ("-c", "print('{}'); print('first\\rlast')")
    waits = ("-c", "import time; print('begun', flush=True); time.sleep(60)")
    known = {
        "good": Part((says, says), 60),
        "bad": Part((("-c", "raise SystemExit(3)"), says), 60),
        "slow": Part((waits,), 2),
    }
    monkeypatch.setattr(on_gpu, "parts", lambda scratch: known)
    return tmp_path


def test_every_part_says_how_it_ended(folder, capsys):
    assert on_gpu.main(["--output", str(folder)]) == 2
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(", ")[0] for line in said if line.startswith("==")] == [
        "== good: good", "== bad: code 3", "== slow: out of time",
    ]  # fmt: skip
    assert [line for line in said if not line.startswith("==")] == ["last", "last", "begun"]
    # The file has everything, and of a part that failed no later command.
    text = (folder / "report.txt").read_bytes().decode()
    assert text.count("first\rlast") == 2
    assert text.count("{}") == 2
    assert text.index("== bad") < text.index("== slow") < text.index("begun")


def test_what_is_left_out(folder, capsys):
    assert on_gpu.main(["--output", str(folder), "--limit-seconds", "-1", "--only", "good"]) == 1
    assert "left out" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        on_gpu.main(["--output", str(folder), "--only", "none"])
    assert "not of good, bad, slow" in capsys.readouterr().err


def test_commands_are_those_that_there_are(tmp_path):
    """Each names a module, and the benchmark's options are those that it has."""
    for part in on_gpu.parts(tmp_path).values():
        for _, module, *options in part.commands:
            assert find_spec(module)
            if module == "jaxinfer.bench":
                assert _parser().parse_args(options).run


def test_outputs_are_compared_until_they_part():
    some = [([7, 8, 9], [-1.0, -2.0, -3.0], [-4.0]), ([1], [-1.0], [])]
    others = [([7, 5, 9], [-1.5, -9.0, -9.0], [-4.25]), ([1], [-1.0], [])]
    assert far(some, others) == (0.25, 0.5)
