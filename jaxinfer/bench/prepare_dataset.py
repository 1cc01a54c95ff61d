"""`prepare-dataset`: make a data set of random tokens, or of prompts cut from text files."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxinfer.bench import dataset
from jaxinfer.errors import ConfigError, DatasetError
from jaxinfer.options import seed

if TYPE_CHECKING:
    from jaxinfer.tokenizer import Tokenizer

LONGEST = 2**31 - 1  # tokens of a prompt or an output

HELP = "write a data set: random tokens, or prompts cut from text files"
DESCRIPTION = """\
Writes a data set as JSON Lines with task_id, input_ids (or prompt) and output_tokens.  The same
options, seed and files give the same lines.

kinds:
  token-norm-dist  random tokens; lengths are normally distributed
  token-unif-dist  random tokens; lengths are uniformly distributed
  real             prompts cut from text files, from the start of a line; lengths are log-normally
                   distributed, as those of conversations are: many short, a few very long ones"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    kinds = parser.add_subparsers(required=True, metavar="KIND", dest="kind", help="see above")

    def add_kind(name: str) -> argparse.ArgumentParser:
        kind = kinds.add_parser(name, allow_abbrev=False)
        add = kind.add_argument
        add("--num-requests", type=int, required=True, metavar="N", help="lines to write")
        add("--output", metavar="FILE", help="write there (default: standard output)")
        add("--tokenizer", metavar="FOLDER", help='folder of a tokenizer, or "demo"')
        add("--seed", "--random-seed", type=seed, default=0, help="(default: %(default)s)")
        return kind

    norm, unif, real = map(add_kind, ("token-norm-dist", "token-unif-dist", "real"))
    for kind in (norm, real):
        for side in ("input", "output"):
            kind.add_argument(f"--{side}-mean", type=float, required=True, metavar="X",
                              help=f"mean {side} length in tokens")  # fmt: skip
            kind.add_argument(f"--{side}-stdev", type=float, required=True, metavar="X",
                              help="and its standard deviation")  # fmt: skip
    for side in ("input", "output"):
        for end, word in (("min", "shortest"), ("max", "longest")):
            unif.add_argument(f"--{side}-{end}", type=int, required=True, metavar="N",
                              help=f"{word} {side} in tokens")  # fmt: skip
        for kind in (norm, real):
            kind.add_argument(f"--{side}-max", type=int, metavar="N",
                              help=f"longer {side}s are cut to this (default: none)")  # fmt: skip
    for kind in (norm, unif):
        kind.add_argument("--vocab-size", type=int, metavar="N",
                          help="tokens are drawn from 0 … N-1 (default: the tokenizer's)"
                          )  # fmt: skip
    real.add_argument("--text", nargs="+", required=True, metavar="PATH",
                      help="UTF-8 text files, or folders whose *.py files are meant")  # fmt: skip
    real.add_argument("--write", choices=("input_ids", "prompt"), default="input_ids",
                      help="token ids, or text (default: %(default)s)")  # fmt: skip


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write the data set; raises `ConfigError`, `DatasetError` or `TokenizerError`."""
    if args.num_requests < 1:
        raise ConfigError("--num-requests must be at least 1: a data set has requests")
    rng = np.random.default_rng(args.seed)
    inputs = _lengths(args, "input", rng)
    outputs = _lengths(args, "output", rng)
    make = _real if args.kind == "real" else _random
    records = [
        {"task_id": index, **prompt, "output_tokens": int(outputs[index])}
        for index, prompt in enumerate(make(args, inputs, rng))
    ]
    with contextlib.ExitStack() as stack:
        file = sys.stdout
        if args.output:
            try:
                file = stack.enter_context(open(args.output, "w", encoding="utf-8"))
            except OSError as error:
                raise ConfigError(f"--output cannot be written: {error}") from error
        dataset.write(records, file)
    for side, lengths in (("input", inputs), ("output", outputs)):
        print(
            f"{side} tokens: mean {lengths.mean():.1f}, median {np.median(lengths):g}, "
            f"{lengths.min()} … {lengths.max()}",
            file=sys.stderr,
        )
    return {}


def _lengths(args: argparse.Namespace, side: str, rng: np.random.Generator) -> np.ndarray:
    """Lengths in tokens, at least 1."""
    count = args.num_requests
    if args.kind == "token-unif-dist":
        low, high = getattr(args, f"{side}_min"), getattr(args, f"{side}_max")
        if not 1 <= low <= high <= LONGEST:
            raise ConfigError(
                f"--{side}-min must be at least 1 and at most --{side}-max, and that at most "
                f"{LONGEST}"
            )
        return rng.integers(low, high + 1, count)
    mean, stdev = getattr(args, f"{side}_mean"), getattr(args, f"{side}_stdev")
    most = getattr(args, f"{side}_max")
    if not (1 <= mean <= LONGEST and 0 <= stdev <= LONGEST):
        raise ConfigError(
            f"--{side}-mean must be at least 1 and --{side}-stdev at least 0, "
            f"both at most {LONGEST}"
        )
    if most is not None and most < 1:
        raise ConfigError(f"--{side}-max must be at least 1")
    if args.kind == "real":
        # The log-normal distribution that has this mean and deviation.
        variance = math.log1p((stdev / mean) ** 2)
        drawn = rng.lognormal(math.log(mean) - variance / 2, math.sqrt(variance), count)
    else:
        drawn = rng.normal(mean, stdev, count)
    return np.clip(np.rint(drawn), 1, LONGEST if most is None else most).astype(int)


def _random(
    args: argparse.Namespace, lengths: np.ndarray, rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    size = args.vocab_size
    if size is None and args.tokenizer is None:
        raise ConfigError("give --vocab-size, or --tokenizer to take its size")
    if size is None:
        size = _tokenizer(args.tokenizer).vocab_size
    if size < 1:
        raise ConfigError("--vocab-size must be at least 1")
    for length in lengths:
        yield {"input_ids": rng.integers(size, size=length).tolist()}


def _real(
    args: argparse.Namespace, lengths: np.ndarray, rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    """Prompts that begin at a line drawn from all lines of all files."""
    if args.tokenizer is None:
        raise ConfigError("real needs --tokenizer: prompts are cut to lengths in tokens")
    tokenizer = _tokenizer(args.tokenizer)
    texts = [text for text in map(_read, _files(args.text)) if text.strip()]
    if not texts:
        raise DatasetError("--text has no text: name files, or folders that have *.py files")
    starts = [_line_starts(text) for text in texts]
    ends = np.cumsum([len(each) for each in starts])
    for length in lengths:
        # Near the end of a file there may be too little text left for a long prompt.
        for _ in range(1000):
            line = int(rng.integers(ends[-1]))
            which = int(np.searchsorted(ends, line, side="right"))
            text, start = texts[which], starts[which][line - ends[which]]
            ids = _encode_enough(tokenizer, text[start:], length)
            if len(ids) == length:
                break
        else:
            raise DatasetError(
                f"--text has no file that is long enough for a prompt of {length} tokens: "
                "lower --input-max, or give longer files"
            )
        as_text = args.write == "prompt"
        yield {"prompt": tokenizer.decode(ids)} if as_text else {"input_ids": list(ids)}


def _line_starts(text: str) -> list[int]:
    """Where lines begin that are not empty."""
    starts, position = [], 0
    for line in text.splitlines(keepends=True):
        if line.strip():
            starts.append(position)
        position += len(line)
    return starts


def _encode_enough(tokenizer: Tokenizer, text: str, length: int) -> Sequence[int]:
    """The first `length` tokens of a text, or all if it has fewer, without encoding all of it."""
    size = 8 * length
    while True:
        # The last tokens of a piece may be others than in the whole text.
        ids = tokenizer.encode(text[:size], add_special_tokens=False)
        if len(ids) > length + 8 or size >= len(text):
            return ids[:length]
        size *= 2


def _files(paths: Sequence[str]) -> list[Path]:
    files: list[Path] = []
    for name in paths:
        path = Path(name)
        files += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return files


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"--text {path} cannot be read as UTF-8 text: {error}") from error


def _tokenizer(folder: str) -> Tokenizer:
    from jaxinfer.tokenizer import Tokenizer

    demo = Path(__file__).parents[1] / "demo" / "model"
    return Tokenizer.from_folder(demo if folder == "demo" else folder)
