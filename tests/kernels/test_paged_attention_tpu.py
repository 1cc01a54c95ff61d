"""The TPU kernel of attention, in the interpreter, against a float64 softmax written per token."""

from functools import partial

import numpy as np
import pytest

from jaxinfer.kernels import cases
from jaxinfer.kernels.paged_attention_tpu import paged_attention
from jaxinfer.kernels.paged_attention_tpu_body import Blocks
from tests.kernels.ragged import Batch
from tests.kernels.tpu_interpreter import parameters, run

SCALE = 0.2
# Weights are rounded to the type of the queries before they meet the values.
CLOSE = {"float32": 2e-5, "bfloat16": 2e-2}


def blocks(index: int, case: cases.Case) -> tuple[Blocks, Blocks]:
    """Small ones, so that there are several of each, and not the same for all cases."""
    heads = 1 if index % 2 else case.K
    pages = 1 if index % 3 == 0 else 2
    return (
        Blocks(1, pages, heads, parts=1 + index % 2, depth=2 + index % 3),
        Blocks(8, pages, heads, parts=1 + (index + 1) % 2, depth=2 + index % 2),
    )


@pytest.mark.parametrize("name", cases.SMALL)
def test_matches_a_plain_softmax(name):
    case, index = cases.SMALL[name], list(cases.SMALL).index(name)
    batch = Batch.of(case, SCALE)
    single, tiles = blocks(index, case)
    attend = partial(
        paged_attention, scale=SCALE, window=case.window, soft_cap=case.soft_cap,
        vmem_bytes=16 * 2**20, single=single, tiles=tiles, interpret=parameters(),
    )  # fmt: skip
    out = run(
        lambda q, pool, rows, sinks: attend(q, pool, rows, sinks_KG=sinks),
        batch.q, batch.after, batch.rows, batch.sinks,
    )  # fmt: skip
    out = np.asarray(out, np.float64)
    np.testing.assert_allclose(
        out[: case.num_tokens], batch.want, rtol=CLOSE[case.dtype], atol=CLOSE[case.dtype]
    )
    assert np.isfinite(out).all(), "padding must come out finite"
