"""From a prompt and its parameters to requests that are known to be servable.  Imports no jax."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxinfer.config import ModelConfig
from jaxinfer.errors import RequestError
from jaxinfer.request import (
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_STOP_TOKEN_IDS,
    Request,
    SamplingParams,
    is_whole,
)
from jaxinfer.scheduler import Limits
from jaxinfer.tokenizer import Tokenizer


def prompt_token_ids(
    prompt: str | Sequence[int], model: ModelConfig, tokenizer: Tokenizer | None
) -> np.ndarray:
    """Token ids of a prompt, int32; raises `RequestError` if it has none or unknown ones."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise RequestError(
                "prompt is a string, but skip_tokenizer_init=True: pass a list of token ids"
            )
        ids = tokenizer.encode(prompt)
    else:
        listed = isinstance(prompt, Iterable) and not isinstance(prompt, bytes)
        ids = list(prompt) if listed else []
        if not listed or not all(map(is_whole, ids)):
            raise RequestError("prompt must be a string or a list of whole numbers (token ids)")
    if not ids:
        raise RequestError("prompt is empty: it must have at least one token")
    worst = max(ids, key=lambda token: token if token >= 0 else model.vocab_size - token)
    if not 0 <= worst < model.vocab_size:
        raise RequestError(
            f"prompt has token id {worst}; the vocabulary is 0 … {model.vocab_size - 1}"
        )
    return np.asarray(ids, np.int32)


def make_requests(
    prompt: str | Sequence[int],
    params: SamplingParams,
    model: ModelConfig,
    limits: Limits,
    page_capacity: int,
    tokenizer: Tokenizer | None,
    *,
    request_id: str,
    seed: int,
    priority: int = 0,
    scored: bool = False,
) -> list[Request]:
    """The `n` requests of one prompt.

    scored: only the prompt's log-probabilities are wanted, so it may fill max_seq_len to the end.
    Raises `RequestError` naming the field at fault and the limit that it exceeds.
    """
    ids = prompt_token_ids(prompt, model, tokenizer)
    longest = limits.max_seq_len if scored else limits.max_seq_len - 1
    if len(ids) > longest:
        raise RequestError(
            f"prompt has {len(ids)} tokens; at most {longest} fit into max_seq_len="
            f"{limits.max_seq_len} with room for output: shorten it or raise max_seq_len"
        )
    wanted = limits.max_seq_len if params.max_tokens is None else len(ids) + params.max_tokens
    limit = min(wanted, max(limits.max_seq_len, len(ids) + 1))
    pages = -(-max(limit - 1, len(ids)) // limits.page_size)
    if pages > page_capacity:
        raise RequestError(
            f"prompt and max_tokens need {pages} pages of the KV cache, which has {page_capacity}: "
            "lower max_tokens or raise num_pages"
        )
    _check_strings(params, tokenizer)
    # Some checkpoints name what ends a text in the tokenizer's files only.
    ends = model.eos_token_ids or (tokenizer.eos_token_ids if tokenizer else ())
    eos = () if params.ignore_eos else ends
    stop_ids = tuple(dict.fromkeys((*eos, *params.stop_token_ids)))
    if len(stop_ids) > 2 * MAX_STOP_TOKEN_IDS:
        raise RequestError(f"more than {2 * MAX_STOP_TOKEN_IDS} stop tokens with end-of-sequence")
    bad_words = _bad_words(params, tokenizer)
    for name, tokens in {
        "logit_bias": params.logit_bias or (),
        "stop_token_ids": params.stop_token_ids,
        "bad_words_token_ids": [token for word in bad_words for token in word],
    }.items():
        for token in tokens:
            if not 0 <= token < model.vocab_size:
                raise RequestError(
                    f"SamplingParams.{name} has token id {token}; the vocabulary is "
                    f"0 … {model.vocab_size - 1}"
                )
    wants_text = bool(params.stop) and params.detokenize and tokenizer is not None
    return [
        Request(
            request_id=request_id,
            index=index,
            prompt_token_ids=ids,
            params=params,
            seed=seed,
            limit=limit,
            stop_ids=stop_ids,
            bad_words=bad_words,
            select_from=0 if params.prompt_logprobs is not None and index == 0 else len(ids) - 1,
            watched=wants_text or params.logprobs is not None or params.prompt_logprobs is not None,
            priority=priority,
        )
        for index in range(params.n)
    ]


def check_types(params: Any, priority: Any, request_id: Any) -> None:
    """Raise `RequestError` for what is not even of the type that a caller must pass."""
    if not isinstance(params, SamplingParams):
        raise RequestError(f"sampling_params must be a SamplingParams, got {params!r}")
    if not is_whole(priority):  # requests are compared by it: one of another kind stops them all
        raise RequestError(f"priority must be a whole number, got {priority!r}")
    if not isinstance(request_id, str | None):
        raise RequestError(f"request_id must be a string, got {request_id!r}")


def _check_strings(params: SamplingParams, tokenizer: Tokenizer | None) -> None:
    """Stop strings and bad words are text, which takes a tokenizer to see."""
    if tokenizer is None:
        for name in ("stop", "bad_words"):
            if getattr(params, name):
                raise RequestError(
                    f"SamplingParams.{name} needs a tokenizer, but skip_tokenizer_init=True: use "
                    "stop_token_ids or bad_words_token_ids"
                )
    if params.stop and not params.detokenize:
        raise RequestError("SamplingParams.stop needs detokenize=True: it is matched in the text")


def _bad_words(params: SamplingParams, tokenizer: Tokenizer | None) -> tuple[tuple[int, ...], ...]:
    """Bad words as token ids: each string at the start of a text, and as it follows a space."""
    words = [tuple(map(int, word)) for word in params.bad_words_token_ids]
    for text in params.bad_words:
        assert tokenizer is not None
        bare = text.lstrip()
        for variant in (bare, " " + bare) if bare else (text,):
            ids = tuple(tokenizer.encode(variant, add_special_tokens=False))
            if ids:
                words.append(ids)
    words = list(dict.fromkeys(words))
    too_long = max((len(word) for word in words), default=0)
    if too_long > MAX_BAD_WORD_TOKENS or len(words) > MAX_BAD_WORDS:
        raise RequestError(
            f"SamplingParams.bad_words: at most {MAX_BAD_WORDS} spellings of at most "
            f"{MAX_BAD_WORD_TOKENS} tokens, got {len(words)} of up to {too_long}"
        )
    return tuple(words)
