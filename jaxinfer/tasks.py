"""Prompts from JSON Lines, results to JSON Lines, and where an interrupted run goes on.

The text of `HELP` is the contract of both files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from jaxinfer.config import reject_unknown
from jaxinfer.errors import ConfigError, RequestError
from jaxinfer.request import CompletionOutput, Logprob, RequestOutput, SamplingParams

HELP = """\
A line of the prompts file is a JSON object:
  task_id          a number or string, once in the file; default: the number of the line, from 0
  prompt           a text, or
  input_ids        token ids (they win over prompt), or
  messages         a conversation, [{"role": ..., "content": ...}, ...]
  output_tokens    max_tokens for this line
  sampling_params  what else differs from the options, e.g. {"temperature": 0.5}
A bad line ends the command before the model is loaded, and so does a conversation (messages, or
--chat) if the model has no chat template.  A request that the engine cannot serve (too long, say)
gets a line with "error", and the others run.

A line of the output has task_id, request (a digest of prompt and sampling parameters), model,
prompt (if it was a text), and outputs: index, text, token_ids, finish_reason, seed and so on.  It
is written when the request has finished, so lines are in no order.  The same command again goes on
where the file ends: task_ids that are there, failed ones too, are skipped.  A file that was made
with another model, other prompts or other sampling options is refused."""
LINE_KEYS = ("task_id", "prompt", "input_ids", "messages", "output_tokens", "sampling_params")
# How each line of the output begins.
LINE_HEAD = b'{"task_id": '


@dataclasses.dataclass(frozen=True)
class Task:
    """One prompt: a conversation, else token ids, else a text (kept beside the others as given)."""

    task_id: int | str
    params: SamplingParams
    prompt: str | None = None
    input_ids: list[int] | None = None
    messages: list[dict[str, Any]] | None = None

    @property
    def digest(self) -> str:
        """Sixteen characters that are others if the prompt or a sampling parameter is another."""
        plain = vars(SamplingParams())
        params = {k: v for k, v in vars(self.params).items() if v != plain[k]}
        text = json.dumps([self.prompt, self.input_ids, self.messages, params], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What holds for a task unless its line says otherwise.

    sampling: fields of `SamplingParams`.  chat: a prompt is what a user says.
    seed: with the task_id, makes the seed of a request that brings none; None: leave it so.
    """

    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    chat: bool = False
    seed: int | None = None


def read_tasks(path: str | Path, defaults: Defaults) -> Iterator[Task]:
    """The tasks of a file, one by one; raises `RequestError` that names the line at fault."""
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            try:
                if line.strip():
                    yield make_task(json.loads(line), number, defaults)
            except (ValueError, TypeError, AttributeError, RecursionError) as error:
                raise RequestError(f"{path}, line {number + 1}: {error}") from error


def make_task(line: Any, number: int, defaults: Defaults) -> Task:
    """What a line asks for.  Raises `RequestError`, or ValueError and the like for wrong types."""
    if not isinstance(line, dict):
        raise RequestError("must be a JSON object")
    reject_unknown("a prompt's line", line, LINE_KEYS, RequestError)
    task_id = line.get("task_id", number)
    if not isinstance(task_id, (int, str)) or isinstance(task_id, bool):
        raise RequestError(f"task_id must be a whole number or a string, got {task_id!r}")
    own = line.get("sampling_params", {})
    if not isinstance(own, dict):
        raise RequestError('sampling_params must be an object such as {"temperature": 0.5}')
    params = {**defaults.sampling, **own}
    if "output_tokens" in line:
        if "max_tokens" in own:
            raise RequestError("give one of output_tokens and sampling_params.max_tokens")
        params["max_tokens"] = line["output_tokens"]
    if params.get("seed") is None and defaults.seed is not None:
        digest = hashlib.sha256(json.dumps([defaults.seed, task_id]).encode()).digest()
        params["seed"] = int.from_bytes(digest[:8]) >> 1
    _check_prompt(line)
    prompt, ids, messages = (line.get(key) for key in ("prompt", "input_ids", "messages"))
    if defaults.chat and prompt is not None and ids is None:
        messages = [{"role": "user", "content": prompt}]
    return Task(task_id, SamplingParams.from_dict(params), prompt, ids, messages)


def _check_prompt(line: dict[str, Any]) -> None:
    prompt, ids, messages = (line.get(key) for key in ("prompt", "input_ids", "messages"))
    if prompt is None and ids is None and messages is None:
        raise RequestError("needs one of prompt, input_ids and messages")
    if prompt is not None and not isinstance(prompt, str):
        raise RequestError(f"prompt must be a string, got {prompt!r}")
    if ids is not None and not (isinstance(ids, list) and all(type(i) is int for i in ids)):
        raise RequestError("input_ids must be a list of whole numbers")
    if messages is not None:
        if prompt is not None or ids is not None:
            raise RequestError("messages go with neither prompt nor input_ids")
        good = isinstance(messages, list) and all(
            isinstance(each, dict) and isinstance(each.get("role"), str) for each in messages
        )
        if not good or not messages:
            raise RequestError('messages must be [{"role": ..., "content": ...}, ...]')


def check_tasks(tasks: Iterable[Task]) -> tuple[dict[int | str, str], bool]:
    """Read all; returns task_id → digest, and whether there are conversations among them.

    Raises `RequestError` for a task_id that comes twice.
    """
    digests: dict[int | str, str] = {}
    chats = False
    for task in tasks:
        if task.task_id in digests:
            raise RequestError(f"task_id {task.task_id!r} comes twice; each needs its own")
        digests[task.task_id] = task.digest
        chats |= task.messages is not None
    return digests, chats


def resume(path: Path, model: str, digests: Mapping[int | str, str]) -> set[int | str]:
    """The task_ids that the output file has; drops a last line that was not written to its end.

    Raises `ConfigError` if any line is not what this command would write.
    """
    done: set[int | str] = set()
    if not path.is_file():  # nor has a device, such as /dev/null, anything to go on from
        return done
    with open(path, "r+b") as file:
        whole = 0
        for number, line in enumerate(file, 1):
            torn = not line.endswith(b"\n")
            try:
                record = json.loads(line)
                task_id, digest, made_with = (record[k] for k in ("task_id", "request", "model"))
                known = digests.get(task_id)
            except (ValueError, TypeError, KeyError) as error:
                if (
                    torn
                    and isinstance(error, ValueError)
                    and LINE_HEAD.startswith(line[: len(LINE_HEAD)])
                ):
                    break
                raise _refusal(path, number, "is not one that this command writes") from None
            if made_with != model:
                raise _refusal(path, number, f"was made with the model {made_with}")
            if known is None:
                raise _refusal(path, number, f"has task_id {task_id!r}, which no prompt has")
            if known != digest:
                what = f"has task_id {task_id!r} with another prompt or other sampling parameters"
                raise _refusal(path, number, what)
            if torn:
                break
            done.add(task_id)
            whole += len(line)
        file.truncate(whole)
    return done


def _refusal(path: Path, number: int, what: str) -> ConfigError:
    return ConfigError(f"--output {path}: line {number} {what}; name another file, or remove it")


def make_record(task: Task, model: str, output: RequestOutput | None, error: str | None) -> dict:
    """A line of the output."""
    record: dict[str, Any] = {"task_id": task.task_id, "request": task.digest, "model": model}
    if task.prompt is not None:
        record["prompt"] = task.prompt
    record["outputs"] = [_completion(out) for out in output.outputs] if output else []
    if output is not None and output.prompt_logprobs is not None:
        record["prompt_logprobs"] = [_logprobs(each) for each in output.prompt_logprobs]
    if error is not None:
        record["error"] = error
    return record


def _completion(output: CompletionOutput) -> dict[str, Any]:
    fields = {k: v for k, v in vars(output).items() if v is not None and k != "text_diff"}
    if output.logprobs is not None:
        fields["logprobs"] = [_logprobs(each) for each in output.logprobs]
    return fields


def _logprobs(position: dict[int, Logprob] | None) -> dict[int, Any] | None:
    return position and {token: vars(logprob) for token, logprob in position.items()}


class Lines:
    """Writes records as JSON Lines, each of which survives the end of the process at once.

    on_disk: every second they are synced, too.
    """

    def __init__(self, file: BinaryIO, *, on_disk: bool):
        self._file = file
        self._synced = time.monotonic() if on_disk else None

    def write(self, record: dict[str, Any]) -> None:
        # Half of a surrogate pair, which a prompt may hold, becomes the escape that it is in JSON.
        line = json.dumps(record, ensure_ascii=False) + "\n"
        self._file.write(line.encode(errors="backslashreplace"))
        self._file.flush()
        if self._synced is not None and time.monotonic() > self._synced + 1:
            self.sync()

    def sync(self) -> None:
        """Let what was written survive the machine, too, if it is on disk."""
        if self._synced is not None:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()
