"""The TPU kernel of attention, in the interpreter, against a float64 softmax written per token."""

import itertools
from functools import partial

import numpy as np
import pytest

from jaxinfer.errors import ShapeError
from jaxinfer.kernels import cases
from jaxinfer.kernels.paged_attention_tpu import block_sizes, paged_attention, vmem_needed
from jaxinfer.kernels.paged_attention_tpu_body import Blocks
from jaxinfer.kernels.tpu import LANES
from tests.kernels.ragged import Batch
from tests.kernels.tpu_interpreter import parameters, run

SCALE = 0.2
# Weights are rounded to the type of the queries before they meet the values.
CLOSE = {"float32": 2e-5, "bfloat16": 2e-2}


def attend(case: cases.Case, single: Blocks, tiles: Blocks, num_cores: int = 1) -> None:
    batch = Batch.of(case, SCALE)
    attention = partial(
        paged_attention, scale=SCALE, window=case.window, soft_cap=case.soft_cap, vmem_bytes=2**24,
        single=single, tiles=tiles, num_cores=num_cores, interpret=parameters(num_cores),
    )  # fmt: skip
    out = run(
        lambda q, pool, rows, sinks: attention(q, pool, rows, sinks_KG=sinks),
        batch.q, batch.after, batch.rows, batch.sinks,
    )  # fmt: skip
    out = np.asarray(out, np.float64)
    close = CLOSE[case.dtype]
    np.testing.assert_allclose(out[: case.num_tokens], batch.want, rtol=close, atol=close)
    assert np.isfinite(out).all(), "padding must come out finite"


def blocks(index: int, case: cases.Case) -> tuple[Blocks, Blocks]:
    """Small ones, so that there are several of each, and not the same for all cases."""
    heads = 1 if index % 2 else case.K
    pages = 1 if index % 3 == 0 else 2
    return (
        Blocks(1, pages, heads, parts=1 + index % 2, depth=2 + index % 3),
        Blocks(8, pages, heads, parts=1 + (index + 1) % 2, depth=2 + index % 2),
    )


@pytest.mark.parametrize("name", cases.SMALL)
def test_matches_a_plain_softmax(name, kernel_ran):
    case, index = cases.SMALL[name], list(cases.SMALL).index(name)
    kernel_ran("paged_attention", "mosaic_tpu", case.stored, "interpreted")
    attend(case, *blocks(index, case))


@pytest.mark.parametrize("K", [1, 2])
def test_two_cores_share_rows_or_heads(K):
    case = cases.Case(cases.ROWS["mixed"], K=K, G=2, H=64, S=32)
    parts = 2 // K
    attend(case, Blocks(1, 2, 1, parts), Blocks(8, 2, 1, parts), num_cores=2)


def test_page_tables_longer_than_a_line():
    """150 pages of a row, of which a window looks at the last ones: their second line is copied."""
    case = cases.Case(((1, 2400), (1, 17), (1, 2100)), K=1, G=2, H=64, S=16, window=100)
    attend(case, Blocks(1, 4, 1), Blocks(8, 4, 1))


@pytest.mark.parametrize("name", cases.REAL)
def test_block_sizes_fit(name):
    """On chips of any size, for rows of one token and for tiles, on one core and two."""
    case = cases.REAL[name]
    q_TKGH, pool, rows = cases.abstract(case)
    for vmem_bytes in (12 * 2**20, 48 * 2**20, 96 * 2**20):
        for single, num_cores in itertools.product((True, False), (1, 2)):
            blocks = block_sizes(
                q_TKGH, pool, rows, single=single, vmem_bytes=vmem_bytes, num_cores=num_cores
            )
            assert vmem_needed(blocks, q_TKGH, pool) <= vmem_bytes
            assert case.K % blocks.heads == 0
            assert case.K // blocks.heads * blocks.parts % num_cores == 0
            assert blocks.queries == 1 if single else blocks.queries <= case.num_tokens
            assert blocks.queries & (blocks.queries - 1) == 0
            assert blocks.pages * case.S % LANES == 0


def test_what_cannot_fit_is_refused():
    q_TKGH, pool, rows = cases.abstract(cases.REAL["llama-3.1-8b, prefill 2048"])
    with pytest.raises(ShapeError, match=r"pages \(33, 8, 64, 128\).*1000 bytes"):
        block_sizes(q_TKGH, pool, rows, single=False, vmem_bytes=1000)
