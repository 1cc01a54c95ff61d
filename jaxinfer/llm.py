"""`LLM`: text in, text out.  Owns the weights, the state and the scheduler, and runs the loop."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

import jax
import numpy as np
from tqdm import tqdm

from jaxinfer import saving, shardings
from jaxinfer.asynchronous import AsyncRequest
from jaxinfer.batch import Buckets, idle, pack
from jaxinfer.config import EngineConfig
from jaxinfer.errors import EngineClosedError, RequestError
from jaxinfer.interrupts import interrupts_held
from jaxinfer.loading import load
from jaxinfer.output import Collector, TokenLogprobs
from jaxinfer.pages import Pages
from jaxinfer.request import CompletionOutput, Request, RequestOutput, SamplingParams
from jaxinfer.sampling import SamplingRows
from jaxinfer.scheduler import Plan, Scheduler
from jaxinfer.step import Results, Step
from jaxinfer.tokenizer import Tokenizer
from jaxinfer.validation import check_types, make_requests

Prompt = str | Sequence[int]


class LLM:
    """A loaded model that generates.

    model: a local folder in Hugging Face layout or made by `save`, "demo", the name of a preset in
        `configs/models` (with `load_format="dummy"`), or a hub id; tried in this order.
    engine: the fields of `EngineConfig`.

    Raises `ConfigError`, `CheckpointError`, `TokenizerError` or `InsufficientMemoryError`, each
    naming what is at fault.  Use it as a context manager, or call `close()`.
    """

    def __init__(self, model: str | Path, **engine: Any):
        self.engine_config = EngineConfig.from_dict(engine)
        loaded = load(model, self.engine_config)
        self.model_config, self.tokenizer = loaded.config, loaded.tokenizer
        self.limits, self.memory = loaded.sizes.limits, loaded.sizes.memory
        self.scheduler = Scheduler(
            self.limits,
            Pages(loaded.sizes.num_pages, self.limits.page_size),
            self.engine_config.scheduling_policy,
            self.engine_config.enable_prefix_caching,
        )
        whole = shardings.replicated(loaded.mesh)
        self._sampling = SamplingRows(
            self.limits.max_batch_size + 1, lambda array: jax.device_put(array, whole)
        )
        self.step = Step(
            self.model_config,
            loaded.mesh,
            self.limits,
            Buckets.for_limits(
                self.limits,
                loaded.mesh.devices.flat[0].platform,
                self.engine_config.deterministic,
            ),
            loaded.sizes.num_pages,
            loaded.dtype,
            loaded.cache_dtype,
            loaded.ops,
        )
        self._weights, self._tokenizer_folder = loaded.weights, loaded.tokenizer_folder
        self._state = self.step.initial_state()
        self.step.compile(self._weights, self._sampling.table())
        self._compile_seconds = self.step.compile_seconds
        self._lock = threading.RLock()
        self._closed: str | None = None  # why it cannot be used any more
        self._pending: tuple[Plan, Results | None] | None = None
        # Called with the plan of each step when its results are in; for measurements.
        self.observer: Callable[[Plan], None] | None = None
        self._live: dict[str, Collector] = {}
        self._done: list[Collector] = []  # finished, submitted for `run` to report
        self._arrivals = itertools.count()
        self._rng = np.random.default_rng(self.engine_config.seed)
        self._counts = dict.fromkeys(
            ("steps", "prompt_tokens", "generated_tokens", "scheduled_tokens", "padded_tokens"), 0
        )

    # -- the loop -----------------------------------------------------------------------------

    def _turn(self) -> Plan | None:
        """One turn of the loop, while there is work; returns the plan whose results came in.

        While the device runs a step, the host plans and dispatches the next, and only then reads
        the first one's tokens.  At most two steps are in flight.
        """
        scheduler = self.scheduler
        plan, done = scheduler.plan(), self._pending  # which tokens of which requests run now
        self._pending = None
        if plan:
            for request in plan.admitted:
                self._admit(request)
            batch = pack(plan, self.step.buckets, self.limits, self._sampling)
            self._state, results = self.step(self._weights, self._state, batch)
            self._pending = plan, results
            self._count(plan, batch.num_tokens)
        if not self.engine_config.overlap and self._pending:
            done, self._pending = self._pending, None
        if done:
            self._commit(*done)
        return done[0] if done else None

    def _admit(self, request: Request) -> None:
        """Place what the device must know of a request that got a slot."""
        self._sampling.set(request.slot, request)
        self._state = self.step.admit(self._state, request.slot, request.known_token_ids)

    def _commit(self, plan: Plan, results: Results | None) -> None:
        """Read a step's tokens and hand them to the scheduler and to their collectors."""
        sampled = results.read() if results else None
        count = len(plan.selected_B)
        tokens_B = sampled.tokens_B[:count] if sampled else np.zeros(0, np.int32)
        commit = self.scheduler.commit(plan, tokens_B)
        for request in commit.first:
            self._live[request.request_id].note_first_token(request)
        logprobs = None
        if sampled and any(_wants_logprobs(request.params) for request, _ in commit.news):
            logprobs = TokenLogprobs(
                sampled.logprobs_B, sampled.ranks_B, sampled.top_ids_BC, sampled.top_logprobs_BC
            )
        for request, entry in commit.news:
            scored = bool(plan.targets_B[entry] >= 0)
            collector = self._live[request.request_id]
            stop = collector.accept(request, int(tokens_B[entry]), scored, logprobs, entry)
            if stop is not None:
                if request.finish_reason is None:
                    commit.finished.append(request)
                    self.scheduler.finish(request, "stop", stop)
                request.finish_reason, request.stop_reason = "stop", stop
        for request in commit.finished:
            self._finish(request)

    def _finish(self, request: Request) -> None:
        collector = self._live[request.request_id]
        collector.finish(request)
        self._counts["generated_tokens"] += len(request.token_ids)
        if collector.output.finished:
            del self._live[request.request_id]
            if collector.reported:
                self._done.append(collector)

    def _advance(self) -> None:
        """Run one turn for whoever pulls; a failure on the device ends all requests."""
        with self._lock, interrupts_held():
            with self._device():
                plan = self._turn()
            if plan and self.observer is not None:
                self.observer(plan)

    @contextmanager
    def _device(self) -> Iterator[None]:
        """For work on the device's state: it is given away, so whatever fails takes it along."""
        self._check_open()
        try:
            yield
        except Exception as error:
            self._closed = f"a step failed: {error}"
            raise EngineClosedError(
                f"a step failed on the device, and its state is gone with it: {error}"
            ) from error

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError(f"this LLM cannot be used any more: {self._closed}")

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._pending is not None

    # -- requests -----------------------------------------------------------------------------

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        request_id: str | None = None,
        streaming: bool = False,
    ) -> str:
        """Queue one prompt and return its id; `run` works on it and yields its output.

        priority: lower numbers go first.
        streaming: make its text token by token, as for `stream`, though only the whole is yielded.
        Raises `RequestError` if the prompt or its parameters cannot be served.
        """
        collector = self._submit(
            prompt, params, priority=priority, request_id=request_id, streamed=streaming
        )
        collector.reported = True
        return collector.output.request_id

    def run(self) -> Iterator[RequestOutput]:
        """Work until nothing is left; yields the output of each submitted prompt as it finishes."""
        while True:
            yield from self._take_done()
            if not self.has_work:
                return
            self._advance()

    def turn(self) -> list[RequestOutput]:
        """One turn of `run`, for callers with a loop of their own: the outputs that are finished.

        Call it while `has_work`.
        """
        self._advance()
        return self._take_done()

    def _take_done(self) -> list[RequestOutput]:
        with self._lock:
            done, self._done = self._done, []
            return [collector.output for collector in done]

    def cancel(self, request_id: str) -> bool:
        """End a request with finish_reason "cancelled"; False if it is not running or waiting."""
        with self._lock:
            collector = self._live.get(request_id)
            if collector is None:
                return False
            for request in collector.requests:
                if request.finish_reason is None:
                    self.scheduler.finish(request, "cancelled")
                    self._finish(request)
            return True

    def _submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        *,
        priority: int = 0,
        request_id: str | None = None,
        streamed: bool = False,
        scored: bool = False,
    ) -> Collector:
        with self._lock:
            self._check_open()
            params = SamplingParams() if params is None else params
            check_types(params, priority, request_id)
            if request_id is None:
                request_id = self._new_id()
            elif request_id in self._live:
                raise RequestError(f"request_id {request_id!r} is already in use")
            seed = int(self._rng.integers(2**63)) if params.seed is None else params.seed
            requests = make_requests(
                prompt, params, self.model_config, self.limits, self.scheduler.pages.capacity,
                self.tokenizer, request_id=request_id, seed=seed, priority=priority, scored=scored,
            )  # fmt: skip
            ids = requests[0].prompt_token_ids.tolist()
            text = prompt if isinstance(prompt, str) else None
            output = RequestOutput(request_id, text, ids, [], finished=False)
            output.metrics.arrival_time = time.monotonic()
            collector = Collector(output, params, requests, self.tokenizer)
            self._live[request_id] = collector
            for request in requests:
                request.arrival = next(self._arrivals)
                request.watched |= streamed
                self.scheduler.add(request)
            self._counts["prompt_tokens"] += len(ids)
            return collector

    def _new_id(self) -> str:
        """An id for a request that brings none; callers may have taken any."""
        ids = (f"request-{number}" for number in self._arrivals)
        return next(name for name in ids if name not in self._live)

    def _finish_all(self, collectors: list[Collector], progress: bool) -> None:
        """Work until these are finished; whatever stops that before its time cancels them."""
        try:
            with tqdm(
                total=len(collectors), desc="generating", unit="prompt", disable=not progress
            ) as bar:
                while (left := sum(not c.output.finished for c in collectors)) > 0:
                    bar.update(len(collectors) - left - bar.n)
                    self._advance()
                bar.update(len(collectors) - bar.n)
        finally:
            self._cancel_all(collectors)

    def _cancel_all(self, collectors: list[Collector]) -> None:
        for collector in collectors:
            if not collector.output.finished:
                self.cancel(collector.output.request_id)

    def _generate_list(
        self,
        prompts: Sequence[Prompt | RequestError],
        sampling_params: Any,
        priority: Any,
        use_tqdm: bool | None,
        **options: Any,
    ) -> list[RequestOutput]:
        """One output a prompt, in order; a bad prompt's output carries its error.

        A prompt may be the error that was met in making it.  The others are as in `generate`.
        """
        params = _per_prompt("sampling_params", sampling_params, prompts)
        ranks = _per_prompt("priority", priority, prompts)
        progress = len(prompts) > 16 if use_tqdm is None else use_tqdm
        outputs: list[RequestOutput] = []
        collectors = []
        try:
            for prompt, param, rank in zip(prompts, params, ranks, strict=True):
                with interrupts_held():
                    try:
                        if isinstance(prompt, RequestError):
                            raise prompt
                        collector = self._submit(prompt, param, priority=rank, **options)
                    except RequestError as error:
                        outputs.append(_error_output(self._new_id(), prompt, error))
                        continue
                    collectors.append(collector)
                    outputs.append(collector.output)
        except BaseException:  # an interrupt, say: nobody will ask for those queued so far
            self._cancel_all(collectors)
            raise
        self._finish_all(collectors, progress)
        return outputs

    # -- what callers use ---------------------------------------------------------------------

    def warm_up(self) -> None:
        """Run every program of a step once, on tokens that are nobody's.

        The first run of a program takes longer than the next: a fifth of a second on a CPU, whose
        libraries prepare each product then.  Call it before anything is timed.
        """
        for num_tokens in self.step.buckets.tokens:
            with self._lock, interrupts_held(), self._device():
                batch = idle(num_tokens, self.step.buckets, self.limits, self._sampling)
                self._state, _ = self.step(self._weights, self._state, batch)
                jax.block_until_ready(self._state)

    @overload
    def generate(
        self,
        prompts: str | list[int],
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        use_tqdm: bool | None = None,
    ) -> RequestOutput: ...

    @overload
    def generate(
        self,
        prompts: list[str] | list[list[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]: ...

    def generate(
        self,
        prompts: Any,
        sampling_params: Any = None,
        *,
        priority: Any = 0,
        use_tqdm: bool | None = None,
    ) -> Any:
        """Generate for one prompt or for a list of them, batched as the engine sees fit.

        prompts: a string, a list of token ids, or a list of either.
        sampling_params, priority: one for all, or one per prompt.
        use_tqdm: progress bar; None: for more than 16 prompts.

        Returns a `RequestOutput` for one prompt, else a list in the order of the prompts.  In a
        list a prompt that cannot be served gets an output with `error` set, and the others run.

        Raises `RequestError` if the one prompt is bad, or the lists differ in length.
        """
        if _is_one(prompts):
            collector = self._submit(prompts, sampling_params, priority=priority)
            self._finish_all([collector], bool(use_tqdm))
            return collector.output
        return self._generate_list(prompts, sampling_params, priority, use_tqdm)

    def chat(
        self,
        messages: Any,
        sampling_params: Any = None,
        *,
        priority: Any = 0,
        use_tqdm: bool | None = None,
        **template_options: Any,
    ) -> Any:
        """Generate the next message of one conversation, or of each in a list of them.

        messages: `[{"role": "user", "content": "…"}, …]`, or a list of such lists.
        template_options: for the template.  The other arguments and the results are as those of
        `generate`: in a list, a conversation that cannot be served gets an output with `error` set.

        Raises `TokenizerError` if the tokenizer has no chat template, `RequestError` if the one
        conversation is bad.
        """
        self._chat_tokenizer()
        if not isinstance(messages, (list, tuple)):
            raise RequestError(
                "messages must be a list of {'role': …, 'content': …}, or a list of such lists, "
                f"not {type(messages).__name__}"
            )
        if messages and isinstance(messages[0], dict):
            prompt = self.chat_prompt(messages, **template_options)
            return self.generate(prompt, sampling_params, priority=priority, use_tqdm=use_tqdm)
        prompts: list[Prompt | RequestError] = []
        for each in messages:
            try:
                prompts.append(self.chat_prompt(each, **template_options))
            except RequestError as error:
                prompts.append(error)
        return self._generate_list(prompts, sampling_params, priority, use_tqdm)

    def chat_prompt(self, messages: Sequence[dict[str, Any]], **template_options: Any) -> list[int]:
        """Token ids of a conversation, up to where the next message begins."""
        tokenizer = self._chat_tokenizer()
        text = tokenizer.apply_chat_template(messages, **template_options)
        # The template writes the special tokens itself.
        return tokenizer.encode(text, add_special_tokens=False)

    def _chat_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError("chat needs a tokenizer, but skip_tokenizer_init=True")
        return self.tokenizer

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        request_id: str | None = None,
    ) -> Generator[RequestOutput]:
        """Yield the output whenever it has grown: `text` so far and `text_diff` since the last one.

        Text is given out only when it is final: no part of a character, no part of a stop string.
        Several streams may be open; whichever is pulled drives all.  Closing one cancels its
        request.
        """
        collector = self._submit(
            prompt, sampling_params, priority=priority, request_id=request_id, streamed=True
        )

        def outputs() -> Generator[Any]:
            try:
                yield None  # taken below: closing a generator that has not begun runs nothing
                while True:
                    if not (collector.has_news or collector.output.finished):
                        self._advance()
                        continue
                    output = collector.take_news()
                    yield output
                    if output.finished:
                        return
            finally:
                self.cancel(collector.output.request_id)

        stream = outputs()
        next(stream)
        return stream

    def generate_async(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        request_id: str | None = None,
        streaming: bool = False,
    ) -> AsyncRequest:
        """Queue a prompt from an event loop: `await` it for the final output, or `async for` over
        it for the growing one (with streaming=True).  Cancelling the task cancels the request."""
        collector = self._submit(
            prompt,
            sampling_params,
            priority=priority,
            request_id=request_id,
            streamed=streaming,
        )
        return AsyncRequest(collector, self._advance, self.cancel)

    def score(self, prompts):
        """Log-probability of every token of a text or id list given those before it.

        Returns, for one prompt, a list with None for the first token; for a list, a list of lists.
        Raises `RequestError` for a bad prompt.
        """
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        one = _is_one(prompts)
        many = [prompts] if one else list(prompts)
        outputs = self._generate_list(many, params, 0, None, scored=True)
        scores = []
        for output in outputs:
            if output.error is not None:
                raise RequestError(output.error)
            assert output.prompt_logprobs is not None
            scores.append([
                None if found is None else found[token].logprob
                for token, found in zip(
                    output.prompt_token_ids, output.prompt_logprobs, strict=True
                )
            ])  # fmt: skip
        return scores[0] if one else scores

    # -- the engine's own affairs --------------------------------------------------------------

    def _count(self, plan: Plan, padded_to: int) -> None:
        self._counts["steps"] += 1
        self._counts["scheduled_tokens"] += plan.num_tokens
        self._counts["padded_tokens"] += padded_to - plan.num_tokens

    def stats(self) -> dict[str, Any]:
        """Counts since the start, the present load, and memory by component in bytes.

        They can be asked for after `close()`, too.
        """
        return {
            **self._counts,
            "running": self.scheduler.num_running,
            "waiting": self.scheduler.num_waiting,
            "preemptions": self.scheduler.num_preemptions,
            **self.scheduler.pages.stats(),
            "reused_pages": self.scheduler.num_reused_pages,
            "page_size": self.limits.page_size,
            "compile_seconds": self._compile_seconds,
            "memory_bytes": {
                "weights": self.memory.weights,
                "workspace": self.memory.workspace,
                "kv_cache": self.memory.kv_cache,
            },
        }

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Save weights, configuration and tokenizer as a folder that `LLM(path)` loads faster.

        The weights keep their present dtype.  overwrite: replace what an earlier `save` left there.
        Requests may run meanwhile.  Raises `CheckpointError` if `path` is not free, or cannot be
        written.
        """
        with self._lock:
            self._check_open()
            weights, folder = self._weights, self._tokenizer_folder
        data = saving.save(path, weights, self.model_config, folder, overwrite=overwrite)
        if folder is not None and not folder.is_dir():  # it was part of the model now replaced
            self._tokenizer_folder = data

    def close(self) -> None:
        """Cancel what is left and free the device memory.  The LLM cannot be used afterwards."""
        with self._lock:
            if self._closed is None:
                for request_id in list(self._live):
                    self.cancel(request_id)
            self._closed = self._closed or "close() was called"
            self._pending = None
            for name in ("_weights", "_state", "step", "_sampling"):
                self.__dict__.pop(name, None)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_one(prompts: Any) -> bool:
    """Whether `prompts` is a single prompt: a string or a flat list of token ids."""
    if isinstance(prompts, str):
        return True
    return len(prompts) > 0 and not isinstance(prompts[0], (str, list, tuple, np.ndarray))


def _per_prompt(name: str, value: Any, prompts: Sequence[Any]) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        return [value] * len(prompts)
    if len(value) != len(prompts):
        raise RequestError(f"{name} has {len(value)} entries for {len(prompts)} prompts")
    return list(value)


def _error_output(request_id: str, prompt: Any, error: RequestError) -> RequestOutput:
    text = prompt if isinstance(prompt, str) else None
    ids = list(prompt) if isinstance(prompt, (list, tuple, np.ndarray)) else []
    failed = CompletionOutput(index=0, finish_reason="error")
    return RequestOutput(request_id, text, ids, [failed], finished=True, error=str(error))


def _wants_logprobs(params: SamplingParams) -> bool:
    return params.logprobs is not None or params.prompt_logprobs is not None
