"""From committed tokens to what the caller sees: text, log-probabilities, finish reasons."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import numpy as np

from jaxinfer.request import (
    CompletionOutput,
    Logprob,
    Request,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
)
from jaxinfer.stop import StopStrings
from jaxinfer.tokenizer import IncrementalDecoder, Tokenizer


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities of a step on the host; one entry per selected position."""

    logprobs_B: np.ndarray
    ranks_B: np.ndarray
    top_ids_BC: np.ndarray
    top_logprobs_BC: np.ndarray


class Collector:
    """Builds one caller's `RequestOutput` from the samples that the engine runs for it.

    Whoever runs the engine adds to it, and the reader of a stream takes from it, in a thread of its
    own perhaps: what is taken is of one moment.
    """

    def __init__(
        self,
        output: RequestOutput,
        params: SamplingParams,
        requests: list[Request],
        tokenizer: Tokenizer | None,
    ):
        self.output = output
        self.params = params
        self.requests = requests
        self.has_news = False
        self.reported = False  # whether `LLM.run` yields it
        self._tokenizer = tokenizer if params.detokenize else None
        self._samples = [_Sample(request, params, self._tokenizer) for request in requests]
        self._unfinished = len(requests)
        self._lock = threading.Lock()
        output.outputs = [sample.output for sample in self._samples]
        if params.prompt_logprobs is not None:
            output.prompt_logprobs = [None]

    def accept(
        self, request: Request, token: int, scored: bool, logprobs: TokenLogprobs | None, entry: int
    ) -> str | None:
        """Take one token of a watched sample; returns the stop string that it completes, if any.

        scored: the token stands in the prompt; only its log-probability is new.
        """
        if scored:
            if self.output.prompt_logprobs is not None and logprobs and request.index == 0:
                count = self.params.prompt_logprobs or 0
                self.output.prompt_logprobs.append(self._candidates(token, logprobs, entry, count))
            return None
        sample = self._samples[request.index]
        with self._lock:
            self.has_news = True
            sample.output.token_ids.append(token)
            if self.params.logprobs is not None and logprobs is not None:
                candidates = self._candidates(token, logprobs, entry, self.params.logprobs)
                sample.add_logprobs(candidates, candidates[token].logprob)
            return sample.push(token)

    def finish(self, request: Request) -> None:
        """A sample has ended: complete its output."""
        with self._lock:
            self.has_news = True
            self._samples[request.index].finish()
            self._unfinished -= 1
            if self._unfinished == 0:
                self.output.finished = True
                self.output.metrics.finished_time = time.monotonic()

    def take_news(self) -> RequestOutput:
        """The output so far, `text_diff` being what is new since the last call; it stays as is."""
        with self._lock:
            self.has_news = False
            for sample in self._samples:
                sample.mark_diff()
            return self.snapshot()

    def snapshot(self) -> RequestOutput:
        """A copy that later tokens do not change."""
        if self.output.finished:
            return self.output

        def copy(values: list | None) -> list | None:
            return None if values is None else list(values)

        outputs = [
            CompletionOutput(
                **{**vars(out), "token_ids": list(out.token_ids), "logprobs": copy(out.logprobs)}
            )
            for out in self.output.outputs
        ]
        changed = {
            "outputs": outputs,
            "metrics": RequestMetrics(**vars(self.output.metrics)),
            "prompt_logprobs": copy(self.output.prompt_logprobs),
        }
        return RequestOutput(**{**vars(self.output), **changed})

    def note_first_token(self, request: Request) -> None:
        """The first token of a sample is there; of several samples the earliest one's counts."""
        if self.output.metrics.first_token_time is None:
            self.output.metrics.first_token_time = time.monotonic()
            self.output.num_cached_tokens = request.num_cached_tokens or 0

    def _candidates(
        self, token: int, logprobs: TokenLogprobs, entry: int, count: int
    ) -> dict[int, Logprob]:
        """The chosen token and the `count` likeliest ones at this position."""

        def text(token: int) -> str | None:
            return self._tokenizer.token_text(token) if self._tokenizer else None

        chosen = Logprob(
            float(logprobs.logprobs_B[entry]), int(logprobs.ranks_B[entry]), text(token)
        )
        found = {token: chosen}
        for rank in range(count):
            other = int(logprobs.top_ids_BC[entry, rank])
            value = float(logprobs.top_logprobs_BC[entry, rank])
            found.setdefault(other, Logprob(value, rank + 1, text(other)))
        return found


class _Sample:
    """One `CompletionOutput` as it grows."""

    def __init__(self, request: Request, params: SamplingParams, tokenizer: Tokenizer | None):
        self.request = request
        self.output = CompletionOutput(index=request.index, seed=request.seed)
        if params.logprobs is not None:
            self.output.logprobs, self.output.cumulative_logprob = [], 0.0
        self._has_stop = bool(params.stop)
        self._include_stop = params.include_stop_str_in_output
        self._told = 0  # characters of `text` that a stream has been given
        self._decoder = self._stop = None
        if tokenizer is not None:
            self._decoder = IncrementalDecoder(
                tokenizer, request.prompt_token_ids.tolist(), params.skip_special_tokens
            )
            self._stop = StopStrings(tuple(params.stop), params.include_stop_str_in_output)

    def add_logprobs(self, candidates: dict[int, Logprob], chosen: float) -> None:
        assert self.output.logprobs is not None
        assert self.output.cumulative_logprob is not None
        self.output.logprobs.append(candidates)
        self.output.cumulative_logprob += chosen

    def push(self, token: int) -> str | None:
        """Add a token's text; returns the stop string that it completes, if any."""
        if self._decoder is None or self._stop is None or self._is_silent_stop():
            return None
        text = self._decoder.push([token])
        pending = self._decoder.pending if self._has_stop else ""
        text, stopped = self._stop.push(text, pending)
        self.output.text += text
        return stopped

    def finish(self) -> None:
        request, output = self.request, self.output
        output.finish_reason, output.stop_reason = request.finish_reason, request.stop_reason
        by_string = isinstance(request.stop_reason, str)
        if not request.watched:
            output.token_ids = request.token_ids
            if self._decoder is not None:
                silent = self._is_silent_stop()
                shown = request.token_ids[:-1] if silent else request.token_ids
                output.text = self._decoder.push(shown)
        if self._decoder is not None and self._stop is not None and not by_string:
            text, stopped = self._stop.push(self._decoder.flush())
            output.text += text + ("" if stopped else self._stop.flush())
            if stopped:
                output.finish_reason, output.stop_reason = "stop", stopped

    def _is_silent_stop(self) -> bool:
        """Whether the newest token is a stop token, whose text is not part of the output."""
        return self.request.finish_reason == "stop" and not self._include_stop

    def mark_diff(self) -> None:
        self.output.text_diff = self.output.text[self._told :]
        self._told = len(self.output.text)
