"""What a cache takes of a chip's memory, as the compilers lay it out."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from jaxinfer import cache, shardings
from jaxinfer.aot import isolate, target
from jaxinfer.configs import load_model_preset
from tests.marks import NEEDS_MOSAIC_GPU

pytestmark = pytest.mark.compile

PAGES = 100
# Model, format, page size, devices: short rows, odd numbers of heads, scales of few heads, tiles
# that are higher than a page.
CASES = (
    ("llama-3.1-8b", "bfloat16", 128, 1),
    ("llama-3.2-1b", "bfloat16", 128, 1),
    ("llama-3.1-8b", "int8", 16, 1),
    ("llama-3.1-8b", "int8", 128, 2),
    ("qwen2.5-0.5b", "fp8_e4m3", 64, 1),
    ("phi-3-mini-4k", "int4", 128, 1),
    ("gemma-3-1b", "fp8_e5m2", 64, 1),
)


def layouts(where: target.Target) -> list[tuple[int, int]]:
    """Of each case what the compiler says of the cache of one layer, and what the engine counts."""
    found, devices = [], target.devices(where)
    for name, stored, page_size, count in CASES:
        config = replace(load_model_preset(name).config, num_layers=1)
        mesh, dtype = shardings.mesh(count, devices), cache.stored_dtype(stored)
        ops = cache.operations(
            "auto", where.chip, config, page_size, jnp.dtype("bfloat16"), dtype, mesh
        )
        shapes = cache.abstract(config, PAGES, page_size, dtype, mesh, row_major=ops.row_major)
        formats = jax.tree.map(lambda leaf: leaf.format, shapes)
        empty = jax.jit(
            lambda shapes=shapes: jax.tree.map(
                lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes
            ),
            out_shardings=formats,
        )
        said = empty.lower().compile().memory_analysis().output_size_in_bytes
        counted = PAGES * cache.bytes_per_page(config, page_size, dtype, mesh, ops)
        found.append((said, counted))
    return found


@pytest.mark.parametrize(
    "chip",
    ["v5e:2", "v6e:2", "v5p:2", "tpu7x:2", pytest.param("h200:2", marks=NEEDS_MOSAIC_GPU)],
)
def test_what_is_counted_is_what_the_compiler_takes(chip):
    found, _ = isolate.run(layouts, target.parse(chip), timeout=600)
    for case, (said, counted) in zip(CASES, found, strict=True):
        # Beside the arrays, the table of where they are.
        assert counted <= said < counted + 1024, case
