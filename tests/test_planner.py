"""How large the cache becomes, by arithmetic on round numbers."""

import pytest

from jaxinfer.config import EngineConfig, ModelConfig
from jaxinfer.errors import ConfigError, InsufficientMemoryError
from jaxinfer.planner import CPU_CACHE_CAP, GIB, Memory, page_size, size

MODEL = ModelConfig(
    vocab_size=1000, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=16, max_position_embeddings=4096,
)  # fmt: skip
SLOT = 2**14  # bytes of one token's keys and values


def plan(*, platform="gpu", free=8 * GIB, weights=GIB, slot=SLOT, model=MODEL, **engine):
    engine = EngineConfig(**engine)
    return size(
        model, engine, platform=platform, free_bytes=free, weight_bytes=weights,
        bytes_per_page=page_size(engine.page_size, platform) * slot, dtype_bytes=2,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("platform", "rows", "tokens", "slots"),
    [("cpu", 32, 256, 32), ("gpu", 256, 2048, 64), ("tpu", 256, 2048, 128)],
)
def test_limits_that_are_left_open(platform, rows, tokens, slots):
    limits = plan(platform=platform).limits
    assert (limits.max_batch_size, limits.max_num_tokens) == (rows, tokens)
    assert (limits.page_size, limits.max_seq_len) == (slots, 4096)
    assert plan(platform=platform, max_batch_size=5000).limits.max_num_tokens == 5000


def test_limits_that_are_given():
    limits = plan(max_batch_size=3, max_num_tokens=17, max_seq_len=100, page_size=8).limits
    assert vars(limits) == {
        "max_batch_size": 3, "max_num_tokens": 17, "max_seq_len": 100, "page_size": 8,
    }  # fmt: skip


@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0])
def test_the_cache_takes_its_share_of_what_is_left(fraction):
    sizes = plan(free_memory_fraction=fraction)
    memory, page = sizes.memory, 64 * SLOT
    left = memory.total - memory.weights - memory.workspace
    assert memory.kv_cache == sizes.num_pages * page
    assert left * fraction - page < memory.kv_cache <= left * fraction
    # The logits of every row and the widest activations of every token at the very least.
    assert memory.workspace > 256 * 1000 * 4 + 2048 * 128 * 2


def test_on_cpu_the_cache_is_what_a_full_batch_can_use():
    sizes = plan(platform="cpu", max_batch_size=2, max_seq_len=100)
    assert sizes.num_pages == 2 * 4 + 1  # pages for both sequences, and the dump page
    capped = plan(platform="cpu", free=64 * GIB, slot=2**18, max_batch_size=64)
    assert CPU_CACHE_CAP - 2**23 < capped.memory.kv_cache <= CPU_CACHE_CAP
    small = plan(platform="cpu", free=GIB + 200 * 2**20)
    assert small.memory.kv_cache < 0.9 * 200 * 2**20


def test_sequences_are_no_longer_than_the_cache():
    short = plan(free=GIB + 60 * 2**20, max_batch_size=4, max_num_tokens=64)
    held = (short.num_pages - 1) * 64
    assert short.limits.max_seq_len == held < 4096
    with pytest.raises(InsufficientMemoryError, match=f"holds {held} tokens.*max_seq_len") as told:
        plan(free=GIB + 60 * 2**20, max_batch_size=4, max_num_tokens=64, max_seq_len=held + 1)
    assert "raise free_memory_fraction or num_pages" in str(told.value)
    exact = plan(free=GIB + 60 * 2**20, max_batch_size=4, max_num_tokens=64, max_seq_len=held)
    assert exact.limits.max_seq_len == held


def test_what_fits_is_told_to_the_byte():
    engine = {"num_pages": 40, "max_batch_size": 4, "max_num_tokens": 64}
    memory = plan(**engine).memory
    needed = memory.weights + memory.workspace + memory.kv_cache
    assert plan(free=needed, **engine).num_pages == 40
    with pytest.raises(InsufficientMemoryError, match="does not fit"):
        plan(free=needed - 1, **engine)


def test_a_sequence_must_have_room_for_a_prompt_and_a_token():
    with pytest.raises(ConfigError, match="max_seq_len must be at least 2"):
        plan(max_seq_len=1)


def test_errors_have_the_sum_by_component():
    with pytest.raises(InsufficientMemoryError) as told:
        plan(weights=9 * GIB)
    text = str(told.value)
    assert "weights                      9.00 GiB" in text
    assert "memory there is              8.00 GiB" in text
    assert "KV cache                     0.00 GiB" in text
    assert "tensor_parallel_size" in text
    assert Memory(GIB, 0, GIB // 2, 2 * GIB).table().count("\n") == 3
