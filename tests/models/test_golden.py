"""Every family against transformers: logits of whole prompts, and greedy tokens.

tests/make_fixtures.py made checkpoints and expected values, with eager attention in float32.
"""

import numpy as np
import pytest

from jaxinfer import LLM, SamplingParams

NAMES = [
    "llama", "llama3", "llama-linear", "llama-bias", "llama-bf16", "mistral", "qwen2",
    "qwen2-window", "qwen3", "gemma2", "gemma3", "phi3", "phi3-long", "phi3-partial", "smollm3",
    "olmo2", "olmo3", "granite",
]  # fmt: skip

# What float32 in another order of operations may change in a logit.
ROUNDING = 1e-3


@pytest.fixture(scope="module", params=NAMES)
def golden(request, fixtures):
    expected = np.load(fixtures / request.param / "expected.npz")
    with LLM(
        fixtures / request.param,
        skip_tokenizer_init=True,
        deterministic=True,
        max_batch_size=8,
        max_num_tokens=24,
        max_seq_len=72,
        page_size=8,
    ) as llm:
        yield llm, expected


def prompts_of(expected) -> list[list[int]]:
    return [[int(token) for token in row if token >= 0] for row in expected["prompts"]]


def test_logits_of_every_prompt_position(golden):
    llm, expected = golden
    prompts = prompts_of(expected)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=20, logprobs=20)
    for index, output in enumerate(llm.generate(prompts, params)):
        logits = expected[f"logits_{index}"].astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        found = [*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]]
        assert len(found) == len(logits)
        for position, candidates in enumerate(found):
            assert len(candidates) >= 20
            for token, candidate in candidates.items():
                want = logprobs[position, token]
                assert candidate.logprob == pytest.approx(want, abs=ROUNDING), (index, position)
                rank = 1 + int((logprobs[position] > want + ROUNDING).sum())
                last = int((logprobs[position] >= want - ROUNDING).sum())
                assert rank <= candidate.rank <= last


def test_greedy_tokens(golden):
    llm, expected = golden
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    for index, output in enumerate(llm.generate(prompts_of(expected), params)):
        want, gaps = expected[f"greedy_{index}"], expected[f"gap_{index}"]
        assert gaps.min() > ROUNDING, "the fixture has a near-tie"
        assert output.outputs[0].token_ids == want.tolist()


def test_long_rope_follows_the_longest_sequence(fixtures):
    """The engine cannot rotate cached keys anew, so its limit decides for short sequences too."""
    folder, options = fixtures / "phi3-partial", {"max_batch_size": 8, "max_num_tokens": 24}
    prompt = prompts_of(np.load(folder / "expected.npz"))[1]
    scores = []
    for length in (128, 129):  # the original context, and one more
        with LLM(
            folder, skip_tokenizer_init=True, deterministic=True, max_seq_len=length, **options
        ) as llm:
            assert llm.model_config.rope_scaling.use_long == (length > 128)
            scores.append(llm.score(prompt)[1:])
    assert np.abs(np.subtract(*scores)).max() > 1


def test_score_is_the_sum_of_its_parts(golden):
    llm, expected = golden
    prompts = prompts_of(expected)
    for index, scores in enumerate(llm.score(prompts)):
        logits = expected[f"logits_{index}"].astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        want = logprobs[np.arange(len(prompts[index]) - 1), prompts[index][1:]]
        assert scores[0] is None
        np.testing.assert_allclose(scores[1:], want, atol=ROUNDING)
