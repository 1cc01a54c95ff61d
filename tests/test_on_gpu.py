"""The run of all that a GPU has to show: how parts end, what stays of them, and their commands."""

from importlib.util import find_spec

import pytest

from jaxinfer.bench.__main__ import _parser
from tests import engine_on_gpu, on_gpu
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


class Engine:
    """Knows its options, and computes nothing."""

    def __init__(self, options):
        self.options = options

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def stats(self):
        return {"steps": 1}


def test_outputs_are_compared_as_far_as_they_follow_the_same_tokens():
    some = [([7, 8, 9], [{7: -1.0}, {8: -2.0, 5: -2.5}, {9: -3.0}]), ([1], [{1: -1.0}])]
    others = [([7, 5, 9], [{7: -1.5}, {5: -2.0, 8: -2.25}, {9: -9.0}]), ([1], [{2: -1.0}])]
    assert sorted(engine_on_gpu.differences(some, others)) == [0.25, 0.5, 0.5]


@pytest.mark.parametrize(
    ("apart", "named", "failed"),
    [(0.02, 20, 0), (0.08, 20, 1), (0.02, 1, 1), (0.0, 0, 1), ("one", 20, 1)],
)
def test_what_is_wrong_with_an_engine(monkeypatch, capsys, apart, named, failed):
    """Too far apart on average or in one place, or too little to tell: each is one failure."""
    engines = []

    def engine(model, **options):
        engines.append(options)
        return Engine(options)

    def scored(llm, prompts):
        kernel = llm.options["attention_backend"] == "kernel"
        far = 0.0 if apart == "one" else apart * kernel
        places = [dict.fromkeys(range(named), -1.0 - far) for _ in range(engine_on_gpu.DECODED)]
        if apart == "one" and kernel:
            places[3][0] = -2.0
        return [([0] * engine_on_gpu.DECODED, places) for _ in prompts]

    monkeypatch.setattr(engine_on_gpu, "LLM", engine)
    monkeypatch.setattr(engine_on_gpu, "scored", scored)
    assert engine_on_gpu.main(["--backend", "kernel", "--pages", "int8"]) == failed
    assert capsys.readouterr().out.count("WRONG") == failed
    assert [engine["kv_cache_dtype"] for engine in engines] == ["int8"] * 3
    assert [engine.get("deterministic", False) for engine in engines] == [False, False, True]


@pytest.mark.parametrize("other", ["again", "in another order", "alone"])
def test_company_that_changes_what_a_deterministic_engine_says(monkeypatch, capsys, other):
    calls = iter(["kernel", "reference", "together", "again", "in another order"])

    def scored(llm, prompts):
        which = next(calls, "alone")
        places = [dict.fromkeys(range(20), 0.0) for _ in range(engine_on_gpu.DECODED)]
        return [([int(which == other)] * engine_on_gpu.DECODED, places) for _ in prompts]

    monkeypatch.setattr(engine_on_gpu, "LLM", lambda model, **options: Engine(options))
    monkeypatch.setattr(engine_on_gpu, "scored", scored)
    assert engine_on_gpu.main(["--pages", "auto"]) == 1
    assert f"deterministic, {other}: WRONG" in capsys.readouterr().out
