"""Caches in every number format: what they take, and how little they change what a model says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import LLM, cache, shardings
from jaxinfer.cache import stored_dtype
from jaxinfer.checkpoint import resolve
from jaxinfer.config import KV_CACHE_DTYPES
from jaxinfer.configs import load_chip

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
        step, dtype = llm.step, stored_dtype(name)
        page = cache.bytes_per_page(step.config, ENGINE["page_size"], dtype, step.mesh, step.ops)
        assert held == ENGINE["num_pages"] * page == llm.memory.kv_cache
        assert page == ENGINE["page_size"] * cache.bytes_per_slot(step.config, dtype)
    error = np.sqrt(np.mean((scores - exact) ** 2))
    assert error <= CLOSE[name]
    assert error > 0 or name == "float32", "the format changed nothing: was it used?"


@pytest.mark.parametrize(
    ("chip", "name", "one_head"),
    [
        # Heads are 16 wide and pages 128 slots high; a TPU's tile is 128 wide.
        ("tpu-v6e", "bfloat16", 128 * 128 * 2),
        ("tpu-v6e", "int8", 128 * 128 + 128 * 4),
        ("tpu-v6e", "int4", 128 * 128 + 128 * 4),
        ("h200", "bfloat16", 128 * 16 * 2),
        ("h200", "int8", 128 * 16 + 128 * 4),
        (None, "int4", 128 * 8 + 128 * 4),
    ],
)
@pytest.mark.parametrize("asked", ["auto", "reference"])
def test_pages_take_what_the_chip_pads(tiny_model, chip, name, one_head, asked):
    config, mesh = resolve(tiny_model, "dummy").config, shardings.mesh(2)
    shapes = 128, cache.stored_dtype(name), mesh
    ops = cache.operations(
        asked, chip and load_chip(chip), config, 128, jnp.dtype("bfloat16"), shapes[1], mesh
    )
    per_device = 2 * config.num_layers * config.num_kv_heads // 2
    assert cache.bytes_per_page(config, *shapes, ops) == per_device * one_head


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
