"""The same request gives the same tokens, whatever the engine does around it.

Matrix products of different sizes may round differently, so where two tokens' log-probabilities lie
closer than that, the choice may differ; such near-ties are counted, printed, and end the comparison
of their request.
"""

import json

import numpy as np
import pytest

from jaxinfer import LLM, SamplingParams

ENGINE = {
    "load_format": "dummy", "skip_tokenizer_init": True, "seed": 7, "max_batch_size": 4,
    "max_num_tokens": 16, "max_seq_len": 128, "page_size": 8,
}  # fmt: skip
NEAR_TIE = 1e-4

# Mathematics that Llama has not: norms over all heads, which lie on several devices, and the rest.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
FAMILIES = {
    "Olmo3": {"sliding_window": 9, "rope_scaling": YARN,
              "layer_types": ["sliding_attention", "full_attention"]},
    "Gemma2": {"sliding_window": 9, "query_pre_attn_scalar": 4, "attn_logit_softcapping": 1.0,
               "tie_word_embeddings": True},
    "Granite": {"embedding_multiplier": 9.0, "residual_multiplier": 0.7, "logits_scaling": 0.1},
}  # fmt: skip


def workload():
    """Prompts of 1 to 60 tokens, half of them with a common beginning; greedy and seeded."""
    rng = np.random.default_rng(5)
    prefix = rng.integers(3, 256, 20).tolist()
    prompts, params = [], []
    for index in range(14):
        own = rng.integers(3, 256, rng.integers(1, 40)).tolist()
        prompts.append(prefix + own if index % 2 else own)
        params.append(
            SamplingParams(max_tokens=12, ignore_eos=True, temperature=0, logprobs=2)
            if index % 3 == 0
            else SamplingParams(
                max_tokens=12, seed=index, temperature=0.9, top_k=40, top_p=0.95, logprobs=2,
                ignore_eos=index % 2 == 0, repetition_penalty=1.1,
            )
        )  # fmt: skip
    return prompts, params


def same(reference, outputs, what) -> None:
    """Token-identical, but for near-ties of greedy requests."""
    ties = 0
    for index, (want, got) in enumerate(zip(reference, outputs, strict=True)):
        want, got = want.outputs[0], got.outputs[0]
        if want.token_ids == got.token_ids:
            continue
        pairs = enumerate(zip(want.token_ids, got.token_ids, strict=False))
        at = next(i for i, (a, b) in pairs if a != b)
        first, second = sorted(
            (found.logprob for found in want.logprobs[at].values()), reverse=True
        )[:2]
        assert first - second < NEAR_TIE, f"{what}: request {index} differs at token {at}"
        ties += 1
    print(f"{what}: {ties} near-ties in {len(reference)} requests")


@pytest.fixture(scope="module")
def reference(tiny_model):
    prompts, params = workload()
    with LLM(tiny_model, **ENGINE) as llm:
        outputs = llm.generate(prompts, params)
        alone = [llm.generate(prompt, param) for prompt, param in zip(prompts, params, strict=True)]
    same(outputs, alone, "alone")
    return outputs


@pytest.mark.parametrize(
    "change",
    [
        {"overlap": False},
        {"enable_prefix_caching": False},
        {"max_num_tokens": 128},
        {"max_batch_size": 1, "max_num_tokens": 16},
        {"scheduling_policy": "max_utilization", "num_pages": 17},
        {"tensor_parallel_size": 2},
        {"tensor_parallel_size": 4},
        {"page_size": 32},
    ],
    ids=lambda change: ",".join(f"{name}={value}" for name, value in change.items()),
)
def test_engine_options_do_not_change_tokens(tiny_model, reference, change):
    prompts, params = workload()
    with LLM(tiny_model, **{**ENGINE, **change}) as llm:
        outputs = llm.generate(prompts, params)
        if "num_pages" in change:
            assert llm.stats()["preemptions"] > 0
    same(reference, outputs, str(change))


@pytest.mark.parametrize("family", FAMILIES)
def test_tensor_parallelism_does_not_change_tokens(tmp_path, tiny_model, family):
    config = json.loads((tiny_model / "config.json").read_text()) | FAMILIES[family]
    config["architectures"] = [f"{family}ForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    prompts, params = workload()
    outputs = []
    for size in (1, 2, 4):
        with LLM(tmp_path, **ENGINE, deterministic=True, tensor_parallel_size=size) as llm:
            outputs.append(llm.generate(prompts, params))
    for size, got in zip((2, 4), outputs[1:], strict=True):
        same(outputs[0], got, f"{family}, tensor_parallel_size={size}")


def test_company_and_order_do_not_matter(tiny_model, reference):
    prompts, params = workload()
    order = np.random.default_rng(1).permutation(len(prompts))
    with LLM(tiny_model, **ENGINE) as llm:
        shuffled = llm.generate([prompts[i] for i in order], [params[i] for i in order])
    same([reference[i] for i in order], shuffled, "shuffled")


def test_deterministic_is_bit_exact(tiny_model):
    prompts, params = workload()
    exact = {**ENGINE, "deterministic": True}
    with LLM(tiny_model, **exact) as llm:
        together = llm.generate(prompts, params)
        alone = [llm.generate(prompt, param) for prompt, param in zip(prompts, params, strict=True)]
    with LLM(tiny_model, **exact, overlap=False, enable_prefix_caching=False) as llm:
        plain = llm.generate(prompts, params)
    for one, two, three in zip(together, alone, plain, strict=True):
        assert one.outputs[0].token_ids == two.outputs[0].token_ids == three.outputs[0].token_ids
        # Log-probabilities to the last bit, not only the tokens.
        assert one.outputs[0].logprobs == two.outputs[0].logprobs == three.outputs[0].logprobs


def test_samples_differ_and_repeat(tiny_model):
    prompt, params = [5, 6, 7], SamplingParams(n=4, seed=3, max_tokens=10, ignore_eos=True)
    with LLM(tiny_model, **ENGINE) as llm:
        first, second = llm.generate(prompt, params), llm.generate(prompt, params)
        unseeded = llm.generate(prompt, SamplingParams(max_tokens=10, ignore_eos=True))
        repeated = llm.generate(
            prompt, SamplingParams(max_tokens=10, ignore_eos=True, seed=unseeded.outputs[0].seed)
        )
    samples = [tuple(out.token_ids) for out in first.outputs]
    assert len(set(samples)) == 4
    assert samples == [tuple(out.token_ids) for out in second.outputs]
    assert unseeded.outputs[0].token_ids == repeated.outputs[0].token_ids
