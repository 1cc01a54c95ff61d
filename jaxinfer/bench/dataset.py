"""Data sets as trtllm-bench has them: JSON Lines of task_id, prompt or input_ids, output_tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from jaxinfer.config import reject_unknown
from jaxinfer.errors import DatasetError

SHIPPED = Path(__file__).with_name("data") / "python-source.jsonl"
KEYS = ("task_id", "prompt", "input_ids", "output_tokens")


@dataclass(frozen=True)
class Item:
    """One request of a data set, and the number of its line, from 1."""

    line: int
    task_id: int | str
    input_ids: Sequence[int]
    output_tokens: int


@dataclass(frozen=True)
class Dataset:
    """What was read.  skipped: what was wrong with each line that was left out."""

    path: Path
    items: list[Item]
    skipped: list[str]


def read(
    path: str | Path,
    *,
    num_requests: int = 0,
    encode: Callable[[str], Sequence[int]] | None = None,
    skip_bad: bool = False,
) -> Dataset:
    """Read the first `num_requests` requests (0: all) of a file.

    encode: makes token ids of a prompt; None: there is no tokenizer.
    skip_bad: leave out lines that are at fault instead of raising.

    Raises `DatasetError` naming file and line, or if there are no requests.
    """
    if num_requests < 0:
        raise DatasetError(f"--num-requests must be 0 (all) or more, got {num_requests}")
    items: list[Item] = []
    skipped: list[str] = []
    seen: set[int | str] = set()
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise DatasetError(
            f"the data set cannot be read: {error}; make one with "
            "`python -m jaxinfer.bench prepare-dataset`"
        ) from error
    for number, line in enumerate(lines, 1):
        if num_requests and len(items) == num_requests:
            break
        if not line.strip():
            continue
        try:
            item = parse(line, number, encode)
            if item.task_id in seen:
                raise DatasetError(f"task_id {item.task_id!r} comes twice; each needs its own")
        except (ValueError, RecursionError) as error:  # DatasetError, and what json raises
            skipped.append(_fault(path, number, error, skip_bad))
            continue
        seen.add(item.task_id)
        items.append(item)
    _check_not_empty(path, items, skipped)
    if len(items) < num_requests:
        raise DatasetError(
            f"{path} has {len(items)} usable requests, fewer than --num-requests {num_requests}: "
            "lower that, or make a larger data set with prepare-dataset"
        )
    return Dataset(Path(path), items, skipped)


def keep_servable(
    dataset: Dataset, max_seq_len: int, vocab_size: int, *, skip_bad: bool = False
) -> Dataset:
    """The data set without requests that the engine cannot serve (skip_bad), or `DatasetError`."""
    items, skipped = [], list(dataset.skipped)
    for item in dataset.items:
        tokens, worst = len(item.input_ids) + item.output_tokens, max(item.input_ids)
        if tokens > max_seq_len:
            fault = (
                f"{len(item.input_ids)} prompt and {item.output_tokens} output tokens exceed "
                f"max_seq_len={max_seq_len}: raise it with --max-seq-len as far as the model allows"
            )
        elif worst >= vocab_size:
            fault = (
                f"input_ids has {worst}, but the model's vocabulary is 0 … {vocab_size - 1}: "
                "prepare a data set with its tokenizer"
            )
        else:
            items.append(item)
            continue
        skipped.append(_fault(dataset.path, item.line, fault, skip_bad))
    _check_not_empty(dataset.path, items, skipped)
    return Dataset(dataset.path, items, skipped)


def _fault(path: str | Path, line: int, error: object, skip_bad: bool) -> str:
    fault = f"{path}, line {line}: {error}"
    if not skip_bad:
        raise DatasetError(f"{fault}; mend the line, or leave it out with --skip-bad")
    return fault


def _check_not_empty(path: str | Path, items: list[Item], skipped: list[str]) -> None:
    if not items:
        also = f" that could be used; {len(skipped)} bad lines were skipped" if skipped else ""
        raise DatasetError(
            f"{path} has no requests{also}: each line is a JSON object with task_id, prompt or "
            "input_ids, and output_tokens; `python -m jaxinfer.bench prepare-dataset` writes some"
        )


def parse(
    line: bytes | str, number: int, encode: Callable[[str], Sequence[int]] | None = None
) -> Item:
    """One line; raises `DatasetError`, or a `ValueError` of json's, without naming the place."""
    record = json.loads(line)
    if not isinstance(record, dict):
        raise DatasetError("must be a JSON object")
    reject_unknown("a data set's line", record, KEYS, DatasetError)
    task_id, output_tokens = record.get("task_id", number - 1), record.get("output_tokens")
    if not isinstance(task_id, (int, str)) or isinstance(task_id, bool):
        raise DatasetError(f"task_id must be a whole number or a string, got {task_id!r}")
    if type(output_tokens) is not int or output_tokens < 1:
        raise DatasetError(f"output_tokens must be a whole number above 0, got {output_tokens!r}")
    return Item(number, task_id, _input_ids(record, encode), output_tokens)


def _input_ids(
    record: dict[str, Any], encode: Callable[[str], Sequence[int]] | None
) -> Sequence[int]:
    ids, prompt = record.get("input_ids"), record.get("prompt")
    if ids is None and prompt is None:
        raise DatasetError("needs prompt or input_ids")
    if ids is None:
        if not isinstance(prompt, str):
            raise DatasetError(f"prompt must be a string, got {prompt!r}")
        if encode is None:
            raise DatasetError(
                "has a prompt and no input_ids, but there is no tokenizer: set --tokenizer to a "
                "folder that has one, or prepare a data set of input_ids"
            )
        ids = encode(prompt)
    if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
        raise DatasetError("input_ids must be a list of whole numbers from 0")
    if not ids:
        raise DatasetError("the prompt has no tokens: it must have at least one")
    return ids


def write(items: Iterable[dict[str, Any]], file: TextIO) -> int:
    """Write records as JSON Lines; returns how many."""
    count = 0
    for record in items:
        file.write(json.dumps(record, separators=(",", ":")) + "\n")
        count += 1
    return count
