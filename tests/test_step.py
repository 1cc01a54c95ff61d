"""The compiled step: what it copies, what it exchanges, and what it reads when."""

import re
from itertools import pairwise

import jax
import numpy as np
import pytest

from jaxinfer import LLM, SamplingParams
from jaxinfer import step as step_module
from jaxinfer.batch import Buckets, bucket_sizes, pack
from jaxinfer.errors import BucketError
from jaxinfer.scheduler import Limits

ENGINE = {
    "load_format": "dummy", "skip_tokenizer_init": True, "seed": 7, "max_batch_size": 4,
    "max_num_tokens": 16, "max_seq_len": 64, "page_size": 8, "num_pages": 33,
}  # fmt: skip


def count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


@pytest.mark.parametrize("devices", [1, 4])
def test_a_step_copies_no_cache_and_exchanges_twice_a_layer(tiny_model, devices):
    with LLM(tiny_model, **ENGINE, tensor_parallel_size=devices) as llm:
        pool = llm._state.cache.pools[0].k_PKSH
        for program in llm.step._backbones.values():
            text = program.as_text()
            shape = ",".join(map(str, (pool.shape[0], pool.shape[1] // devices, *pool.shape[2:])))
            assert f"f32[{shape}]" in text, "the pattern below must be able to match"
            assert count(rf"= f32\[{shape}\]\S* copy\(", text) == 0
            assert count(r"= \S+ (copy|transpose|fusion)\(%?weights\S*\), kind=kLoop", text) == 0
            layers = llm.model_config.num_layers
            leaves = len(jax.tree.leaves(llm._state))
            assert len(re.findall(r"may-alias|must-alias", text)) == leaves == 2 * layers + 6
            if devices > 1:
                assert count(r"\ball-reduce(-start)?\(", text) == 2 * layers + 1  # one to embed
            for gather in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
                assert count(rf"\b{gather}(-start)?\(", text) == 0, gather
        for program in llm.step._heads.values():
            text = program.as_text()
            assert count(r"\ball-gather(-start)?\(", text) == (devices > 1)  # the logits
            assert count(r"\ball-reduce(-start)?\(", text) == 0


def test_every_leaf_has_the_sharding_of_its_name(tiny_model):
    with LLM(tiny_model, **ENGINE, tensor_parallel_size=4) as llm:
        layer = llm._weights["layers"][0]
        assert layer["qkv_KUHD"].sharding.shard_shape(layer["qkv_KUHD"].shape) == (1, 4, 16, 48)
        assert layer["down_DF"].sharding.shard_shape((48, 96)) == (48, 24)
        assert llm._weights["embed_VD"].sharding.shard_shape((256, 48)) == (64, 48)
        llm.generate([1, 2, 3], SamplingParams(max_tokens=2))
        pool = llm._state.cache.pools[1].v_PKSH
        assert pool.sharding.shard_shape(pool.shape) == (33, 1, 8, 16)


def test_inputs_may_be_destroyed_right_after_dispatch(tiny_model, monkeypatch):
    """What is poisoned is everything live on the host; `pack` must have copied all of it."""
    prompts = [[3, 4, 5, 6, 7, 8, 9, 10, 11], [12], [13] * 20]
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    with LLM(tiny_model, **ENGINE) as llm:
        want = [out.outputs[0].token_ids for out in llm.generate(prompts, params)]
        original = step_module.Step.__call__

        def poisoned(self, weights, state, batch):
            result = original(self, weights, state, batch)
            scheduler = llm.scheduler
            live = [scheduler._tables_BM, scheduler._computed_B, scheduler._token_ids_BT]
            kept = [array.copy() for array in live]
            for array in live:
                array[...] = 1
            jax.block_until_ready(result)
            for array, value in zip(live, kept, strict=True):
                array[...] = value
            return result

        monkeypatch.setattr(step_module.Step, "__call__", poisoned)
        got = [out.outputs[0].token_ids for out in llm.generate(prompts, params)]
    assert got == want


def test_packed_arrays_share_no_memory_with_the_plan(tiny_model):
    with LLM(tiny_model, **ENGINE) as llm:
        llm.submit([3, 4, 5])
        plan = llm.scheduler.plan()
        batch = pack(plan, llm.step.buckets, llm.limits, llm._sampling)
        sources = [value for value in vars(plan).values() if isinstance(value, np.ndarray)]
        assert not any(np.shares_memory(batch.joined, source) for source in sources)


def test_padding_is_sampled_into_nobodys_history(tiny_model):
    """Three rows in a head of four: the fourth is the dump slot's, whatever it samples."""
    prompts = [[3, 4, 5], [6, 7], [8] * 5]
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    with LLM(tiny_model, **ENGINE) as llm:
        outputs = llm.generate(prompts, params)
        history_BT = np.array(llm._state.history_BT)
    for row_T, prompt, output in zip(history_BT, prompts, outputs, strict=False):
        want = [*prompt, *output.outputs[0].token_ids]
        assert row_T[: len(want)].tolist() == want
    assert not history_BT[len(prompts) : -1].any()


@pytest.mark.parametrize("finest", [8, 16, 256])
def test_bucket_sizes_are_a_quarter_of_an_octave_apart_or_the_finest(finest):
    for limit in (1, 7, 32, 100, 256, 2048, 8192):
        sizes = bucket_sizes(limit, finest)
        assert sizes[-1] == limit
        assert list(sizes) == sorted(set(sizes))
        for smaller, larger in pairwise(sizes):
            if smaller >= 4 * finest:  # four steps an octave
                assert larger <= 1.25 * smaller
            elif smaller >= finest:  # no step is smaller than this, and none longer either
                assert larger - smaller <= finest
            else:
                assert larger <= 2 * smaller


def test_default_limits_compile_few_programs():
    limits = Limits(max_batch_size=32, max_num_tokens=256, max_seq_len=512, page_size=32)
    buckets = Buckets.for_limits(limits, "cpu")
    assert len(buckets.tokens) + len(buckets.rows) <= 24
    limits = Limits(max_batch_size=256, max_num_tokens=2048, max_seq_len=512, page_size=64)
    buckets = Buckets.for_limits(limits, "gpu")
    assert len(buckets.tokens) + len(buckets.rows) <= 30
    assert buckets.tokens[:2] == buckets.rows[:2] == (2, 4)
    alone = Limits(max_batch_size=1, max_num_tokens=8, max_seq_len=512, page_size=64)
    assert Buckets.for_limits(alone, "gpu") == Buckets((1, 2, 4, 8), (1,), max_rows=1)


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"max_batch_size": 5, "max_num_tokens": 100},
        {"max_batch_size": 1},
        {"max_batch_size": 1, "max_seq_len": 10},
        {"max_batch_size": 3, "max_seq_len": 17, "max_num_tokens": 200},
        {"deterministic": True},
    ],
)
def test_warm_up_runs_every_program_and_leaves_no_trace(tiny_model, limits):
    with LLM(tiny_model, **ENGINE | limits) as llm:
        llm.generate([[7] * 20, [8] * 3], SamplingParams(max_tokens=4))
        before = jax.tree.map(np.array, llm._state)
        ran = []
        for programs in (llm.step._backbones, llm.step._heads):
            for size, program in programs.items():

                def run(*args, program=program, programs=programs, size=size):
                    ran.append((id(programs), size))
                    return program(*args)

                programs[size] = run
        llm.warm_up()
        sizes = [(id(llm.step._backbones), size) for size in llm.step.buckets.tokens]
        sizes += [(id(llm.step._heads), size) for size in llm.step.buckets.rows]
        assert set(ran) == set(sizes)
        after = jax.tree.map(np.array, llm._state)
        np.testing.assert_array_equal(before.history_BT[:-1], after.history_BT[:-1])
        assert jax.tree.leaves(after.cache)
        jax.tree.map(
            lambda old, new: np.testing.assert_array_equal(old[1:], new[1:]),
            before.cache, after.cache,
        )  # fmt: skip


def test_a_shape_that_was_not_compiled_is_an_error(tiny_model):
    with LLM(tiny_model, **ENGINE) as llm:
        llm.submit([3] * 12)
        plan = llm.scheduler.plan()
        small = Buckets(tokens=(1, 2, 4), rows=(1,), max_rows=4)
        with pytest.raises(BucketError, match="12 tokens; the nearest is 4"):
            pack(plan, small, llm.limits, llm._sampling)
