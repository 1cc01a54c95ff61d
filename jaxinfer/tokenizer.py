"""Text to token ids and back: encode, chat template, incremental decode.

A thin layer over Hugging Face `tokenizers`.  Imports no jax and no transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import tokenizers

from jaxinfer.chat_template import ChatTemplates
from jaxinfer.errors import RequestError, TokenizerError

# What stands for bytes that are no character: the last of them may yet become one.
REPLACEMENT = "\ufffd"
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# A character has four bytes at most, so three at most are unfinished; a token has one or more.
UNFINISHED = 3
SPECIAL_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# Vocabularies of other formats, to say what is there when tokenizer.json is not.
OTHER_FORMATS = ("tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")


class Tokenizer:
    """The tokenizer of a model folder.

    vocab_size: number of tokens that have a text; a model may have more.
    bos_token_id: the token that begins a text, or None.
    eos_token_ids: the tokens that end a text, of tokenizer_config.json and generation_config.json.
    special_tokens: name ("bos_token") → text, as the chat template sees them.
    falls_back_to_bytes: unknown characters are runs of byte tokens (`<0xF0>`), as in SentencePiece.

    `clean_up_tokenization_spaces` is not applied: it would change " ." in generated text.
    """

    def __init__(
        self,
        raw: tokenizers.Tokenizer,
        special_tokens: dict[str, str],
        chat_templates: ChatTemplates,
        more_eos_token_ids: Sequence[int] = (),
    ):
        self.special_tokens = special_tokens
        raw.no_truncation()
        raw.no_padding()
        self._raw = raw
        self._chat_templates = chat_templates
        self._texts: dict[int, str] = {}
        self.vocab_size: int = raw.get_vocab_size()
        self.bos_token_id = self._id_of("bos_token")
        own = self._id_of("eos_token")
        ends = [*([] if own is None else [own]), *more_eos_token_ids]
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys(ends))
        added = raw.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        decoder = raw.decoder.__getstate__() if raw.decoder is not None else b""
        self.falls_back_to_bytes = b'"ByteFallback"' in decoder

    @classmethod
    def from_folder(cls, path: str | Path) -> Self:
        """Read tokenizer.json and what stands beside it; raises `TokenizerError`."""
        folder = Path(path)
        config_path = folder / "tokenizer_config.json"
        config = _read_json(config_path)
        added = _added_tokens(config_path, config.get("added_tokens_decoder"))
        raw = _read_tokenizer(folder)
        special = _special_tokens({**_read_json(folder / "special_tokens_map.json"), **config})
        _add_missing(raw, special, added)
        path = folder / "generation_config.json"
        ends = _read_json(path).get("eos_token_id")
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        if not all(type(end) is int for end in ends):
            raise TokenizerError(
                f"{path}: eos_token_id must be a token id or a list of them, got {ends!r}: get the "
                "file anew"
            )
        return cls(raw, special, _chat_templates(folder, config), ends)

    def _id_of(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self._raw.token_to_id(text)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; special tokens that stand in the text are recognised.

        Raises `RequestError` for a string that is no text (half of a surrogate pair).
        """
        try:
            return self._raw.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:
            raise RequestError(
                "text to encode must be a string without lone surrogates (\\ud800 … \\udfff)"
            ) from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are no character become U+FFFD, unknown ids nothing."""
        return self._raw.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_text(self, token: int) -> str:
        """The text of one token as it reads inside a text, its leading space included."""
        text = self._texts.get(token)
        if text is None:
            anchored = self.decode([*self._anchor, token], skip_special_tokens=False)
            text = anchored[len(self.decode(self._anchor, skip_special_tokens=False)) :]
            self._texts[token] = text
        return text

    @cached_property
    def _anchor(self) -> list[int]:
        """Tokens to stand in front, where decoders strip a space."""
        return self.encode("a", add_special_tokens=False)[-1:]

    def is_silent(self, token: int, skip_special_tokens: bool) -> bool:
        """Whether a token adds nothing to a text: special and to be skipped, unknown or empty."""
        if skip_special_tokens and token in self._special_ids:
            return True
        return not self._raw.id_to_token(token)

    def is_byte(self, token: int) -> bool:
        """Whether a token is a byte of a run that only together becomes characters."""
        if not self.falls_back_to_bytes:
            return False
        return BYTE_TOKEN.fullmatch(self._raw.id_to_token(token) or "") is not None

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool = True,
        **options: Any,
    ) -> str:
        """The text of a conversation, with the special tokens in it; see `ChatTemplates.render`."""
        return self._chat_templates.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            **{**self.special_tokens, **options},
        )

    def check_chat_template(self) -> None:
        """Raise `TokenizerError` if there is no chat template, or it is broken."""
        self._chat_templates.check()


class IncrementalDecoder:
    """The text of tokens that arrive one by one; what was given out is never taken back.

    All that comes out, joined, is the text of prompt and tokens decoded together, less what that
    has in common with the prompt's own text (so a character cut by the prompt's end comes whole).

    Held back are the bytes of an unfinished character, and with byte-fallback tokenizers a run of
    byte tokens until it ends, since one bad byte makes U+FFFD of the whole run.  The work per token
    does not grow with the text: what is final leaves the window, but for a token that stays in
    front because decoders treat the first one differently (they strip its space).
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._run = 0  # byte tokens that the window ends with
        self._window: list[int] = []
        for token in reversed(prompt_ids):
            if tokenizer.is_silent(token, skip_special_tokens):
                continue
            if self._run == len(self._window) and tokenizer.is_byte(token):
                self._run += 1
            self._window.append(token)
            if len(self._window) > max(self._run, UNFINISHED):
                break
        self._window.reverse()
        self._told = self._text(self._window)  # of the window's text, what the reader has

    def push(self, ids: Sequence[int]) -> str:
        """Take tokens; returns the text that became final, "" within a character."""
        fresh = [token for token in ids if not self._tokenizer.is_silent(token, self._skip)]
        run = 0
        while run < len(fresh) and self._tokenizer.is_byte(fresh[-1 - run]):
            run += 1
        self._window += fresh
        if run == len(fresh):  # nothing new, or the run goes on and all before it is out
            self._run += run
            return ""
        self._run = run
        settled, held = self._window[: len(self._window) - run], fresh[len(fresh) - run :]
        text = self._text(settled)
        unfinished = text.endswith(REPLACEMENT) and not self._tokenizer.falls_back_to_bytes
        new = self._tell(text[:-1] if unfinished else text)
        if unfinished and len(settled) <= 2 * UNFINISHED:
            return new
        anchor = settled[-(UNFINISHED + 1) :] if unfinished else settled[-1:]
        self._window = anchor + held
        self._told = self._text(anchor)
        if unfinished:
            self._told = self._told[:-1]
        return new

    @property
    def pending(self) -> str:
        """What `flush` would give if the tokens ended here."""
        return self._untold(self._text(self._window))

    def flush(self) -> str:
        """The rest, when no more tokens come."""
        return self._tell(self._text(self._window))

    def _tell(self, text: str) -> str:
        new = self._untold(text)
        if new:
            self._told = text
        return new

    def _untold(self, text: str) -> str:
        if text.startswith(self._told):
            return text[len(self._told) :]
        pairs = enumerate(zip(text, self._told, strict=False))
        return text[next((i for i, (new, old) in pairs if new != old), len(text)) :]

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, self._skip)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(_read_text(path))
    except ValueError as error:
        raise TokenizerError(f"{path} is no valid JSON, get it anew: {error}") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} must hold a JSON object")
    return content


def _read_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        others = [name for name in OTHER_FORMATS if (folder / name).is_file()]
        remedy = "get it from where the model is from, or name another folder with tokenizer="
        if others:
            remedy = (
                f"there is only {', '.join(others)}; convert it once with transformers: "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        elif not folder.is_dir():
            remedy = "there is no such folder"
        raise TokenizerError(f"{path} is missing: {remedy}")
    try:
        return tokenizers.Tokenizer.from_str(_read_text(path))
    except TokenizerError:
        raise
    except Exception as error:  # all that the library raises
        raise TokenizerError(
            f"{path} cannot be read, get it anew or update `tokenizers`: {error}"
        ) from error


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """ "bos_token" and so on → text; in the files a token is a string or an object."""
    tokens = {}
    for name in SPECIAL_NAMES:
        token = config.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            tokens[f"{name}_token"] = token
    return tokens


def _chat_templates(folder: Path, config: dict[str, Any]) -> ChatTemplates:
    """The templates by name: of chat_template.jinja, else of tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    templates = _read_text(path) if path.is_file() else config.get("chat_template") or {}
    if isinstance(templates, str):
        templates = {"default": templates}
    elif isinstance(templates, list) and all(isinstance(each, dict) for each in templates):
        templates = {each.get("name"): each.get("template") for each in templates}
    if not isinstance(templates, dict) or not all(
        isinstance(text, str) for pair in templates.items() for text in pair
    ):
        raise TokenizerError(
            f"{folder / 'tokenizer_config.json'}: chat_template must be a text, or a list of "
            'objects with "name" and "template": get the file anew'
        )
    return ChatTemplates(templates, str(folder))


def _added_tokens(path: Path, listed: Any) -> dict[int, tokenizers.AddedToken]:
    """The field added_tokens_decoder of tokenizer_config.json: tokens by id, in their order."""
    field, remedy = f"{path}: added_tokens_decoder", "get the file anew"
    if listed is None:
        return {}
    if not isinstance(listed, dict):
        kind = type(listed).__name__
        raise TokenizerError(f"{field} must be an object of ids and tokens, not {kind}: {remedy}")
    tokens = {}
    for number, fields in listed.items():
        if not number.isdecimal():
            raise TokenizerError(f"{field} has {number!r} where an id should be: {remedy}")
        text = fields.get("content") if isinstance(fields, dict) else None
        if not isinstance(text, str):
            raise TokenizerError(
                f'{field}["{number}"] must be an object whose "content" is a text: {remedy}'
            )
        flags = {name: fields[name] for name in TOKEN_FLAGS if name in fields}
        try:
            tokens[int(number)] = tokenizers.AddedToken(text, **flags)
        except (TypeError, ValueError) as error:
            raise TokenizerError(f'{field}["{number}"] is no token, {remedy}: {error}') from error
    return dict(sorted(tokens.items()))


def _add_missing(
    raw: tokenizers.Tokenizer, special: dict[str, str], listed: dict[int, tokenizers.AddedToken]
) -> None:
    """Add the tokens that only tokenizer_config.json knows, and mark its special ones as such."""
    known = {token.content for token in raw.get_added_tokens_decoder().values()}
    for number, token in listed.items():
        text = token.content
        if text in known:
            continue
        raw.add_tokens([token])
        if raw.token_to_id(text) != number:
            raise TokenizerError(
                f"tokenizer_config.json gives {text!r} the id {number}, but tokenizer.json makes "
                f"it {raw.token_to_id(text)}: get both files anew, from one source"
            )
    for text in special.values():
        if text not in known and raw.token_to_id(text) is not None:
            raw.add_special_tokens([tokenizers.AddedToken(text, normalized=False)])
