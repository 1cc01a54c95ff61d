"""What becomes of a prompt and its parameters before the scheduler sees them."""

import dataclasses

import numpy as np
import pytest

from jaxinfer.config import ModelConfig
from jaxinfer.errors import RequestError
from jaxinfer.request import SamplingParams
from jaxinfer.scheduler import Limits
from jaxinfer.tokenizer import Tokenizer
from jaxinfer.validation import make_requests

MODEL = ModelConfig(
    vocab_size=500, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1,
    head_dim=8, max_position_embeddings=64, eos_token_ids=(2, 4),
)  # fmt: skip
LIMITS = Limits(max_batch_size=4, max_num_tokens=16, max_seq_len=40, page_size=8)


@pytest.fixture(scope="module")
def tokenizer(fixtures):
    return Tokenizer.from_folder(fixtures / "tokenizer")


def requests(prompt=(5, 6, 7), tokenizer=None, pages=5, model=MODEL, scored=False, **params):
    return make_requests(
        list(prompt), SamplingParams(**params), model, LIMITS, pages, tokenizer,
        request_id="r", seed=77, priority=3, scored=scored,
    )  # fmt: skip


def test_samples_share_everything_but_their_number():
    made = requests(n=3, prompt_logprobs=1)
    assert [each.index for each in made] == [0, 1, 2]
    assert {(each.request_id, each.seed, each.priority, each.prompt_len) for each in made} == {
        ("r", 77, 3, 3)
    }
    # The prompt is scored once.
    assert [each.select_from for each in made] == [0, 2, 2]
    assert made[0].prompt_token_ids.dtype == np.int32


@pytest.mark.parametrize(
    ("length", "max_tokens", "limit"),
    [(3, 5, 8), (3, None, 40), (3, 1000, 40), (39, 1, 40), (39, None, 40)],
)
def test_a_request_ends_at_max_tokens_or_max_seq_len(length, max_tokens, limit):
    assert requests([5] * length, max_tokens=max_tokens)[0].limit == limit


def test_a_prompt_leaves_room_for_output_unless_it_is_scored():
    with pytest.raises(RequestError, match="prompt has 40 tokens; at most 39 fit into max_seq_len"):
        requests([5] * 40)
    assert requests([5] * 40, scored=True, max_tokens=1)[0].limit == 41
    with pytest.raises(RequestError, match="at most 40 fit"):
        requests([5] * 41, scored=True)


def test_a_request_that_no_empty_cache_could_hold_is_refused():
    # The last token is never written, so 17 tokens take two pages of 8.
    assert requests([5] * 10, max_tokens=7, pages=2)
    with pytest.raises(RequestError, match=r"need 3 pages of the KV cache, which has 2.*lower"):
        requests([5] * 10, max_tokens=8, pages=2)


def test_what_ends_a_request():
    assert requests(stop_token_ids=[9, 4, 9])[0].stop_ids == (2, 4, 9)
    assert requests(stop_token_ids=[9, 4], ignore_eos=True)[0].stop_ids == (9, 4)
    many = ModelConfig(**{**vars(MODEL), "eos_token_ids": tuple(range(20))})
    assert len(requests(model=many, stop_token_ids=range(8, 24))[0].stop_ids) == 24
    with pytest.raises(RequestError, match="more than 32 stop tokens"):
        requests(model=many, stop_token_ids=range(100, 116))


def test_the_host_watches_only_what_it_must(tokenizer):
    assert not requests(tokenizer=tokenizer)[0].watched
    assert requests(tokenizer=tokenizer, stop="x")[0].watched
    assert requests(logprobs=0)[0].watched
    assert requests(prompt_logprobs=0)[0].watched


def test_bad_words_are_forbidden_as_they_stand_and_after_a_space(tokenizer):
    def spelt(*words, **params) -> set[str]:
        (made,) = requests(tokenizer=tokenizer, bad_words=words, **params)
        assert len(set(made.bad_words)) == len(made.bad_words)
        return {tokenizer.decode(word) for word in made.bad_words}

    assert spelt("cat") == {"cat", " cat"}
    assert spelt(" cat") == {"cat", " cat"}
    assert spelt("cat", " cat", "dog") == {"cat", " cat", "dog", " dog"}
    assert spelt("\n") == {"\n"}
    assert spelt(" ") == {" "}
    assert spelt(bad_words_token_ids=[[344], [344, 393]]) == {
        tokenizer.decode([344]), tokenizer.decode([344, 393]),
    }  # fmt: skip


def test_bad_words_have_limits(tokenizer):
    with pytest.raises(RequestError, match=r"at most 64 spellings.*got 66"):
        requests(tokenizer=tokenizer, bad_words=[f"{a}{b}" for a in "abc" for b in "abcdefghijk"])
    with pytest.raises(RequestError, match=r"bad_words needs a tokenizer.*bad_words_token_ids"):
        requests(bad_words=["x"])
    with pytest.raises(RequestError, match="bad_words_token_ids has token id 500"):
        requests(bad_words_token_ids=[[3, 500]])


def test_the_tokenizer_says_what_ends_a_text_if_the_model_does_not(tokenizer):
    silent = dataclasses.replace(MODEL, eos_token_ids=())
    assert tokenizer.eos_token_ids
    assert requests(model=silent, tokenizer=tokenizer)[0].stop_ids == tokenizer.eos_token_ids
    assert requests(model=silent, tokenizer=tokenizer, ignore_eos=True)[0].stop_ids == ()
    assert requests(tokenizer=tokenizer)[0].stop_ids == (2, 4)
    assert requests(model=silent)[0].stop_ids == ()
