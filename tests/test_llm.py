"""The Python API, on the shipped model: what users type, and what happens when they mistype."""

import asyncio
import json
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

import jaxinfer
from jaxinfer import LLM, EngineConfig, SamplingParams
from jaxinfer.errors import (
    CheckpointError,
    ConfigError,
    EngineClosedError,
    InsufficientMemoryError,
    RequestError,
    TokenizerError,
)

GREEDY = SamplingParams(temperature=0, max_tokens=12)
PROMPTS = ["import os\n", "def add(a, b):\n    return", "class Stack:\n"]


@pytest.fixture(scope="module")
def llm():
    with LLM("demo", max_batch_size=4, max_num_tokens=32, max_seq_len=256, seed=1) as llm:
        yield llm


def words(llm, output) -> str:
    """What the tokenizer makes of the prompt's and the output's tokens together."""
    ids = output.prompt_token_ids + output.outputs[0].token_ids
    return llm.tokenizer.decode(ids)


def test_one_prompt_gives_one_output_and_a_list_a_list(llm):
    one = llm.generate(PROMPTS[0], GREEDY)
    many = llm.generate(PROMPTS, GREEDY)
    assert one.outputs[0].text == many[0].outputs[0].text
    assert [out.prompt for out in many] == PROMPTS
    for out in many:
        assert out.finished
        assert out.error is None
        assert words(llm, out) == out.prompt + out.outputs[0].text
    ids = llm.tokenizer.encode(PROMPTS[0])
    assert llm.generate(ids, GREEDY).outputs[0].token_ids == one.outputs[0].token_ids
    assert llm.generate([], GREEDY) == []


def test_completions_are_python(llm):
    params = SamplingParams(temperature=0, max_tokens=24)
    text = llm.generate("import os\nimport sys\n\n\ndef main(", params).outputs[0].text
    assert "):" in text
    assert "\n    " in text


def test_parameters_and_priorities_per_prompt(llm):
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in (1, 5, 9)]
    outputs = llm.generate(PROMPTS, params, priority=[2, 0, 1])
    assert [len(out.outputs[0].token_ids) for out in outputs] == [1, 5, 9]
    with pytest.raises(RequestError, match="sampling_params has 2 entries for 3 prompts"):
        llm.generate(PROMPTS, params[:2])


def test_streams_grow_and_end_with_the_same_text(llm):
    whole = [llm.generate(prompt, GREEDY).outputs[0] for prompt in PROMPTS]
    streams = [llm.stream(prompt, GREEDY) for prompt in PROMPTS]
    texts = ["", "", ""]
    for _ in range(100):  # in turn, so that each pull drives them all
        for index, stream in enumerate(streams):
            for output in stream:
                texts[index] += output.outputs[0].text_diff
                assert output.outputs[0].text == texts[index]
                break
    assert texts == [out.text for out in whole]
    assert llm.scheduler.num_running == 0


def test_closing_a_stream_cancels_its_request(llm):
    stream = llm.stream(PROMPTS[0], SamplingParams(max_tokens=100, ignore_eos=True))
    next(stream)
    assert llm.scheduler.num_running == 1
    stream.close()
    llm.generate(PROMPTS[1], GREEDY)
    assert llm.stats()["running"] == 0
    assert llm.stats()["used_pages"] == 0


def test_a_stream_that_nobody_has_pulled_yet_can_be_closed(llm):
    llm.stream(PROMPTS[0], GREEDY).close()
    assert llm.stats()["waiting"] == 0


def test_streams_show_no_part_of_a_stop_string(llm):
    full = llm.generate(PROMPTS[1], SamplingParams(temperature=0, max_tokens=32)).outputs[0].text
    stop = full[4:9]
    params = SamplingParams(temperature=0, max_tokens=32, stop=[stop, "never to be seen"])
    seen = [output.outputs[0] for output in llm.stream(PROMPTS[1], params)]
    assert [out.text for out in seen if not full[:4].startswith(out.text)] == []
    last = seen[-1]
    assert (last.text, last.finish_reason, last.stop_reason) == (full[:4], "stop", stop)
    batch = llm.generate([PROMPTS[1]], params)[0].outputs[0]
    assert (batch.text, batch.finish_reason, batch.stop_reason) == (full[:4], "stop", stop)
    with_it = SamplingParams(
        temperature=0, max_tokens=32, stop=stop, include_stop_str_in_output=True
    )
    assert llm.generate(PROMPTS[1], with_it).outputs[0].text == full[:9]


def test_stop_tokens_and_lengths(llm):
    tokens = llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=8)).outputs[0]
    third = tokens.token_ids[2]
    first = tokens.token_ids.index(third)
    stopped = llm.generate(
        PROMPTS[0], SamplingParams(temperature=0, max_tokens=8, stop_token_ids=[third])
    ).outputs[0]
    assert stopped.token_ids == tokens.token_ids[: first + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", third)
    assert stopped.text == llm.tokenizer.decode(stopped.token_ids[:-1])
    forced = llm.generate(
        PROMPTS[0],
        SamplingParams(temperature=0, max_tokens=8, min_tokens=6, stop_token_ids=[third]),
    ).outputs[0]
    assert third not in forced.token_ids[:5]
    assert len(forced.token_ids) >= 6


def test_end_of_sequence_is_not_text(llm):
    eos = llm.model_config.eos_token_ids[0]
    params = SamplingParams(temperature=0, max_tokens=5, logit_bias={eos: 1000.0})
    out = llm.generate(PROMPTS[0], params).outputs[0]
    assert (out.token_ids, out.text, out.finish_reason) == ([eos], "", "stop")
    assert out.stop_reason is None
    ignoring = SamplingParams(
        temperature=0, max_tokens=5, logit_bias={eos: 1000.0}, ignore_eos=True
    )
    assert llm.generate(PROMPTS[0], ignoring).outputs[0].token_ids == [eos] * 5


def test_bad_words_do_not_appear(llm):
    text = llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=16)).outputs[0].text
    word = next(part for part in text.split() if part.isalpha())
    params = SamplingParams(temperature=0, max_tokens=16, bad_words=[word])
    assert word not in llm.generate(PROMPTS[0], params).outputs[0].text.split()


def test_logprobs(llm):
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=3, prompt_logprobs=2)
    out = llm.generate(PROMPTS[1], params)
    best = out.outputs[0]
    assert [len(found) for found in best.logprobs] == [3] * 4  # greedy: the choice is rank 1
    for token, found in zip(best.token_ids, best.logprobs, strict=True):
        assert found[token].rank == 1
        assert found[token].decoded_token == llm.tokenizer.token_text(token)
    total = sum(found[t].logprob for t, found in zip(best.token_ids, best.logprobs, strict=True))
    assert best.cumulative_logprob == pytest.approx(total)
    assert out.prompt_logprobs[0] is None
    scores = llm.score(PROMPTS[1])
    for token, found, score in zip(
        out.prompt_token_ids[1:], out.prompt_logprobs[1:], scores[1:], strict=True
    ):
        assert found[token].logprob == pytest.approx(score, abs=1e-4)
    assert llm.generate(PROMPTS[1], GREEDY).outputs[0].logprobs is None


def test_score_of_a_list_and_of_a_full_sequence(llm):
    scores = llm.score([PROMPTS[0], [5] * 256])
    assert len(scores[1]) == 256
    assert all(value < 0 for value in scores[1][1:])
    with pytest.raises(RequestError, match="at most 256 fit"):
        llm.score([5] * 257)


def test_samples_of_one_prompt(llm):
    out = llm.generate(PROMPTS[2], SamplingParams(n=3, seed=4, max_tokens=8, temperature=1.0))
    assert [sample.index for sample in out.outputs] == [0, 1, 2]
    assert len({sample.text for sample in out.outputs}) > 1
    assert {sample.seed for sample in out.outputs} == {4}


def test_chat_goes_through_the_template(fixtures, tmp_path):
    shutil.copytree(fixtures / "llama3", tmp_path / "m")
    engine = {"max_batch_size": 2, "max_num_tokens": 32, "max_seq_len": 120, "page_size": 8}
    messages = [{"role": "user", "content": "Hi"}]
    with (
        LLM(tmp_path / "m", skip_tokenizer_init=True, **engine) as llm,
        pytest.raises(RequestError, match="chat needs a tokenizer"),
    ):
        llm.chat(messages, GREEDY)
    expected = json.loads((fixtures / "tokenizer" / "expected.json").read_text())
    case = next(case for case in expected["chats"] if "ids" in case)
    # The tokenizer knows more tokens than this small model, so only the prompt can be looked at.
    with LLM(tmp_path / "m", tokenizer=str(fixtures / "tokenizer"), **engine) as llm:
        assert llm.chat_prompt(case["messages"], **case["kwargs"]) == case["ids"]
        ok = llm.generate([5, 6], GREEDY)
        assert ok.outputs[0].token_ids
    with LLM("demo", **engine) as llm, pytest.raises(TokenizerError, match="chat template"):
        llm.chat(messages, GREEDY)


def test_a_bad_conversation_fails_alone(tmp_path):
    shutil.copytree(Path(jaxinfer.__file__).with_name("demo") / "model", tmp_path / "m")
    template = "{% if messages[0].role == 'critic' %}{{ raise_exception('no critics') }}{% endif %}"
    (tmp_path / "m" / "chat_template.jinja").write_text(template + "{{ messages[0].content }}")
    good = [{"role": "user", "content": PROMPTS[0]}]
    bad = [{"role": "critic", "content": PROMPTS[0]}]
    with LLM(tmp_path / "m", max_batch_size=2, max_num_tokens=32, max_seq_len=120) as llm:
        first, failed, last = llm.chat([good, bad, good], GREEDY)
        assert "no critics" in failed.error
        assert failed.outputs[0].finish_reason == "error"
        assert first.outputs[0].token_ids == last.outputs[0].token_ids
        assert first.outputs[0].token_ids == llm.generate(PROMPTS[0], GREEDY).outputs[0].token_ids
        with pytest.raises(RequestError, match="no critics"):
            llm.chat(bad, GREEDY)
        for wrong in ("hi", good[0], None):
            with pytest.raises(RequestError, match="messages must be a list"):
                llm.chat(wrong, GREEDY)
        assert llm.chat([], GREEDY) == []
        with pytest.raises(RequestError, match="priority has 1 entries for 2 prompts"):
            llm.chat([good, good], GREEDY, priority=[1])


def test_a_warm_up_that_fails_closes_the_engine():
    with LLM("demo", max_batch_size=2, max_num_tokens=8, max_seq_len=64) as llm:

        def fail(*args):
            raise RuntimeError("no device")

        llm.step._backbones[4] = fail
        with pytest.raises(EngineClosedError, match="no device"):
            llm.warm_up()
        with pytest.raises(EngineClosedError, match="cannot be used any more"):
            llm.generate(PROMPTS[0], GREEDY)


def test_an_observer_that_fails_costs_no_engine(llm):
    def observe(plan):
        raise ValueError("no more")

    llm.observer = observe
    try:
        with pytest.raises(ValueError, match="no more"):
            llm.generate(PROMPTS[0], GREEDY)
    finally:
        llm.observer = None
    assert llm.generate(PROMPTS[0], GREEDY).outputs[0].token_ids


def test_event_loops(llm):
    async def main():
        outputs = await asyncio.gather(*(llm.generate_async(prompt, GREEDY) for prompt in PROMPTS))
        texts = []
        async for output in llm.generate_async(PROMPTS[0], GREEDY, streaming=True):
            texts.append(output.outputs[0].text)
        again = llm.generate_async(PROMPTS[0], GREEDY)
        assert await again is await again
        running = llm.generate_async(PROMPTS[0], SamplingParams(max_tokens=200, ignore_eos=True))
        task = asyncio.ensure_future(running._final())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return outputs, texts

    outputs, texts = asyncio.run(main())
    want = [out.outputs[0].text for out in llm.generate(PROMPTS, GREEDY)]
    assert [out.outputs[0].text for out in outputs] == want
    assert texts[-1] == want[0]
    assert len(texts) > 3
    assert llm.stats()["running"] == 0


def test_submit_run_and_cancel(llm):
    first = llm.submit(PROMPTS[0], GREEDY)
    second = llm.submit(
        PROMPTS[1], SamplingParams(max_tokens=100, ignore_eos=True), request_id="long"
    )
    with pytest.raises(RequestError, match="'long' is already in use"):
        llm.submit(PROMPTS[1], request_id="long")
    outputs, third = {}, None
    for output in llm.run():
        outputs[output.request_id] = output
        if output.request_id == first:
            assert llm.cancel(second)
            third = llm.submit(PROMPTS[2], GREEDY)  # while the results are being taken
    assert list(outputs) == [first, second, third]
    assert outputs[second].outputs[0].finish_reason == "cancelled"
    assert 0 < len(outputs[second].outputs[0].token_ids) < 100
    assert outputs[second].outputs[0].text
    assert llm.cancel("long") is False


def test_a_bad_prompt_fails_alone(llm):
    prompts = [PROMPTS[0], "", [10**6], "x " * 400, PROMPTS[1]]
    outputs = llm.generate(prompts, GREEDY)
    assert [out.error is None for out in outputs] == [True, False, False, False, True]
    assert "prompt is empty" in outputs[1].error
    assert "token id 1000000" in outputs[2].error
    assert "max_seq_len=256" in outputs[3].error
    for out in outputs[1:4]:
        assert out.finished
        assert out.outputs[0].finish_reason == "error"
    assert outputs[4].outputs[0].text == llm.generate(PROMPTS[1], GREEDY).outputs[0].text


def test_what_is_no_prompt_at_all_fails_alone(llm):
    outputs = llm.generate([PROMPTS[0], None, 5, {"prompt": "x"}], GREEDY)
    assert [out.error is None for out in outputs] == [True, False, False, False]
    assert all("prompt must be a string or a list" in out.error for out in outputs[1:])
    assert outputs[0].outputs[0].finish_reason == "length"


def test_an_argument_of_the_wrong_type_harms_nobody_else(llm):
    for options, message in (
        ({"priority": ["high", 0]}, "priority must be a whole number, got 'high'"),
        ({"sampling_params": [{"temperature": 0}, GREEDY]}, "must be a SamplingParams, got {"),
    ):
        bad, good = llm.generate(PROMPTS[:2], **{"sampling_params": GREEDY, **options})
        assert message in bad.error
        assert good.error is None
    with pytest.raises(RequestError, match="request_id must be a string, got 5"):
        llm.submit(PROMPTS[0], request_id=5)
    assert llm.stats()["waiting"] == 0


def test_the_longest_minimum_there_can_be_is_that_of_the_sequence(llm):
    params = SamplingParams(min_tokens=2**31 - 1, max_tokens=None, temperature=0)
    out = llm.generate([5] * 250, params).outputs[0]
    assert (len(out.token_ids), out.finish_reason) == (6, "length")


def test_an_interrupt_while_prompts_are_queued_leaves_none_behind(llm, monkeypatch):
    encode = llm.tokenizer.encode

    def interrupted(text: str, **options):
        if text == PROMPTS[1]:
            signal.raise_signal(signal.SIGINT)
        return encode(text, **options)

    monkeypatch.setattr(llm.tokenizer, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, GREEDY)
    assert llm.stats()["waiting"] == 0


def test_ids_that_callers_chose_are_not_drawn(llm):
    taken = llm.submit(PROMPTS[0], GREEDY).removeprefix("request-")
    # A request takes two numbers: one for its id, one for its place in the queue.
    ahead = [llm.submit(p, GREEDY, request_id=f"request-{int(taken) + 3}") for p in PROMPTS[:1]]
    drawn = [llm.submit(prompt, GREEDY) for prompt in PROMPTS]
    assert {out.request_id for out in llm.run()} >= {*ahead, *drawn}
    assert len({*ahead, *drawn}) == 4


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ("", None, "prompt is empty"),
        (b"x", None, "prompt must be a string"),
        ([-1], None, "token id -1"),
        ([1.5], None, "whole numbers"),
        ("x", SamplingParams(logit_bias={10**6: 1.0}), "logit_bias has token id 1000000"),
        ("x", SamplingParams(stop_token_ids=[10**6]), "stop_token_ids has token id 1000000"),
        ("x", SamplingParams(stop="y", detokenize=False), "detokenize=True"),
        ("x", SamplingParams(bad_words=["long word " * 10]), "bad_words"),
    ],
)
def test_a_single_bad_prompt_raises(llm, prompt, params, message):
    with pytest.raises(RequestError, match=message):
        llm.generate(prompt, params)


def test_output_ends_at_max_seq_len(llm):
    ids = [5] * 250
    out = llm.generate(ids, SamplingParams(max_tokens=50, ignore_eos=True)).outputs[0]
    assert (len(out.token_ids), out.finish_reason) == (6, "length")
    out = llm.generate(ids, SamplingParams(max_tokens=None, ignore_eos=True)).outputs[0]
    assert len(out.token_ids) == 6


def test_interrupting_generate_leaves_the_engine_usable(llm):
    timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
    many = [PROMPTS[i % 3] for i in range(200)]
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate(many, SamplingParams(max_tokens=100, ignore_eos=True))
    out = llm.generate(PROMPTS[0], GREEDY)
    assert out.finished
    stats = llm.stats()
    assert (stats["running"], stats["waiting"], stats["used_pages"]) == (0, 0, 0)


def test_prefix_reuse_is_reported(llm):
    prompt = list(np.random.default_rng(0).integers(5, 500, 100).tolist())
    assert llm.generate(prompt, GREEDY).num_cached_tokens == 0
    assert llm.generate(prompt, GREEDY).num_cached_tokens == 96
    metrics = llm.generate(prompt, GREEDY).metrics
    assert metrics.arrival_time <= metrics.first_token_time <= metrics.finished_time


def test_closed_engines_say_so(tiny_model):
    llm = LLM(
        tiny_model, load_format="dummy", skip_tokenizer_init=True, max_batch_size=1,
        max_num_tokens=4, max_seq_len=32,
    )  # fmt: skip
    with pytest.raises(RequestError, match="skip_tokenizer_init=True: pass a list of token ids"):
        llm.generate("text")
    with pytest.raises(RequestError, match="stop needs a tokenizer"):
        llm.generate([1], SamplingParams(stop="x"))
    stream = llm.stream([1, 2], SamplingParams(max_tokens=20, ignore_eos=True))
    next(stream)
    llm.close()
    llm.close()
    with pytest.raises(EngineClosedError, match=r"close\(\) was called"):
        llm.generate([1])
    assert next(stream).outputs[0].finish_reason == "cancelled"
    assert llm.stats()["running"] == 0


def test_a_failing_step_is_reported_as_such(tiny_model, monkeypatch):
    with LLM(
        tiny_model, load_format="dummy", skip_tokenizer_init=True, max_batch_size=1,
        max_num_tokens=4, max_seq_len=32,
    ) as llm:  # fmt: skip
        monkeypatch.setattr(type(llm.step), "__call__", lambda *_: 1 / 0)
        with pytest.raises(EngineClosedError, match="a step failed on the device"):
            llm.generate([1, 2])
        with pytest.raises(EngineClosedError, match="cannot be used any more"):
            llm.generate([1, 2])


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        ("demo", {"max_batchsize": 2}, ConfigError, "did you mean 'max_batch_size'"),
        ("demo", {"max_num_tokens": 2, "max_batch_size": 4}, ConfigError, "at least max_batch"),
        ("demo", {"max_seq_len": 10**6}, ConfigError, "max_position_embeddings"),
        ("demo", {"tensor_parallel_size": 64}, ConfigError, "device"),
        ("demo", {"tensor_parallel_size": 3}, ConfigError, "does not divide"),
        ("demo", {"num_pages": 10**9}, InsufficientMemoryError, "KV cache"),
        ("demo", {"num_pages": 3, "max_seq_len": 512}, InsufficientMemoryError, "64 tokens"),
        ("no-such-model", {}, ConfigError, "no-such-model"),
        ("./no/such/folder", {}, CheckpointError, "no folder"),
        (
            "llama-3.1-70b",
            {"load_format": "dummy", "skip_tokenizer_init": True},
            InsufficientMemoryError,
            "weights",
        ),
        ("llama-3.1-8b", {}, ConfigError, "load_format='dummy'"),
        ("smollm2-135m", {"load_format": "dummy"}, TokenizerError, "skip_tokenizer_init"),
    ],
)
def test_what_cannot_work_is_refused_before_weights_are_read(model, options, error, message):
    with pytest.raises(error, match=message):
        LLM(model, **options)


def test_two_engines_live_side_by_side(llm, tiny_model):
    with LLM(
        tiny_model, load_format="dummy", skip_tokenizer_init=True, max_batch_size=1,
        max_num_tokens=4, max_seq_len=32,
    ) as other:  # fmt: skip
        stream = llm.stream(PROMPTS[0], GREEDY)
        next(stream)
        assert len(other.generate([1, 2], GREEDY).outputs[0].token_ids) > 0
        rest = [out.outputs[0].text for out in stream]
    assert rest[-1] == llm.generate(PROMPTS[0], GREEDY).outputs[0].text
    assert isinstance(llm.engine_config, EngineConfig)
