"""Caches in every number format: what they take, and how little they change what a model says."""

import jax
import numpy as np
import pytest

from jaxinfer import LLM
from jaxinfer.cache import bytes_per_slot, stored_dtype
from jaxinfer.config import KV_CACHE_DTYPES

ENGINE = {"skip_tokenizer_init": True, "max_batch_size": 2, "max_num_tokens": 16,
          "max_seq_len": 64, "page_size": 8, "num_pages": 20}  # fmt: skip
TEXT = [int(token) for token in np.random.default_rng(0).integers(3, 90, 40)]

# How far log-probabilities move (root mean square): twice what was seen.  The model is a harsh one:
# between tokens they differ by 3.
CLOSE = {"float32": 1e-6, "bfloat16": 0.03, "float16": 0.004, "fp8_e4m3": 0.4, "fp8_e5m2": 1.0,
         "int8": 0.1, "int4": 1.5}  # fmt: skip


@pytest.fixture(scope="module")
def exact(fixtures):
    with LLM(fixtures / "llama", **ENGINE, dtype="float32") as llm:
        return np.array(llm.score(TEXT)[1:])


@pytest.mark.parametrize("name", KV_CACHE_DTYPES)
def test_scores_stay_close(fixtures, exact, name):
    with LLM(fixtures / "llama", **ENGINE, dtype="float32", kv_cache_dtype=name) as llm:
        scores = np.array(llm.score(TEXT)[1:])
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(llm._state.cache))
        slots = ENGINE["num_pages"] * ENGINE["page_size"]
        assert held == slots * bytes_per_slot(llm.model_config, stored_dtype(name))
    error = np.sqrt(np.mean((scores - exact) ** 2))
    assert error <= CLOSE[name]
    assert error > 0 or name == "float32", "the format changed nothing: was it used?"


def test_a_quantized_cache_is_split_like_a_plain_one(tiny_model):
    """Two devices, each with its heads' keys, values and scales, say what one says."""
    options = {**ENGINE, "load_format": "dummy", "seed": 7, "kv_cache_dtype": "int8"}
    scores = []
    for devices in (1, 2):
        with LLM(tiny_model, **options, tensor_parallel_size=devices) as llm:
            scores.append(llm.score(TEXT)[1:])
            pool = llm._state.cache.pools[0]
            shard = pool.k_scale_PKS.sharding.shard_shape(pool.k_scale_PKS.shape)
            assert shard == (20, 4 // devices, 8)
    np.testing.assert_allclose(*scores, atol=1e-4)
