"""compare: the loop against the engine, ratios and agreement from made-up figures, the command."""

import json
import re

import numpy as np
import pytest

from jaxinfer import LLM, SamplingParams
from jaxinfer.bench import compare, report, rounds, side
from jaxinfer.bench.__main__ import main
from jaxinfer.bench.loop import Loop, check_is_llama
from jaxinfer.bench.rounds import NEAR_TIE, Agreement, Clocked, Load
from jaxinfer.errors import ComparisonError, ConfigError
from jaxinfer.models import model_config

ENGINE = {"load_format": "dummy", "max_batch_size": 4, "max_num_tokens": 16, "page_size": 8}
WORDS = [word for name, value in ENGINE.items() for word in (f"--{name}", str(value))]
# Other lengths than those that a batch is padded to, and more requests than rows.
LENGTHS = [(5, 3), (20, 1), (1, 9), (13, 4), (7, 7), (30, 2)]


class Scripted:
    """A side whose outputs and scores are known."""

    name, how, versions = "scripted", "by heart", {}

    def __init__(self, outputs=(), scores_V=()):
        self.outputs, self.scores_V, self.asked = list(outputs), np.array(scores_V), []

    def generate(self, prompts, lengths):
        return [self.outputs.pop(0)[:n] for n in lengths]

    def next_scores(self, tokens):
        self.asked.append(tokens)
        return self.scores_V

    def close(self):
        pass


def prompts_of(lengths):
    rng = np.random.default_rng(3)
    return [rng.integers(3, 256, n).tolist() for n, _ in lengths]


@pytest.mark.parametrize("tied", [False, True])
def test_loop_generates_what_the_engine_does(tiny_model, tmp_path, tied):
    config = json.loads((tiny_model / "config.json").read_text())
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
    config |= {"tie_word_embeddings": True, "rope_scaling": scaling} if tied else {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    prompts, lengths = prompts_of(LENGTHS), [n for _, n in LENGTHS]
    with LLM(tmp_path, skip_tokenizer_init=True, max_seq_len=64, **ENGINE) as llm:
        loop, agreement = Loop(llm._weights, llm.model_config, 4), Agreement()
        ours, theirs = compare.Engine(llm), loop.generate(prompts, lengths)
        for row in zip(prompts, ours.generate(prompts, lengths), theirs, strict=True):
            agreement.add(*row, loop)
        assert [len(row) for row in theirs] == lengths
        assert agreement.rows_different == 0
        assert agreement.rows_equal >= 5, "near-ties are rare"
        again = loop.generate(prompts[:4], lengths[:4])
        assert again == theirs[:4], "what an earlier batch left in the cache must not matter"
        # The same distribution as the engine's, whatever the padding.
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=5)
        for prompt in prompts[:3]:
            scores_V = loop.next_scores(prompt).astype(np.float64)
            logprobs_V = scores_V - np.log(np.exp(scores_V).sum())
            (found,) = llm.generate(prompt, params).outputs[0].logprobs
            for token, entry in found.items():
                assert entry.logprob == pytest.approx(logprobs_V[token], abs=1e-4)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"attention_bias": True}, "qkv_bias = True"), ({"mlp_bias": True}, "mlp_bias = True")],
)
def test_loop_refuses_other_mathematics(tiny_model, change, named):
    values = json.loads((tiny_model / "config.json").read_text())
    check_is_llama(model_config(values), "loop")
    with pytest.raises(ConfigError, match=re.escape(f"--against loop runs Llama's mathematics on"
                       f"ly, but the model has {named}")):  # fmt: skip
        check_is_llama(model_config(values | change), "loop")


def test_rates_and_ratios_of_made_up_times():
    clocked = Clocked(Load("rows_2", [10, 10], [5, 5]))
    clocked.first = [(1.0, 2.0), (0.5, 0.5)]
    clocked.whole = [(3.0, 10.0), (1.5, 2.5)]
    ours, theirs = clocked.rates(0), clocked.rates(1)
    np.testing.assert_allclose(ours["output"], [10 / 3, 10 / 1.5])
    np.testing.assert_allclose(theirs["prefill"], [20 / 2, 20 / 0.5])
    np.testing.assert_allclose(theirs["decode"], [8 / 8, 8 / 2])  # the first tokens are prefill's
    mixed = Clocked(Load("mixed_1", [16], [200], split=False), whole=[(1, 2), (1, 4), (1, 3)])
    found = rounds.report([clocked, mixed], "loop")
    assert found["ratio"]["decode"]["rows_2"]["minimum"] == pytest.approx(2 / 1)
    assert found["ratio"]["decode"]["rows_2"]["maximum"] == pytest.approx(4 / 1)
    assert list(found["ratio"]["decode"]) == ["rows_2"], "a load that is not split has none"
    # The median of ratios, not the ratio of medians.
    assert found["ratio"]["output"]["mixed_1"]["p50"] == pytest.approx(3)
    assert found["loop_tok_s"]["output"]["mixed_1"]["p50"] == pytest.approx(200 / 3)
    assert found["seconds"]["loop.whole"]["mixed_1"] == [2, 4, 3]
    lines = report.table(found).splitlines()
    row = next(line.split() for line in lines if line.startswith("  output.mixed_1"))
    assert row == ["output.mixed_1", "2", "2.5", "3", "3.5", "4"]
    assert lines[2].split() == ["minimum", "p25", "p50", "p75", "maximum"]


def test_near_ties_are_told_from_differences():
    scores_V = [0.0, 2.0, 2.0 - NEAR_TIE, 1.99, -1.0]
    other, agreement = Scripted(scores_V=scores_V), Agreement()
    agreement.add([7, 8], [3, 3, 1], [3, 3, 1], other)
    assert other.asked == []
    agreement.add([7, 8], [3, 1, 4], [3, 2, 0], other)  # what comes after says nothing
    agreement.add([7, 8], [3, 1, 4], [3, 3, 4], other)
    assert other.asked == [[7, 8, 3], [7, 8, 3]]
    found = (agreement.rows_equal, agreement.rows_near_tie, agreement.rows_different)
    assert (agreement.rows_compared, found) == (3, (1, 1, 1))
    assert agreement.largest_gap == pytest.approx(0.01 / 2)


def test_rounds_alternate_and_the_first_does_not_count(monkeypatch):
    calls, clock = [], iter(range(100))
    monkeypatch.setattr(rounds.time, "perf_counter", lambda: next(clock))

    class Noted(Scripted):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def generate(self, prompts, lengths):
            calls.append((self.name, prompts, lengths))
            return [[1] * n for n in lengths]

    def run(strict=True, other=None):
        return rounds.measure(
            Noted("jaxinfer"), other or Noted("other"), Load("rows_2", [3, 3], [4, 4]), rounds=2,
            vocab_size=50, rng=np.random.default_rng(0), strict=strict, tick=lambda: None,
        )  # fmt: skip

    clocked = run()
    assert [name for name, _, _ in calls] == ["jaxinfer", "other"] * 6
    assert [lengths for _, _, lengths in calls[::2]] == [[1, 1], [4, 4]] * 3
    prompts = [prompts for _, prompts, _ in calls]
    assert prompts[::2] == prompts[1::2], "both sides get the same"
    assert all(prompts[0] != later for later in prompts[2:]), "and no prompt comes twice"
    assert clocked.first == clocked.whole == [(1, 1), (1, 1)]
    assert clocked.agreement.rows_equal == 12
    with pytest.raises(ComparisonError, match="scripted generates other tokens than jaxinfer"):
        run(other=Scripted([[1], [0]], [5.0, 1.0]))
    lenient = run(strict=False, other=Scripted([[0, 1, 1, 1]] * 12, [5.0, 1.0]))
    assert lenient.agreement.rows_different == 12
    with pytest.raises(ComparisonError, match="as many tokens"):
        run(other=Scripted([[1], []]))


def test_mixed_lengths_are_the_seeds_and_rows_are_equal(monkeypatch):
    parser = compare.argparse.ArgumentParser()
    compare.add_arguments(parser)
    words = ["--model", "demo", "--against", "loop", "--mixed", "40"]
    args = parser.parse_args(words)
    (load,) = compare._loads([], args)
    assert not load.split
    assert {len(load.inputs), len(load.outputs)} == {40}
    assert 16 <= min(*load.inputs, *load.outputs) < max(*load.inputs, *load.outputs) <= 256
    assert compare._loads([], args) == [load]
    assert compare._loads([], parser.parse_args([*words, "--seed", "1"])) != [load]
    rows, _ = compare._loads([3], args)
    assert (rows.name, rows.inputs, rows.outputs, rows.longest) == (
        "rows_3", [128] * 3, [64] * 3, 192,
    )  # fmt: skip


def test_end_to_end(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "MIXED_LENGTHS", (4, 12))
    file = tmp_path / "report.json"
    words = ["compare", "--model", str(tiny_model), "--against", "loop", *WORDS]
    lengths = ["--input-len", "6", "--output_len", "5", "--rows", "1", "3", "--mixed", "6"]
    assert main([*words, *lengths, "--rounds", "2", "--report-json", str(file)]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out.splitlines()[-1])
    assert found == json.loads(file.read_text())
    assert list(found) == [
        "engine", "machine", "world_info", "against", "load", "ratio", "jaxinfer_tok_s",
        "loop_tok_s", "agreement", "recompilations", "seconds",
    ]  # fmt: skip
    assert found["engine"]["dtype"] == found["engine"]["kv_cache_dtype"] == "float32"
    assert found["against"]["name"] == "loop"
    assert found["load"]["rows_3"] == {"input_tokens": 18, "output_tokens": 15}
    assert list(found["ratio"]["output"]) == ["rows_1", "rows_3", "mixed_6"]
    assert found["agreement"]["rows_3"]["rows_compared"] == 3 * 2 * 3
    assert found["agreement"]["mixed_6"]["rows_different"] == 0
    assert found["recompilations"] == 0, "the round before has compiled everything"
    assert "output.rows_1" in captured.out


def test_what_cannot_be_compared_is_refused_by_name(tiny_model, capsys, monkeypatch):
    def error(*words, model=str(tiny_model)):
        command = ["compare", "--model", model, "--against", "loop", *WORDS]
        assert main([*command, *words]) == 2
        return capsys.readouterr().err

    assert "--output-len must be at least 2, got 1" in error("--output-len", "1")
    assert "--rows must be at least 1, got 0" in error("--rows", "4", "0")
    assert "a request has 200 tokens, but max_seq_len is 128" in error(
        "--input-len", "136", "--max-seq-len", "128"
    )

    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(side.importlib, "import_module", missing)
    for against, module in (("transformers", "torch"), ("llama.cpp", "llama_cpp")):
        message = error("--against", against, "--rows", "1")
        assert f"--against {against} needs" in message
        assert f"No module named '{module}'" in message
        assert "pip install 'jaxinfer[compare]'" in message


@pytest.mark.filterwarnings("default")  # others' code
@pytest.mark.parametrize(
    ("against", "modules"),
    [("transformers", ("torch", "transformers")), ("llama.cpp", ("llama_cpp", "gguf"))],
)
def test_against_what_is_installed(fixtures, capsys, monkeypatch, against, modules):
    for module in modules:
        pytest.importorskip(module)
    monkeypatch.setattr(compare, "MIXED_LENGTHS", (4, 12))
    words = ["compare", "--model", str(fixtures / "llama3"), "--against", against, "--rows", "3"]
    lengths = ["--input-len", "6", "--output-len", "5", "--mixed", "6", "--rounds", "1"]
    assert main([*words, *lengths, "--max-batch-size", "4"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["agreement"]["rows_3"]["rows_compared"] == 3 * 2 * 2
    for agreement in found["agreement"].values():
        assert agreement["rows_different"] == 0
