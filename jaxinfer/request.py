"""The life of one prompt, as data: what was asked, where it stands, what came out.  Imports no jax.

A caller's prompt becomes `SamplingParams.n` `Request`s, one a sample, which the scheduler treats
alike; the caller sees one `RequestOutput` with `n` `CompletionOutput`s.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from jaxinfer.config import field_names, reject_unknown
from jaxinfer.errors import RequestError

# The device keeps these per row in arrays of fixed width (see sampling.SamplingTable).
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300
MAX_STOP_TOKEN_IDS = 16
MAX_BAD_WORDS = 64
MAX_BAD_WORD_TOKENS = 8


def is_whole(value: Any) -> bool:
    """Whether this is a whole number, of Python or of NumPy; true and false are none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _entries(name: str, value: Any) -> tuple[Any, ...]:
    """The entries of a field that holds a list; None has none."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable | None):
        raise RequestError(f"SamplingParams.{name} must be a list, got {value!r}")
    return () if value is None else tuple(value)


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    ids = _entries(name, value)
    if not all(map(is_whole, ids)):
        raise RequestError(f"SamplingParams.{name} must hold token ids, got {value!r}")
    return tuple(map(int, ids))


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens.  Names and defaults as in vLLM.

    n: independent samples of the prompt; their texts are `outputs[0..n-1]`.
    temperature: 0 is greedy; otherwise logits are divided by it.
    top_k: keep the k most likely tokens (ties at the border included); 0 or -1: all.
    top_p: of what top_k left, keep the smallest set of likeliest tokens with this much probability.
    min_p: keep tokens with at least this fraction of the likeliest one's probability.
    repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or
        the output (arXiv:1909.05858); 1 is off.
    presence_penalty, frequency_penalty: subtracted from the logit of a token in the output, once or
        once per occurrence.
    logit_bias: token id → number added to its logit; at most 300 entries.
    bad_words: strings that must not appear; bad_words_token_ids: the same as token ids.
    seed: same seed, same tokens, whoever else is in the batch; None: one is drawn and returned.
    max_tokens: most tokens to generate; None: up to max_seq_len.
    min_tokens: no end-of-sequence or stop token before this many tokens.
    stop: the text ends before the first of these strings (include_stop_str_in_output: after it).
    stop_token_ids: generation ends with any of these tokens; ignore_eos: not at end-of-sequence.
    logprobs: log-probabilities of this many likeliest tokens beside the chosen one, at most 20,
        from the model's own distribution, before any of the options above.
    prompt_logprobs: the same for every prompt token (None for the first, which nothing predicts).
    detokenize: fill `text`; skip_special_tokens: leave special tokens out of it.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    bad_words: Sequence[str] = ()
    bad_words_token_ids: Sequence[Sequence[int]] = ()
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    include_stop_str_in_output: bool = False
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        for name in ("stop", "bad_words"):
            value = getattr(self, name)
            strings = (value,) if isinstance(value, str) else _entries(name, value)
            if not all(isinstance(s, str) and s for s in strings):
                raise RequestError(f"SamplingParams.{name} must hold non-empty strings")
            object.__setattr__(self, name, strings)
        stops = _token_ids("stop_token_ids", self.stop_token_ids)
        object.__setattr__(self, "stop_token_ids", stops)
        name = "bad_words_token_ids"
        words = tuple(_token_ids(name, word) for word in _entries(name, self.bad_words_token_ids))
        object.__setattr__(self, name, words)
        for name in ("include_stop_str_in_output", "ignore_eos", "detokenize",
                     "skip_special_tokens"):  # fmt: skip
            if not isinstance(getattr(self, name), bool):
                raise RequestError(
                    f"SamplingParams.{name} must be true or false, got {getattr(self, name)!r}"
                )
        self._check_ranges()
        self._check_widths()

    def _check_ranges(self) -> None:
        def check(name: str, low: float, high: float, *, whole: bool = False) -> None:
            value = getattr(self, name)
            kind = int if whole else (int, float)
            good = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
            if not (good and low <= value <= high):
                noun = "a whole number" if whole else "a number"
                raise RequestError(
                    f"SamplingParams.{name} must be {noun} from {low:g} to {high:g}, got {value!r}"
                )

        huge = float(2**31 - 1)
        check("n", 1, 256, whole=True)
        check("temperature", 0, 100)
        check("top_k", -1, huge, whole=True)
        check("top_p", 0, 1)
        check("min_p", 0, 1)
        check("repetition_penalty", 1e-3, 100)
        check("presence_penalty", -100, 100)
        check("frequency_penalty", -100, 100)
        check("min_tokens", 0, huge, whole=True)
        if self.top_p == 0:
            raise RequestError("SamplingParams.top_p must be above 0; for greedy set temperature=0")
        if self.max_tokens is not None:
            check("max_tokens", 1, huge, whole=True)
            if self.min_tokens > self.max_tokens:
                raise RequestError(
                    f"SamplingParams.min_tokens ({self.min_tokens}) must not exceed max_tokens "
                    f"({self.max_tokens})"
                )
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                check(name, 0, MAX_LOGPROBS, whole=True)
        if self.seed is not None:
            check("seed", 0, 2**64 - 1, whole=True)

    def _check_widths(self) -> None:
        bias = self.logit_bias
        if bias is not None and not (isinstance(bias, Mapping) and all(map(is_whole, bias))):
            raise RequestError(
                f"SamplingParams.logit_bias must map token ids to numbers, got {bias!r}"
            )
        widths = {
            "logit_bias": (len(self.logit_bias or ()), MAX_LOGIT_BIAS),
            "stop_token_ids": (len(self.stop_token_ids), MAX_STOP_TOKEN_IDS),
            "bad_words": (len(self.bad_words) + len(self.bad_words_token_ids), MAX_BAD_WORDS),
        }
        for name, (count, most) in widths.items():
            if count > most:
                raise RequestError(f"SamplingParams.{name} has {count} entries; at most {most}")
        for token, bias in (self.logit_bias or {}).items():
            if not isinstance(bias, (int, float)) or not -1e9 <= bias <= 1e9:
                raise RequestError(f"SamplingParams.logit_bias[{token}] must be a number: {bias!r}")
        for word in self.bad_words_token_ids:
            if not 1 <= len(word) <= MAX_BAD_WORD_TOKENS:
                raise RequestError(
                    "SamplingParams.bad_words_token_ids: a word must have 1 to "
                    f"{MAX_BAD_WORD_TOKENS} tokens, got {list(word)!r}"
                )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from a JSON object; raises `RequestError` for an unknown field."""
        reject_unknown("SamplingParams", values, field_names(cls), RequestError)
        bias = values.get("logit_bias")
        if bias is not None:  # JSON object keys are strings
            try:
                numbered = {int(token): value for token, value in bias.items()}
            except (AttributeError, TypeError, ValueError) as error:
                raise RequestError(
                    f"SamplingParams.logit_bias must map token ids to numbers: {error}"
                ) from error
            values = {**values, "logit_bias": numbered}
        return cls(**values)


@dataclass(frozen=True)
class Logprob:
    """A token's natural-log probability and its rank (1: the likeliest) at one position."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One sample so far.

    text_diff: what `text` gained since the last output of this stream.
    logprobs: per generated token, token id → `Logprob`, the chosen token included.
    cumulative_logprob: sum over the chosen tokens; None unless logprobs were asked for.
    finish_reason: None while running; "stop", "length", "cancelled" or "error".
    stop_reason: the stop string or stop token id that ended it; None for end-of-sequence.
    seed: reproduces this sample together with its `index`.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    text_diff: str = ""
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    seed: int | None = None


@dataclass
class RequestMetrics:
    """Moments of a request's life in seconds of `time.monotonic()`."""

    arrival_time: float = 0.0
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclass
class RequestOutput:
    """What a prompt has produced so far.

    error: why the request could not run; then `outputs` has one entry with finish_reason "error".
    num_cached_tokens: prompt tokens whose keys and values came from the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    error: str | None = None
    num_cached_tokens: int = 0
    metrics: RequestMetrics = field(default_factory=RequestMetrics)


@dataclass(eq=False, kw_only=True)
class Request:
    """One sample of one prompt: what the scheduler moves through the engine.

    limit: prompt plus output tokens at most.
    stop_ids: tokens that end it (end-of-sequence and the caller's).
    select_from: first position whose hidden state is wanted: the last prompt token's to generate, 0
        to score the prompt as well.
    watched: the host looks at every token (streams, stop strings, log-probabilities); of others it
        reads only the finished whole.
    """

    request_id: str
    index: int = 0
    prompt_token_ids: np.ndarray
    params: SamplingParams
    seed: int
    limit: int
    stop_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    select_from: int
    watched: bool = False
    priority: int = 0
    arrival: int = 0

    slot: int = -1
    digests: list[bytes] = field(default_factory=list)
    num_cached_tokens: int | None = None
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def prompt_len(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def known_token_ids(self) -> np.ndarray:
        """Prompt and output so far, int32: what is computed anew after a preemption."""
        if not self.token_ids:
            return self.prompt_token_ids
        return np.concatenate([self.prompt_token_ids, np.asarray(self.token_ids, np.int32)])
