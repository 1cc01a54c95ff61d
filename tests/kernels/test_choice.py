"""Which backend serves which chip, shapes and dtypes."""

import jax
import jax.numpy as jnp
import pytest

from jaxinfer import LLM, cache, shardings
from jaxinfer.checkpoint import resolve
from jaxinfer.config import ATTENTION_BACKENDS
from jaxinfer.configs import chips, load_chip
from jaxinfer.errors import ConfigError
from jaxinfer.kernels import choice, paged_attention
from jaxinfer.kernels.write_pages import LARGEST, Pool
from tests.marks import NEEDS_MOSAIC_GPU


def shapes(stored="bfloat16", q="bfloat16", H=128, S=64):
    """Queries and a pool of four KV heads with two query heads each."""
    q_TKGH = jax.ShapeDtypeStruct((1, 4, 2, H), q)
    pages = jax.ShapeDtypeStruct((9, 4, S, H // 2 if stored == "uint8" else H), stored)
    scales = jax.ShapeDtypeStruct((9, 4, S), "float32") if stored in LARGEST else None
    return q_TKGH, Pool(pages, pages, scales, scales)


@NEEDS_MOSAIC_GPU
@pytest.mark.parametrize("stored", ["bfloat16", *LARGEST])
def test_each_chip_gets_its_own_kernels_or_the_reference(stored):
    found = {
        name: choice.choose("auto", load_chip(name), *shapes(stored)).backend for name in chips()
    }
    assert found == {
        "a100": "reference", "l4": "reference", "h100": "mosaic_gpu", "h200": "mosaic_gpu",
        "b200": "mosaic_gpu", "tpu-v5e": "mosaic_tpu", "tpu-v5p": "mosaic_tpu",
        "tpu-v6e": "mosaic_tpu", "tpu7x": "mosaic_tpu",
    }  # fmt: skip


def test_without_a_sheet_there_is_the_reference():
    ops = choice.choose("auto", None, *shapes())
    assert ops.backend == "reference"
    assert ops.paged_attention is paged_attention.paged_attention
    assert "TPUs and NVIDIA GPUs only" in ops.why
    assert not ops.row_major


@pytest.mark.parametrize(
    ("chip", "asked", "options", "words"),
    [
        (None, "mosaic_tpu", {}, r"no TPU that has a sheet .*; what can: reference$"),
        ("h200", "mosaic_tpu", {}, "no TPU that has a sheet"),
        ("tpu-v6e", "mosaic_gpu", {}, "no NVIDIA GPU .*; what can: reference, mosaic_tpu$"),
        ("tpu-v6e", "mosaic_tpu", {"S": 8}, "page_size must be a multiple of 16, not 8"),
        pytest.param("a100", "mosaic_gpu", {}, "neither wgmma nor tcgen05", marks=NEEDS_MOSAIC_GPU),
        pytest.param(
            "h100", "mosaic_gpu", {"q": "float32"}, "queries are float32", marks=NEEDS_MOSAIC_GPU
        ),
    ],
)
def test_who_asks_for_what_cannot_serve_is_told_why_and_what_can(chip, asked, options, words):
    sheet = None if chip is None else load_chip(chip)
    with pytest.raises(
        ConfigError, match=f"attention_backend: {asked} cannot serve here: .*{words}"
    ):
        choice.choose(asked, sheet, *shapes(**options))
    assert choice.choose("reference", sheet, *shapes(**options)).backend == "reference"


@NEEDS_MOSAIC_GPU
def test_auto_says_why_a_chip_does_not_get_its_kernels():
    ops = choice.choose("auto", load_chip("h200"), *shapes(q="float32"))
    assert (ops.backend, ops.why) == ("reference", "queries are float32, not bfloat16")


def test_the_engine_takes_a_backend_by_name(tiny_model):
    options = {"load_format": "dummy", "skip_tokenizer_init": True, "num_pages": 9}
    with LLM(tiny_model, **options, max_batch_size=1, max_num_tokens=4) as llm:
        assert llm.step.ops.backend == "reference"
    with pytest.raises(ConfigError, match="mosaic_gpu cannot serve here"):
        LLM(tiny_model, **options, attention_backend="mosaic_gpu")
    with pytest.raises(ConfigError, match="attention_backend must be one of auto, reference"):
        LLM(tiny_model, **options, attention_backend="cuda")
    assert set(ATTENTION_BACKENDS) == {"reference", *choice._KERNELS}


def test_pools_of_row_major_kernels_keep_their_order(tiny_model):
    config = resolve(tiny_model, "dummy").config
    options = dict(num_pages=3, page_size=8, dtype=jnp.dtype("int8"), mesh=shardings.mesh(1))
    pool = cache.abstract(config, **options, row_major=True).pools[0]
    assert pool.k_PKSH.format.layout.major_to_minor == (0, 1, 2, 3)
    assert pool.v_scale_PKS.format.layout.major_to_minor == (0, 1, 2)
    assert cache.abstract(config, **options).pools[0].k_PKSH.format.layout is None
