"""What callers see of committed tokens; the tokens here come from no model."""

import copy
import sys
import threading

import numpy as np
import pytest

from jaxinfer.output import Collector, TokenLogprobs
from jaxinfer.request import Request, RequestOutput, SamplingParams
from jaxinfer.tokenizer import Tokenizer

TEXT = "Hello there, leading and trailing"


@pytest.fixture(scope="module")
def tokenizer(fixtures):
    return Tokenizer.from_folder(fixtures / "tokenizer")


def collector(tokenizer, watched=True, **params):
    params = SamplingParams(**params)
    made = [
        Request(
            request_id="r", index=index, prompt_token_ids=np.array([1, 5, 6]), params=params,
            seed=4, limit=99, select_from=2, watched=watched,
        )
        for index in range(params.n)
    ]  # fmt: skip
    return Collector(RequestOutput("r", None, [1, 5, 6], [], False), params, made, tokenizer), made


def step_logprobs(*rows: tuple[float, int]) -> TokenLogprobs:
    """Log-probability and rank of a token per entry; tokens 7, 8 and 9 are the likeliest."""
    count = len(rows)
    return TokenLogprobs(
        np.float32([row[0] for row in rows]),
        np.int32([row[1] for row in rows]),
        np.tile(np.int32([7, 8, 9]), (count, 1)),
        np.tile(np.float32([-0.5, -1.5, -2.5]), (count, 1)),
    )


def end(output, request, reason="length", stop_reason=None):
    request.finish_reason, request.stop_reason = reason, stop_reason
    output.finish(request)


def test_a_watched_sample_tells_its_text_as_it_grows(tokenizer):
    seen, (request,) = collector(tokenizer)
    texts = []
    for token in tokenizer.encode(TEXT, add_special_tokens=False):
        assert seen.accept(request, token, False, None, 0) is None
        news = seen.take_news().outputs[0]
        texts.append(news.text_diff)
        assert news.text == "".join(texts)
        assert not seen.has_news
    end(seen, request)
    last = seen.take_news()
    assert last.finished
    assert last.outputs[0].text == "".join(texts) + last.outputs[0].text_diff == TEXT
    assert last.outputs[0].seed == 4


def test_an_unwatched_sample_is_decoded_once_at_its_end(tokenizer):
    seen, (request,) = collector(tokenizer, watched=False)
    request.token_ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert seen.output.outputs[0].text == ""
    end(seen, request)
    out = seen.output.outputs[0]
    assert (out.text, out.token_ids, out.finish_reason) == (TEXT, request.token_ids, "length")


@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("include", [True, False])
def test_a_stop_token_is_text_only_if_asked_for(tokenizer, watched, include):
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    seen, (request,) = collector(tokenizer, watched, include_stop_str_in_output=include)
    for token in ids:
        request.token_ids.append(token)
        if len(request.token_ids) == len(ids):
            request.finish_reason, request.stop_reason = "stop", token
        if watched:
            seen.accept(request, token, False, None, 0)
    seen.finish(request)
    out = seen.output.outputs[0]
    assert out.text == tokenizer.decode(ids if include else ids[:-1])
    assert (out.finish_reason, out.stop_reason, out.token_ids) == ("stop", ids[-1], ids)


def test_a_stop_string_is_found_and_cut(tokenizer):
    seen, (request,) = collector(tokenizer, stop=["lead", "zzz"])
    stopped = None
    for token in tokenizer.encode(TEXT, add_special_tokens=False):
        stopped = seen.accept(request, token, False, None, 0)
        assert TEXT.startswith(seen.output.outputs[0].text)
        if stopped:
            break
    assert stopped == "lead"
    end(seen, request, "stop", stopped)
    assert seen.output.outputs[0].text == "Hello there, "


def test_a_text_that_was_held_back_comes_at_the_end(tokenizer):
    seen, (request,) = collector(tokenizer, stop=["there, and more"])
    for token in tokenizer.encode("Hello there,", add_special_tokens=False):
        seen.accept(request, token, False, None, 0)
    assert seen.output.outputs[0].text == "Hello "
    end(seen, request)
    assert seen.output.outputs[0].text == "Hello there,"
    assert seen.output.outputs[0].finish_reason == "length"


def test_logprobs_hold_the_chosen_token_and_the_likeliest(tokenizer):
    seen, (request,) = collector(tokenizer, logprobs=2)
    rows = step_logprobs((-4.0, 11), (-0.5, 1))
    seen.accept(request, 20, False, rows, 0)
    seen.accept(request, 7, False, rows, 1)
    found = seen.output.outputs[0].logprobs
    assert found
    first, second = found
    assert {token: (each.logprob, each.rank) for token, each in first.items()} == {
        20: (-4.0, 11), 7: (-0.5, 1), 8: (-1.5, 2),
    }  # fmt: skip
    assert list(second) == [7, 8]
    assert first[20].decoded_token == tokenizer.token_text(20)
    assert seen.output.outputs[0].cumulative_logprob == -4.5


def test_prompts_are_scored_by_the_first_sample_alone(tokenizer):
    seen, (first, second) = collector(tokenizer, n=2, prompt_logprobs=1)
    rows = step_logprobs((-3.0, 5), (-1.5, 2))
    for request in (first, second):
        seen.accept(request, 5, True, rows, 0)
        seen.accept(request, 6, True, rows, 1)
    found = seen.output.prompt_logprobs
    assert found
    none, five, six = found
    assert none is None
    assert five
    assert six
    assert [*five, *six] == [5, 7, 6, 7]
    assert (five[5].logprob, six[6].rank) == (-3.0, 2)
    assert seen.output.outputs[0].token_ids == []
    assert seen.output.outputs[0].logprobs is None


def test_news_stays_as_it_was(tokenizer):
    seen, (request,) = collector(tokenizer, logprobs=1, prompt_logprobs=1)
    rows = step_logprobs((-4.0, 11))
    seen.accept(request, 5, True, rows, 0)
    seen.accept(request, 20, False, rows, 0)
    news = seen.take_news()
    before = copy.deepcopy(news)
    seen.accept(request, 6, True, rows, 0)
    seen.accept(request, 21, False, rows, 0)
    end(seen, request)
    assert news == before
    assert len(seen.output.outputs[0].logprobs) == 2


def test_an_output_is_finished_when_all_its_samples_are(tokenizer):
    seen, (first, second) = collector(tokenizer, n=2)
    end(seen, second)
    assert not seen.output.finished
    assert seen.output.metrics.finished_time is None
    end(seen, first, "cancelled")
    assert seen.output.finished
    assert [out.finish_reason for out in seen.output.outputs] == ["cancelled", "length"]


def test_without_a_tokenizer_there_is_no_text(tokenizer):
    for given, params in ((None, {}), (tokenizer, {"detokenize": False})):
        seen, (request,) = collector(given, logprobs=1, **params)
        seen.accept(request, 20, False, step_logprobs((-4.0, 11)), 0)
        end(seen, request)
        out = seen.output.outputs[0]
        assert (out.text, out.token_ids) == ("", [20])
        assert out.logprobs
        assert out.logprobs[0][20].decoded_token is None


def test_a_reader_in_another_thread_loses_no_text(tokenizer):
    """The text grows between any two lines of the reader's: diffs, joined, are still the text."""
    seen, (request,) = collector(tokenizer, detokenize=True)
    tokens = tokenizer.encode(TEXT, add_special_tokens=False) * 200
    switching = sys.getswitchinterval()

    def write():
        for token in tokens:
            seen.accept(request, token, False, None, 0)
        end(seen, request)

    writer = threading.Thread(target=write)
    texts, last = [], None
    try:
        sys.setswitchinterval(1e-6)
        writer.start()
        while last is None or not last.finished:
            last = seen.take_news()
            texts.append(last.outputs[0].text_diff)
            assert last.outputs[0].text == "".join(texts)
    finally:
        sys.setswitchinterval(switching)
        writer.join()
    assert (
        "".join(texts) == tokenizer.decode([1, 5, 6, *tokens])[len(tokenizer.decode([1, 5, 6])) :]
    )
