"""The command line against an engine that answers by rote."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxinfer import __main__ as cli
from jaxinfer import checkpoint, tasks
from jaxinfer.config import EngineConfig
from jaxinfer.errors import CheckpointError, RequestError
from jaxinfer.request import CompletionOutput, Logprob, RequestOutput, SamplingParams

ROOT = Path(__file__).parents[1]


class FakeLLM:
    """Answers a prompt with itself in capitals; refuses prompts with "too long" in them.

    limit: interrupted when it has answered this many.
    """

    def __init__(self, model: str, limit: int | None = None, **engine: Any):
        self.model, self.engine = model, engine
        self.limit = limit
        self.waiting: list[RequestOutput] = []
        self.most_waiting = 0
        self.answered: list[str] = []
        self.params: dict[str, SamplingParams] = {}

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def chat_prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        if messages[0]["role"] == "critic":
            raise RequestError("the chat template refuses the messages: critic")
        return [len(messages), *map(ord, messages[-1]["content"])]

    def submit(self, prompt: str | list[int], params: SamplingParams) -> str:
        if "too long" in str(prompt):
            raise RequestError("prompt has 9999 tokens; at most 100 fit")
        ids = list(map(ord, prompt)) if isinstance(prompt, str) else list(prompt)
        text = prompt.upper() if isinstance(prompt, str) else f"<{prompt[0]}>"
        request_id = f"request-{len(self.params)}"
        self.params[request_id] = params
        logprobs = [{5: Logprob(-0.5, 1, "é")}] if params.logprobs else None
        samples = [
            CompletionOutput(
                index=i, text=text, token_ids=ids[: params.max_tokens], finish_reason="length",
                seed=params.seed or 0, logprobs=logprobs,
            ) for i in range(params.n)
        ]  # fmt: skip
        shown = prompt if isinstance(prompt, str) else None
        self.waiting.append(RequestOutput(request_id, shown, ids, samples, finished=True))
        self.most_waiting = max(self.most_waiting, len(self.waiting))
        return request_id

    def run(self) -> Iterator[RequestOutput]:
        while self.waiting:
            if self.limit is not None and len(self.answered) >= self.limit:
                raise KeyboardInterrupt
            # Not in the order of arrival.
            output = self.waiting.pop(len(self.waiting) // 2)
            self.answered.append(output.request_id)
            yield output


class Command:
    """Runs the command line in a folder, with fakes, and keeps what it wrote."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        self.prompts, self.output = folder / "in.jsonl", folder / "out.jsonl"
        self._capsys = capsys
        self.llms: list[FakeLLM] = []
        self.out = self.err = ""

    def __call__(self, *options: str, limit: int | None = None, make_llm: Any = None) -> int:
        def make(model: str, **engine: Any) -> FakeLLM:
            self.llms.append(FakeLLM(model, limit, **engine))
            return self.llms[-1]

        code = cli.main(["generate", "--model", "m", *options], make_llm or make)
        self.out, self.err = self._capsys.readouterr()
        return code

    def write_prompts(self, *lines: Any) -> None:
        text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        self.prompts.write_text("".join(f"{line}\n" for line in text))

    def from_file(self, *options: str, **more: Any) -> int:
        return self(
            "--prompts-file", str(self.prompts), "--output", str(self.output), *options, **more
        )

    def results(self) -> dict[Any, Any]:
        """task_id → record; each once."""
        records = [json.loads(line) for line in self.output.read_text().splitlines()]
        found = {record["task_id"]: record for record in records}
        assert len(found) == len(records)
        return found


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, capsys)


# -- options ----------------------------------------------------------------------------------


def options_of(cls: type) -> dict[str, Any]:
    parser: Any = cli._parser()
    (commands,) = (a for a in parser._actions if hasattr(a, "choices") and a.choices)
    actions = commands.choices["generate"]._actions
    return {a.dest.split(".")[1]: a for a in actions if a.dest.startswith(f"{cls.__name__}.")}


@pytest.mark.parametrize("cls", [EngineConfig, SamplingParams])
def test_every_field_is_an_option_with_help(cls: type) -> None:
    fields = {field.name for field in dataclasses.fields(cls)}
    options = options_of(cls)
    assert fields - set(options) == {
        n.split(".")[1] for n in cli.WITHOUT_OPTION if cls.__name__ in n
    }
    for name, option in options.items():
        assert len(option.help) > 10, name
        assert option.option_strings[0] in (
            "--" + name.replace("_", "-"),
            "--" + cli.RENAMED.get(f"{cls.__name__}.{name}", ""),
        )


def test_options_reach_engine_and_sampling(command: Command) -> None:
    code = command(
        "--prompt", "hi", "--max-batch-size", "3", "--no-overlap", "--free-memory-fraction", "0.5",
        "--dtype", "float32", "--temperature", "0.5", "--stop", "a", "b", "--stop", "\n",
        "--stop-token-ids", "5", "6", "--logit-bias", '{"7": -1.5}', "--max-tokens", "none",
        "--bad-words-token-ids", "[[1, 2]]", "--ignore-eos", "--sampling-seed", "4", "--n", "2",
    )  # fmt: skip
    assert code == 0
    (llm,) = command.llms
    assert llm.model == "m"
    assert llm.engine == dict(
        max_batch_size=3, overlap=False, free_memory_fraction=0.5, dtype="float32"
    )
    assert llm.params["request-0"] == SamplingParams(
        temperature=0.5, stop=("a", "b", "\n"), stop_token_ids=[5, 6], logit_bias={7: -1.5},
        max_tokens=None, bad_words_token_ids=[[1, 2]], ignore_eos=True, seed=4, n=2,
    )  # fmt: skip


def test_defaults_are_the_classes_own(command: Command) -> None:
    assert command("--prompt", "hi") == 0
    assert command.llms[0].engine == {}
    assert command.llms[0].params["request-0"] == SamplingParams()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "SamplingParams.temperature must be a number from 0"),
        (["--dtype", "int3"], "EngineConfig.dtype must be one of auto, float32"),
        (["--logit-bias", "[1]"], "error: "),
        (["--output", "/nowhere/out.jsonl"], "No such file or directory: '/nowhere/out.jsonl'"),
    ],
)
def test_bad_options_end_before_the_model_is_loaded(
    options: list[str], message: str, command: Command
) -> None:
    assert command("--prompt", "x", *options) == 2
    assert message in command.err
    assert command.llms == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "one of the arguments --prompt --prompts-file is required"),
        (["--prompt", "x", "--prompts-file", "y"], "not allowed with"),
        (["--prompt", "x", "--logit-bias", "{"], "not JSON"),
        (["--prompt", "x", "--max-tokens", "ten"], "invalid int value: 'ten'"),
        (["--prompt", "x", "--tempera", "1"], "unrecognized arguments"),
    ],
)
def test_usage(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["generate", "--model", "m", *options])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def python(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *words], text=True, capture_output=True, env=env, check=False, **options
    )


def test_help_comes_without_jax() -> None:
    done = python("-X", "importtime", "-m", "jaxinfer", "generate", "--help")
    assert done.returncode == 0
    for text in ("--max-num-tokens N", "--top-p X", "task_id", "goes on", "(default: 0.9)"):
        assert text in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "jaxinfer.tasks" in imported
    assert not {"jax", "jaxlib", "flax", "tokenizers"} & imported


# -- input ------------------------------------------------------------------------------------


def test_lines_of_all_kinds(command: Command) -> None:
    command.write_prompts(
        {"prompt": "one", "output_tokens": 2},
        "",
        {"task_id": "b", "input_ids": [1, 2], "prompt": "ignored"},
        {"task_id": 7, "messages": [{"role": "user", "content": "three"}]},
        {"prompt": "four", "sampling_params": {"n": 2, "temperature": 0, "max_tokens": 3}},
    )
    assert command.from_file("--max-tokens", "5", "--top-k", "9") == 0
    found = command.results()
    assert set(found) == {0, "b", 7, 4}
    assert found[0]["prompt"] == "one"
    assert found[0]["outputs"] == [
        {"index": 0, "text": "ONE", "token_ids": [111, 110], "finish_reason": "length", "seed": 0}
    ]
    assert found["b"]["outputs"][0]["text"] == "<1>"
    assert found[7]["outputs"][0]["text"] == "<1>"
    assert "prompt" not in found[7]
    assert [out["index"] for out in found[4]["outputs"]] == [0, 1]
    params = list(command.llms[0].params.values())
    assert [p.max_tokens for p in params] == [2, 5, 5, 3]
    assert {p.top_k for p in params} == {9}
    assert "4 requests, 15 prompt and 15 output tokens in" in command.err


def test_chat_makes_prompts_messages(command: Command) -> None:
    assert command("--chat", "--prompt", "abc", "--json") == 0
    record = json.loads(command.out)
    assert (record["prompt"], record["outputs"][0]["text"]) == ("abc", "<1>")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "has no chat template: give a plain prompt"),
        (["--skip-tokenizer-init"], "conversations need a tokenizer"),
    ],
)
def test_conversations_without_a_template_are_one_error_before_the_weights_are_read(
    options: list[str],
    message: str,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(checkpoint, "load", lambda *_: pytest.fail("the weights were read"))
    prompts = [{"prompt": "one"}, {"messages": [{"role": "user", "content": "two"}]}]
    for lines, chat in ((prompts, []), (prompts[:1] * 3, ["--chat"])):
        command.write_prompts(*lines)
        files = ["--prompts-file", str(command.prompts), "--output", str(command.output)]
        assert cli.main(["generate", "--model", "demo", *files, *chat, *options]) == 2
        assert capsys.readouterr().err.count(message) == 1
        assert command.output.read_bytes() == b""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting property name"),
        ("[1]", "must be a JSON object"),
        ({"task_id": 1}, "needs one of prompt, input_ids and messages"),
        ({"promt": "x"}, "has no field 'promt'; did you mean 'prompt'?"),
        ({"prompt": 5}, "prompt must be a string, got 5"),
        ({"input_ids": [1, "2"]}, "input_ids must be a list of whole numbers"),
        ({"input_ids": [True]}, "input_ids must be a list of whole numbers"),
        ({"messages": []}, "messages must be"),
        ({"messages": [{"content": "x"}]}, "messages must be"),
        ({"messages": [{"role": "user"}], "prompt": "x"}, "messages go with neither"),
        ({"prompt": "x", "task_id": 1.5}, "task_id must be a whole number or a string, got 1.5"),
        ({"prompt": "x", "sampling_params": []}, "sampling_params must be an object"),
        ({"prompt": "x", "sampling_params": {"topk": 1}}, "did you mean 'top_k'?"),
        ({"prompt": "x", "sampling_params": {"top_p": 2}}, "SamplingParams.top_p must be"),
        ({"prompt": "x", "sampling_params": {"stop": 5}}, "SamplingParams.stop must be a list"),
        ({"prompt": "x", "sampling_params": {"stop_token_ids": ["a"]}}, "must hold token ids"),
        ({"prompt": "x", "sampling_params": {"logit_bias": [5]}}, ""),
        ("[" * 100_000, "maximum recursion depth"),
        ({"prompt": "x", "output_tokens": 0}, "SamplingParams.max_tokens must be"),
        (
            {"prompt": "x", "output_tokens": 1, "sampling_params": {"max_tokens": 2}},
            "give one of output_tokens and sampling_params.max_tokens",
        ),
    ],
)
def test_a_bad_line_is_named_before_the_model_is_loaded(
    line: Any, message: str, command: Command
) -> None:
    command.write_prompts({"prompt": "good"}, line)
    assert command.from_file() == 2
    assert f"{command.prompts}, line 2: " in command.err
    assert message in command.err
    assert command.llms == []
    assert not command.output.exists()


def test_task_ids_are_unique(command: Command) -> None:
    command.write_prompts({"prompt": "x", "task_id": 1}, {"prompt": "y"})
    assert command.from_file() == 2
    assert "task_id 1 comes twice" in command.err


def test_no_prompts(command: Command) -> None:
    command.write_prompts("")
    assert command.from_file() == 2
    assert "has no prompts" in command.err
    command.prompts.unlink()
    assert command.from_file() == 2
    assert "No such file" in command.err


# -- running ----------------------------------------------------------------------------------


def test_bad_requests_get_an_error_line_and_the_others_run(command: Command) -> None:
    command.write_prompts(
        {"prompt": "too long"},
        {"prompt": "good"},
        {"messages": [{"role": "critic", "content": "x"}]},
    )
    assert command.from_file() == 1
    found = command.results()
    assert found[0]["error"] == "prompt has 9999 tokens; at most 100 fit"
    assert found[0]["outputs"] == []
    assert "refuses" in found[2]["error"]
    assert "error" not in found[1]
    assert "3 requests (2 failed)" in command.err
    # They are there, so the same command does not try them again.
    assert command.from_file() == 0
    assert "nothing to do: 3 of 3" in command.err
    assert len(command.llms) == 1


def test_requests_are_fed_as_others_finish(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "AHEAD", 5)
    command.write_prompts(*({"prompt": f"{i}" * (i % 3 + 1)} for i in range(40)))
    assert command.from_file() == 0
    assert command.llms[0].most_waiting == 5
    assert set(command.results()) == set(range(40))


def test_seeds_are_the_same_for_a_task_wherever_it_runs(command: Command) -> None:
    command.write_prompts(*({"prompt": p} for p in "abc"))
    assert command.from_file("--seed", "1") == 0
    seeds = {task: record["outputs"][0]["seed"] for task, record in command.results().items()}
    assert len(set(seeds.values())) == 3
    command.output.unlink()
    assert command.from_file("--seed", "1", limit=1) == 130
    assert command.from_file("--seed", "1") == 0
    assert seeds == {
        task: record["outputs"][0]["seed"] for task, record in command.results().items()
    }


def test_logprobs_are_json(command: Command) -> None:
    assert command("--prompt", "x", "--logprobs", "1", "--json") == 0
    (out,) = json.loads(command.out)["outputs"]
    assert out["logprobs"] == [{"5": {"logprob": -0.5, "rank": 1, "decoded_token": "é"}}]


@pytest.mark.parametrize("text", ["é\u2028\n\x00😀", "\ud83d lone"])
def test_any_text_is_one_line(text: str, command: Command) -> None:
    command.write_prompts({"prompt": text})
    assert command.from_file() == 0
    (line,) = command.output.read_bytes().split(b"\n")[:-1]
    assert json.loads(line)["prompt"] == text
    assert command.from_file() == 0


def test_a_terminal_gets_text(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert command("--prompt", "abc", "--prompt", "too long", "--n", "2") == 1
    assert "=== 0, sample 1: 3 tokens, length\nabcABC\n" in command.out
    assert "=== 1: error: prompt has 9999" in command.out
    assert command("--prompt", "abc", "--json") == 0
    assert json.loads(command.out)["task_id"] == 0


def test_a_model_that_cannot_be_loaded(command: Command) -> None:
    def make_llm(model: str, **_: Any) -> Any:
        raise CheckpointError(f"{model} is no folder")

    assert command("--prompt", "x", make_llm=make_llm) == 1
    assert command.err == "jaxinfer: error: m is no folder\n"


def test_a_reader_that_goes_is_no_error_message() -> None:
    script = """
import sys; sys.path.insert(0, "tests")
from test_main import FakeLLM
from jaxinfer.__main__ import main
sys.exit(main(["generate", "--model", "m", *["--prompt", "x" * 1000] * 500], FakeLLM))
"""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


# -- resuming ---------------------------------------------------------------------------------

PROMPTS = [{"task_id": t, "prompt": p} for t, p in (("a", "one"), (2, "zweité 😀"), ("c", "3\n"))]


def stripped(found: dict[Any, Any]) -> dict[Any, Any]:
    return {task: record["outputs"] for task, record in found.items()}


def test_resumes_from_every_byte(command: Command) -> None:
    command.write_prompts(*PROMPTS)
    assert command.from_file() == 0
    whole, expected = command.output.read_bytes(), stripped(command.results())
    lines = whole.splitlines(keepends=True)
    for size in range(len(whole) + 1):
        command.output.write_bytes(whole[:size])
        assert command.from_file() == 0, command.err
        assert stripped(command.results()) == expected
        assert len(command.results()) == 3
        complete = sum(len(b"".join(lines[: i + 1])) <= size for i in range(3))
        answered = 0 if complete == 3 else len(command.llms[-1].answered)
        assert answered == 3 - complete
        assert command.output.read_bytes()[: sum(map(len, lines[:complete]))] == b"".join(
            lines[:complete]
        )


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_interrupted(limit: int, command: Command) -> None:
    command.write_prompts(*PROMPTS)
    assert command.from_file(limit=limit) == 130
    assert command.err == "jaxinfer: interrupted; the same command goes on from there\n"
    before = command.output.read_bytes()
    assert before.count(b"\n") == limit
    assert command.from_file() == 0
    assert command.output.read_bytes().startswith(before)
    assert set(command.results()) == {"a", 2, "c"}
    assert (f"({limit} before)" in command.err) == (limit > 0)


def test_interrupted_while_loading(command: Command) -> None:
    def make_llm(model: str, **_: Any) -> Any:
        raise KeyboardInterrupt

    command.write_prompts(*PROMPTS)
    assert command.from_file(make_llm=make_llm) == 130
    assert command.from_file() == 0


def test_more_prompts_may_come_later(command: Command) -> None:
    command.write_prompts(*PROMPTS[:2])
    assert command.from_file() == 0
    command.write_prompts(*PROMPTS)
    assert command.from_file() == 0
    assert len(command.llms[-1].answered) == 1
    assert set(command.results()) == {"a", 2, "c"}


def changed(**changes: Any) -> Callable[[Command], int]:
    def run(command: Command) -> int:
        command.write_prompts({**PROMPTS[0], **changes}, *PROMPTS[1:])
        return command.from_file()

    return run


@pytest.mark.parametrize(
    ("rerun", "message"),
    [
        (lambda c: c.from_file("--model", "other"), "was made with the model m; name another file"),
        (lambda c: c.from_file("--top-k", "3"), "with another prompt or other sampling parameters"),
        (lambda c: c.from_file("--chat"), "with another prompt or other sampling parameters"),
        (changed(prompt="another"), "task_id 'a' with another prompt"),
        (changed(output_tokens=3), "task_id 'a' with another prompt or other sampling parameters"),
        (changed(task_id="z"), "task_id 'a', which no prompt has"),
    ],
)
def test_a_file_made_otherwise_is_refused(
    rerun: Callable[[Command], int], message: str, command: Command
) -> None:
    command.write_prompts(*PROMPTS)
    assert command.from_file() == 0
    before = command.output.read_bytes()
    assert rerun(command) == 2
    assert message in command.err
    assert command.output.read_bytes() == before
    assert len(command.llms) == 1


@pytest.mark.parametrize(
    "content",
    ["notes\n", "notes", '{"task_id": 1, "prompt": "x"}', '{"task_id": 1}\n', "5\n", "[]", "\n"],
)
def test_a_file_of_others_is_left_alone(content: str, command: Command) -> None:
    command.write_prompts(*PROMPTS)
    command.output.write_text(content)
    assert command.from_file() == 2
    assert "line 1 is not one that this command writes; name another file" in command.err
    assert command.output.read_text() == content


def test_lines_are_on_disk_when_written(tmp_path: Path) -> None:
    with open(tmp_path / "x", "wb") as file:
        tasks.Lines(file, on_disk=True).write({"task_id": 1})
        assert (tmp_path / "x").read_bytes() == b'{"task_id": 1}\n'


def test_lines_go_to_any_stream() -> None:
    stream = io.BytesIO()
    tasks.Lines(stream, on_disk=False).write({"task_id": "é"})
    assert stream.getvalue().decode() == '{"task_id": "é"}\n'


def test_output_that_is_no_file_has_nothing_to_go_on_from(command: Command) -> None:
    for _ in range(2):
        assert command("--prompt", "x", "--output", os.devnull) == 0
        assert "1 requests" in command.err
