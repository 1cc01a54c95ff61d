"""The demo models' data: the source of Python's standard library, and a tokenizer trained on it."""

import hashlib
import json
import platform
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SEPARATOR = "<|endoftext|>"  # precedes every document; both BOS and EOS
VOCAB_SIZE = 4096
# Third-party code, character tables, generated text, and test data that is not meant to be Python.
SKIPPED = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "data"}
# No token reaches across two pieces. Spaces go with what follows them, as in other tokenizers, but
# an indentation goes with the line end before it: it is one token, and the line starts afresh.
PIECES = (
    r"[ \t]*(?:\r?\n[ \t]*)+"  # line ends and the indentation after them
    r"|[ .]?[\p{L}_]+"  # names and words
    r"| ?\p{N}{1,3}"  # digits
    r"| ?[^\s\p{L}\p{N}_]+"  # signs
    r"|\s+(?!\S)|\s+"  # other spaces
)


def collect(stdlib: Path) -> dict[str, str]:
    """The library's source files, path (relative, with slashes) -> text, in sorted order."""
    sources = {}
    for path in sorted(stdlib.rglob("*.py")):
        relative = path.relative_to(stdlib)
        if SKIPPED.isdisjoint(relative.parts):
            try:
                sources[relative.as_posix()] = path.read_bytes().decode("utf-8")
            except UnicodeDecodeError:  # a few tests are in other encodings on purpose
                continue
    return sources


def is_held_out(path: str) -> bool:
    """About 3 % of the files, chosen by a hash of the path: the same ones on every machine."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big") % 1000 < 30


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE: every text round-trips exactly, nothing is normalised, prepended or cut."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # every byte has a token
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def prepare(cache_dir: Path) -> None:
    """Write tokenizer.json, train.npy, held_out.npy (uint16 token ids) and facts.json."""
    sources = collect(Path(sysconfig.get_paths()["stdlib"]))
    splits: dict[str, list[str]] = {"train": [], "held_out": []}
    for path, text in sources.items():
        splits["held_out" if is_held_out(path) else "train"].append(text)
    tokenizer = train_tokenizer(splits["train"])
    separator = tokenizer.token_to_id(SEPARATOR)
    facts: dict[str, Any] = {"python": platform.python_version()}
    facts["tokenizers"] = tokenizers.__version__
    cache_dir.mkdir(parents=True, exist_ok=True)
    for split, texts in splits.items():
        ids = [[separator, *encoding.ids] for encoding in tokenizer.encode_batch(texts)]
        tokens = np.concatenate([np.array(document, np.uint16) for document in ids])
        np.save(cache_dir / f"{split}.npy", tokens)
        size = sum(len(text.encode()) for text in texts)
        facts[split] = {"files": len(texts), "bytes": size, "tokens": len(tokens)}
    tokenizer.save(str(cache_dir / "tokenizer.json"))
    (cache_dir / "facts.json").write_text(json.dumps(facts))  # last: it marks the cache complete
