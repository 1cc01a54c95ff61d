"""Two thousand random requests with aborts: nothing recompiles, nothing leaks, nobody is lost."""

import jax.monitoring
import numpy as np
import pytest

from jaxinfer import LLM, SamplingParams

COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compilations():
    """Events of the compiler, cache hits and eager operations included."""
    events = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: events.append(name) if name == COMPILED else None
    )
    yield events
    jax.monitoring.clear_event_listeners()


def random_params(rng) -> SamplingParams:
    """Any mixture of features, so that every branch of the sampler runs."""
    options = {
        "temperature": float(rng.choice([0.0, 0.7, 1.3])),
        "top_k": int(rng.choice([0, 5])),
        "top_p": float(rng.choice([1.0, 0.8])),
        "min_p": float(rng.choice([0.0, 0.1])),
        "repetition_penalty": float(rng.choice([1.0, 1.2])),
        "presence_penalty": float(rng.choice([0.0, 0.5])),
        "max_tokens": int(rng.integers(1, 12)),
        "min_tokens": int(rng.integers(0, 2)),
        "n": int(rng.choice([1, 1, 1, 2])),
        "seed": int(rng.integers(100)),
    }
    if rng.random() < 0.1:
        options["logit_bias"] = {int(rng.integers(64)): 5.0}
    if rng.random() < 0.1:
        options["bad_words_token_ids"] = [[3], [4, 5]]
    if rng.random() < 0.1:
        options["logprobs"] = int(rng.integers(0, 5))
    if rng.random() < 0.05:
        options["prompt_logprobs"] = 1
    return SamplingParams(**options)


@pytest.mark.parametrize("policy", ["guaranteed_no_evict", "max_utilization"])
def test_soak(tiny_model, compilations, policy):
    rng = np.random.default_rng(11)
    prefixes = [rng.integers(3, 64, 24).tolist() for _ in range(4)]
    finished: dict[str, str] = {}
    cancelled = set()
    with LLM(
        tiny_model, load_format="dummy", skip_tokenizer_init=True, seed=1, max_batch_size=8,
        max_num_tokens=16, page_size=4, num_pages=60, max_seq_len=64, scheduling_policy=policy,
    ) as llm:  # fmt: skip
        llm.generate([1, 2, 3], SamplingParams(max_tokens=2))
        del compilations[:]
        submitted = 0
        while submitted < 1000 or llm.has_work:
            for _ in range(int(rng.integers(0, 4))):
                if submitted < 1000:
                    own = rng.integers(3, 64, rng.integers(1, 24)).tolist()
                    prefix = prefixes[rng.integers(4)] if rng.random() < 0.5 else []
                    params, rank = random_params(rng), int(rng.integers(3))
                    llm.submit(prefix + own, params, priority=rank, request_id=str(submitted))
                    submitted += 1
            if rng.random() < 0.1 and submitted:
                victim = str(rng.integers(max(0, submitted - 20), submitted))
                if llm.cancel(victim):
                    cancelled.add(victim)
            for _ in range(int(rng.integers(1, 4))):
                if llm.has_work:
                    llm._advance()
                    llm.scheduler.check()
            for output in llm.run() if submitted == 1000 else llm._take_done():
                assert output.request_id not in finished
                finished[output.request_id] = output.outputs[0].finish_reason
        stats = llm.stats()
    assert len(finished) == 1000
    assert {name for name, reason in finished.items() if reason == "cancelled"} <= cancelled
    assert len(cancelled) > 20
    assert compilations == [], "a request caused a compilation"
    assert stats["used_pages"] == 0
    assert stats["running"] == stats["waiting"] == 0
    assert stats["reused_pages"] > 100
    if policy == "max_utilization":
        assert stats["preemptions"] > 0
