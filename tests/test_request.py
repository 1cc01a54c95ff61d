"""Sampling parameters are checked where they are made."""

import pytest

from jaxinfer.errors import RequestError
from jaxinfer.request import SamplingParams


def test_defaults_are_those_of_vllm():
    params = SamplingParams()
    assert (params.temperature, params.top_p, params.max_tokens, params.n) == (1.0, 1.0, 16, 1)
    assert params.stop == ()
    assert SamplingParams(stop="\n").stop == ("\n",)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temprature": 1}, "no field 'temprature'; did you mean 'temperature'"),
        ({"temperature": -0.1}, "temperature must be a number from 0 to 100"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k must be a whole number"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"n": 0}, "n must be"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": 20}, r"min_tokens \(20\) must not exceed max_tokens \(16\)"),
        ({"logprobs": 21}, "logprobs must be a whole number from 0 to 20"),
        ({"seed": -1}, "seed"),
        ({"stop": [""]}, "stop must hold non-empty strings"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {1: "much"}}, r"logit_bias\[1\]"),
        ({"logit_bias": dict.fromkeys(range(301), 1.0)}, "logit_bias has 301 entries; at most 300"),
        ({"stop_token_ids": list(range(17))}, "stop_token_ids has 17 entries"),
        ({"bad_words_token_ids": [[]]}, "bad_words_token_ids"),
        ({"bad_words_token_ids": [[1] * 9]}, "a word must have 1 to 8 tokens"),
        ({"stop": 5}, "stop must be a list"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a list"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids must hold token ids"),
        ({"stop_token_ids": [1.5]}, "stop_token_ids must hold token ids"),
        ({"bad_words_token_ids": [5]}, "bad_words_token_ids must be a list"),
        ({"bad_words_token_ids": [["a"]]}, "bad_words_token_ids must hold token ids"),
        ({"ignore_eos": "no"}, "ignore_eos must be true or false, got 'no'"),
        ({"detokenize": None}, "detokenize must be true or false"),
    ],
)
def test_bad_values_are_named(fields, message):
    with pytest.raises(RequestError, match=message):
        SamplingParams.from_dict(fields)


@pytest.mark.parametrize("bias", [[1], {"a": 1.0}, {1.5: 1.0}])
def test_keys_of_logit_bias_are_token_ids(bias):
    with pytest.raises(RequestError, match="logit_bias must map token ids to numbers"):
        SamplingParams(logit_bias=bias)


def test_none_stands_for_no_entries_as_in_vllm():
    params = SamplingParams(stop=None, stop_token_ids=None, bad_words=None)
    assert params == SamplingParams()


def test_json_keys_of_logit_bias_become_numbers():
    assert SamplingParams.from_dict({"logit_bias": {"7": -1}}).logit_bias == {7: -1}
