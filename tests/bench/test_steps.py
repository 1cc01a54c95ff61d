"""`bench steps` on a tiny model: what it says adds up, and to run a step again changes nothing."""

import json

import numpy as np
import pytest

from jaxinfer import LLM, SamplingParams
from jaxinfer.bench import roofline, steps
from jaxinfer.bench.__main__ import main

ENGINE = {"load_format": "dummy", "max_batch_size": 4, "max_num_tokens": 16, "max_seq_len": 64,
          "page_size": 8, "num_pages": 40}  # fmt: skip
WORDS = [word for name, value in ENGINE.items() for word in (f"--{name}", str(value))]
LIMITS = roofline.Peaks(1e9, "a test", 1e12, "a test")


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    monkeypatch.setattr(roofline, "peaks", lambda *_: LIMITS)


def test_a_line_for_each_shape(tiny_model, capsys):
    words = ["--decode", "1x9", "4x20", "--prefill", "30", "--steps", "3"]
    assert main(["steps", "--model", str(tiny_model), *WORDS, *words]) == 0
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert [row["rows"] for row in found["decode"]] == [1, 4]
    # The first rows decode for some 30 steps: those of the prompts, and of the measurement.
    assert all(
        at < row["context"] < at + 30 for at, row in zip((9, 20), found["decode"], strict=True)
    )
    assert found["recompilations"] == 0
    for row in found["decode"]:
        assert row["tok_s"] == pytest.approx(1000 * row["rows"] / row["ms"])
        gap = 1000 * (row["ms"] - row["ms_without_host"])
        assert row["exposed_host_us"] == pytest.approx(gap)
        assert row["mbu"] > 0
        assert row["mfu"] > 0
    (prompt,) = found["prefill"]
    assert prompt["tok_s"] == pytest.approx(30 / prompt["ms"] * 1000)
    (line,) = (line.split() for line in out.splitlines() if line.split()[:1] == ["4"])
    assert len(line) == len(found["decode"][1])


@pytest.mark.parametrize(("budget", "shape"), [(16, "16x40"), (7, "4x40"), (17, "16x9")])
def test_all_rows_decode_however_long_their_prompts_take(tiny_model, budget, shape, capsys):
    """Rows that decode already take their tokens from the budget of the others' prompts."""
    rows = shape.partition("x")[0]
    engine = ENGINE | {"max_batch_size": rows, "max_num_tokens": budget, "max_seq_len": 256}
    engine |= {"num_pages": 600}
    words = [word for name, value in engine.items() for word in (f"--{name}", str(value))]
    words += ["--decode", shape, "--prefill", "--steps", "3"]
    assert main(["steps", "--model", str(tiny_model), *words]) == 0, capsys.readouterr().err
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["decode"]
    assert row["rows"] == int(rows)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--decode", "8by128"], "'8by128' is no ROWSxCONTEXT"),
        (["--decode", "5x9"], "max_batch_size: 5"),
        (["--decode", "1x60"], "max_seq_len"),
        (["--decode", "--prefill", "64"], "max_seq_len: 65"),
        (["--decode", "--prefill"], "nothing to time"),
        (["--prefill", "0"], "at least 1"),
        (["--steps", "0"], "at least 1"),
    ],
)
def test_what_cannot_run_is_refused(tiny_model, words, said, capsys):
    assert main(["steps", "--model", str(tiny_model), *WORDS, *words]) == 2
    assert said in capsys.readouterr().err


def test_a_step_run_again_changes_nothing(tiny_model):
    prompt = list(range(3, 20))
    params = SamplingParams(temperature=0, max_tokens=20, detokenize=False)
    options = dict(enable_prefix_caching=False, skip_tokenizer_init=True)
    with LLM(tiny_model, **ENGINE, **options) as llm:
        want = llm.generate(prompt, params)
        measure = steps._Measure(llm, 3, LIMITS, np.random.default_rng(0))
        step, done = llm.step, []
        with steps._watched(llm) as watch:
            llm.submit(prompt, params)
            while not done:
                done = llm.turn()
                measure._alone(watch.batch)
        assert llm.step is step
        assert done[0].outputs[0].token_ids == want.outputs[0].token_ids
