"""The command line: `python -m jaxinfer generate`, and `save`.

Options are the fields of `EngineConfig` and `SamplingParams`, with the help of their docstrings.
jax is imported only once all input was read and found good.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

import jaxinfer
from jaxinfer import tasks
from jaxinfer.config import EngineConfig, field_names
from jaxinfer.errors import ConfigError, JaxinferError, RequestError
from jaxinfer.options import add_fields, given
from jaxinfer.request import RequestOutput, SamplingParams
from jaxinfer.tasks import Defaults, Lines, Task

# Requests that the engine is given ahead of those that it works on.
AHEAD = 1024
# Fields that no option can give, and names that both classes have (the engine's keeps its name).
WITHOUT_OPTION = {"EngineConfig.devices"}
RENAMED = {"SamplingParams.seed": "sampling-seed"}
# What saving a model depends on.
SAVE_FIELDS = ("dtype", "load_format", "seed", "tokenizer", "tensor_parallel_size")

MODEL_HELP = 'a folder, "demo", a preset\'s name or a hub id'
DESCRIPTION = "Generate text for prompts, all batched together."
EPILOG = f"""\
{tasks.HELP}

With --seed, each request's seed is made of that and its task_id.

Exit codes: 0 all good, 1 a request or the engine failed, 2 bad options or input, 130 interrupted.
"""


def main(argv: Sequence[str] | None = None, make_llm: Callable[..., Any] | None = None) -> int:
    """Run the command; returns the exit code.  make_llm stands in for `LLM`, for tests."""
    options = vars(_parser().parse_args(argv))
    try:
        if options["command"] == "save":
            return _save(options)
        return _generate(options, make_llm)
    except KeyboardInterrupt:
        resumes = options["command"] == "generate" and options["output"]
        again = "; the same command goes on from there" if resumes else ""
        _say(f"interrupted{again}")
        return 130
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ConfigError, RequestError) as error:
        _say(f"error: {error}")
        return 2
    except (JaxinferError, OSError) as error:
        _say(f"error: {error}")
        return 1


def _say(message: str) -> None:
    print(f"jaxinfer: {message}", file=sys.stderr, flush=True)


# -- options ----------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m jaxinfer", description=jaxinfer.__doc__, formatter_class=as_written
    )
    parser.add_argument("--version", action="version", version=f"jaxinfer {jaxinfer.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    _add_save(commands)
    generate = commands.add_parser(
        "generate", help="generate text for prompts",
        usage="python -m jaxinfer generate --model MODEL (--prompt TEXT | --prompts-file FILE) "
        "[--output FILE] [options]", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=as_written, allow_abbrev=False,
    )  # fmt: skip
    add = generate.add_argument
    add("--model", required=True, help=MODEL_HELP)
    prompts = generate.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="may be repeated")
    prompts.add_argument("--prompts-file", metavar="FILE", help="JSON Lines, see below")
    add("--output", metavar="FILE", help="write results there as JSON Lines, and resume; see below")
    add("--chat", action="store_true", help="prompts are what a user says to a chat model")
    as_json = argparse.BooleanOptionalAction
    add("--json", action=as_json, help="JSON Lines on standard output (default: if no terminal)")
    add_group = functools.partial(add_fields, without=WITHOUT_OPTION, renamed=RENAMED)
    add_group(generate.add_argument_group("engine"), EngineConfig)
    add_group(generate.add_argument_group("sampling, where a line says no more"), SamplingParams)
    return parser


def _add_save(commands: Any) -> None:
    save = commands.add_parser(
        "save", help="save a model in a form that loads faster", allow_abbrev=False,
        description="Convert a model once, into a folder that loads without conversion.  With the "
        "dtype auto it keeps the checkpoint's number format, on CPU too.",
    )  # fmt: skip
    save.add_argument("--model", required=True, help=MODEL_HELP)
    save.add_argument("--output", required=True, metavar="FOLDER", help="where to save it")
    save.add_argument("--overwrite", action="store_true", help="replace a model saved there before")
    others = {f"EngineConfig.{name}" for name in field_names(EngineConfig)}
    others -= {f"EngineConfig.{name}" for name in SAVE_FIELDS}
    add_fields(save.add_argument_group("engine"), EngineConfig, without=others)


# -- the commands -----------------------------------------------------------------------------


def _save(options: dict[str, Any]) -> int:
    engine = EngineConfig.from_dict(given(options, EngineConfig))
    from jaxinfer.loading import convert  # jax, only now

    start = time.monotonic()
    convert(options["model"], options["output"], engine, overwrite=options["overwrite"])
    _say(f"saved {options['output']} in {time.monotonic() - start:.1f} s")
    return 0


@dataclasses.dataclass
class Counts:
    """What was done."""

    requests: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0

    def add(self, output: RequestOutput | None, error: str | None) -> None:
        self.requests += 1
        self.failed += error is not None
        if output is not None and error is None:
            self.prompt_tokens += len(output.prompt_token_ids)
            self.output_tokens += sum(len(out.token_ids) for out in output.outputs)

    def summary(self, seconds: float, before: int) -> str:
        notes = [f"{self.failed} failed"] * (self.failed > 0) + [f"{before} before"] * (before > 0)
        note = f" ({', '.join(notes)})" if notes else ""
        speed = self.output_tokens / max(seconds, 1e-9)
        return (
            f"{self.requests} requests{note}, {self.prompt_tokens} prompt and {self.output_tokens} "
            f"output tokens in {seconds:.1f} s: {speed:.1f} output tokens/s"
        )


def _generate(options: dict[str, Any], make_llm: Callable[..., Any] | None) -> int:
    engine, model = given(options, EngineConfig), options["model"]
    defaults = _check_options(options)
    with contextlib.ExitStack() as stack:
        done: set[int | str] = set()
        write = _show
        try:
            digests, chats = tasks.check_tasks(_tasks(options, defaults))
            if options["output"]:
                path = Path(options["output"])
                done = tasks.resume(path, model, digests)
                lines = Lines(stack.enter_context(open(path, "ab")), on_disk=path.is_file())
                stack.callback(lines.sync)
                write = lines.write
        except OSError as error:
            raise ConfigError(str(error)) from error
        if not digests:
            raise RequestError(f"{options['prompts_file']} has no prompts")
        if len(done) == len(digests):
            _say(f"nothing to do: {len(done)} of {len(digests)} requests are done")
            return 0
        as_json = not sys.stdout.isatty() if options["json"] is None else options["json"]
        if as_json and not options["output"]:
            write = Lines(sys.stdout.buffer, on_disk=False).write
        if make_llm is None:
            from jaxinfer.llm import LLM as make_llm  # jax, only now
            from jaxinfer.loading import check_chat

            if chats:
                check_chat(model, EngineConfig.from_dict(engine))
        llm = stack.enter_context(make_llm(model, **engine))
        start, counts = time.monotonic(), Counts()
        left = (task for task in _tasks(options, defaults) if task.task_id not in done)
        with tqdm(
            total=len(digests), initial=len(done), unit="request", leave=False,
            disable=write is _show or not sys.stderr.isatty(),
        ) as bar:  # fmt: skip
            for task, output, error in _run(llm, left):
                write(tasks.make_record(task, model, output, error))
                counts.add(output, error)
                bar.update()
        _say(counts.summary(time.monotonic() - start, len(done)))
    return 1 if counts.failed else 0


def _check_options(options: Mapping[str, Any]) -> Defaults:
    """What the options say of every request; raises `ConfigError` for any that is out of range."""
    engine, sampling = given(options, EngineConfig), given(options, SamplingParams)
    EngineConfig.from_dict(engine)
    try:
        SamplingParams.from_dict(sampling)
    except (TypeError, ValueError, AttributeError) as error:  # JSON may be of any type
        raise ConfigError(str(error)) from error
    return Defaults(sampling, options["chat"], engine.get("seed"))


def _tasks(options: Mapping[str, Any], defaults: Defaults) -> Iterator[Task]:
    if options["prompts_file"] is not None:
        return tasks.read_tasks(options["prompts_file"], defaults)
    prompts = enumerate(options["prompt"])
    return (tasks.make_task({"prompt": text}, number, defaults) for number, text in prompts)


def _run(llm: Any, left: Iterator[Task]) -> Iterator[tuple[Task, RequestOutput | None, str | None]]:
    """Feed the engine; yields each task with its output, or its error, as it is finished."""
    running: dict[str, Task] = {}

    def feed() -> Iterator[tuple[Task, None, str]]:
        while len(running) < AHEAD and (task := next(left, None)) is not None:
            try:
                prompt = task.prompt if task.input_ids is None else task.input_ids
                if task.messages is not None:
                    prompt = llm.chat_prompt(task.messages)
                running[llm.submit(prompt, task.params)] = task
            except RequestError as error:
                yield task, None, str(error)

    yield from feed()
    for output in llm.run():
        yield running.pop(output.request_id), output, output.error
        yield from feed()


def _show(record: dict[str, Any]) -> None:
    """Print a record for people."""
    if "error" in record:
        print(f"=== {record['task_id']}: error: {record['error']}\n", flush=True)
    for out in record["outputs"]:
        sample = f", sample {out['index']}" if record["outputs"][1:] else ""
        counts = f"{len(out['token_ids'])} tokens, {out['finish_reason']}"
        print(f"=== {record['task_id']}{sample}: {counts}")
        print(record.get("prompt", "") + out["text"] + "\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
