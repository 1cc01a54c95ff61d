"""Steps of a real model, as large as it is, compiled for chips that are not here: what they move.

Llama 3.1 8B in bfloat16; 64 requests of 1,024 tokens each, in a cache of just that size; a decode
step of them all, and one of 2,048 tokens for prompts, alone or beside rows that decode.
"""

import pytest

from jaxinfer.aot import Workload, compile_engine
from jaxinfer.configs import load_model_preset
from tests.marks import NEEDS_MOSAIC_GPU

pytestmark = pytest.mark.compile

MODEL, ROWS, CONTEXT, PREFILL, BYTES = "llama-3.1-8b", 64, 1024, 2048, 2
# How much more than the least may be moved.
LIMIT = 1.15

SIZES = load_model_preset(MODEL).config.sizes
L, D, F, K, G, H, V = (
    load_model_preset(MODEL).config.num_layers,
    *(SIZES[letter] for letter in "DFKGHV"),
)
MATRICES = {"qkv": D * K * (G + 2) * H, "out": K * G * H * D, "gate, up": 2 * D * F, "down": F * D}
WEIGHTS = L * sum(MATRICES.values()) * BYTES
HEAD = V * D * BYTES
SLOT = 2 * K * H * L * BYTES
CACHE = ROWS * CONTEXT * SLOT
# What XLA's part of a layer must write and read of each token, in elements.
ACTIVATIONS = L * (
    2 * 2 * D  # the normed inputs of two products
    + 2 * K * (G + 2) * H  # queries, keys and values, as the product returns them
    + K * (G + 2) * H  # rotated: written, for the kernels read them
    + K * G * H  # what the kernels return
    + 2 * 2 * F + 2 * F  # gates and what they let through; what becomes of both
    + 2 * 2 * D + 2 * 2 * D  # two products, and their sums with what was before
)  # fmt: skip


@pytest.mark.parametrize(
    ("target", "page_size"),
    [("v6e:1", 128), ("tpu7x:1", 128), pytest.param("h200:1", 64, marks=NEEDS_MOSAIC_GPU)],
)
def test_steps_move_little_more_than_they_must(target, page_size):
    found = compile_engine(
        target, Workload(model=MODEL, batch=ROWS, context=CONTEXT, prefill=PREFILL), timeout=3600
    )
    decode, prefill, head = (found.programs[name] for name in ("decode", "prefill", "head"))
    cache = CACHE + page_size * SLOT  # and the dump page
    assert found.fits
    assert found.kv_cache == cache

    # The head: logits are written, and read to sample.
    least = WEIGHTS + HEAD + CACHE + ROWS * SLOT + 2 * ROWS * V * 4
    ratio = (decode.hbm_bytes + head.hbm_bytes) / least
    # What kernels are charged for the cache, of which prompts read little, must not hide the rest.
    moved = prefill.hbm_bytes - prefill.kernel_bytes
    prefill_ratio = moved / (WEIGHTS + PREFILL * ACTIVATIONS * BYTES)
    print(f"{target}: decode {ratio:.3f}, prefill {prefill_ratio:.3f} of the least bytes")
    assert 1 <= ratio <= LIMIT
    assert moved > WEIGHTS
    assert prefill_ratio <= LIMIT
    assert decode.kernel_bytes >= CACHE
    assert prefill.kernel_bytes >= CACHE

    # Of each layer: the kernels that write and attend.
    assert sum(decode.kernels.values()) == 2 * L
    assert sum(prefill.kernels.values()) == 3 * L
    for program in (decode, prefill, head):
        assert program.f64 == 0
        assert program.host_callbacks == ()
        assert len(program.aliased) == program.donated
        smallest = V * D if program is head else min(MATRICES.values())
        assert all(one.bytes < smallest * BYTES for one in program.copies)
        assert program.largest.get("f32", 0) < smallest * 4
    assert decode.donated == prefill.donated == 2 * L + 6  # pools, and what is beside
    assert min(decode.memory.aliased, prefill.memory.aliased) >= cache
