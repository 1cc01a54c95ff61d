"""The attention reference against a float64 softmax written out per token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.errors import ShapeError
from jaxinfer.kernels.paged_attention import paged_attention
from jaxinfer.kernels.write_pages import LARGEST, Pool, quantize, unpack, write_pages
from tests.kernels.ragged import build, expected, split

# (query length, context length with it) of each row; rows of one token come first.
CASES = {
    "decode": [(1, 1), (1, 17), (1, 40), (1, 8)],
    "one long prefill": [(70, 70)],
    "chunk of a prefill": [(13, 45)],
    "mixed": [(1, 9), (1, 32), (5, 5), (66, 80), (2, 33)],
    "nothing but padding": [],
}


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("K", "G", "H", "S"), [(1, 1, 12, 4), (2, 3, 64, 16), (3, 4, 20, 8)])
def test_matches_a_plain_softmax(case, K, G, H, S, window, kernel_ran):
    for op in ("paged_attention", "write_pages"):
        kernel_ran(op, "reference", "float32", "cpu")
    lens = CASES[case]
    total = sum(queries for queries, _ in lens)
    (q, k_pages, v_pages, k_new, v_new), rows, contexts = build(
        lens, num_tokens=total + 3, num_rows=max(len(lens) + 1, 1), K=K, G=G, H=H, S=S
    )

    @jax.jit
    def run(q, k_pages, v_pages, k_new, v_new, rows):
        pool = write_pages(Pool(k_pages, v_pages), k_new, v_new, rows)
        return paged_attention(q, pool, rows, scale=0.3, window=window)

    out = np.asarray(run(q, k_pages, v_pages, k_new, v_new, rows))
    want = expected(np.asarray(q, np.float64), lens, contexts, 0.3, window)
    np.testing.assert_allclose(out[:total], want[:total], rtol=2e-5, atol=2e-5)
    assert np.isfinite(out).all(), "padding must come out finite"


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("case", ["decode", "mixed"])
def test_soft_cap(case, window):
    """With a cap of 1.5 on scores of deviation 3.2; without it the results are far off."""
    lens = CASES[case]
    total = sum(queries for queries, _ in lens)
    (q, k_pages, v_pages, k_new, v_new), rows, contexts = build(
        lens, num_tokens=total + 3, num_rows=len(lens) + 1, K=2, G=3, H=16, S=8
    )
    pool = write_pages(Pool(k_pages, v_pages), k_new, v_new, rows)
    out = np.asarray(paged_attention(q, pool, rows, scale=0.8, window=window, soft_cap=1.5))
    want = expected(np.asarray(q, np.float64), lens, contexts, 0.8, window, 1.5)
    np.testing.assert_allclose(out[:total], want[:total], rtol=2e-5, atol=2e-5)
    assert np.isfinite(out).all(), "padding must come out finite"
    uncapped = expected(np.asarray(q, np.float64), lens, contexts, 0.8, window)
    assert np.abs(out[:total] - uncapped[:total]).max() > 0.5


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("case", ["decode", "mixed"])
def test_sinks_take_their_share(case, window):
    lens = CASES[case]
    total = sum(queries for queries, _ in lens)
    (q, k_pages, v_pages, k_new, v_new), rows, contexts = build(
        lens, num_tokens=total + 3, num_rows=len(lens) + 1, K=2, G=3, H=16, S=8
    )
    sinks = np.random.default_rng(1).normal(size=(2, 3)) * 2
    pool = write_pages(Pool(k_pages, v_pages), k_new, v_new, rows)
    out = np.asarray(
        paged_attention(q, pool, rows, scale=0.3, window=window, sinks_KG=jnp.asarray(sinks))
    )
    want = expected(np.asarray(q, np.float64), lens, contexts, 0.3, window, sinks=sinks)
    np.testing.assert_allclose(out[:total], want[:total], rtol=2e-5, atol=2e-5)
    assert np.isfinite(out).all(), "padding must come out finite"


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("case", ["decode", "mixed"])
def test_quantized_pools(case, dtype, kernel_ran):
    """Attention over what the pool stores is exact; what it stores is close to what was given."""
    for op in ("paged_attention", "write_pages"):
        kernel_ran(op, "reference", dtype, "cpu")
    lens = CASES[case]
    total = sum(queries for queries, _ in lens)
    (q, k_pages, v_pages, k_new, v_new), rows, contexts = build(
        lens, num_tokens=total + 3, num_rows=len(lens) + 1, K=2, G=3, H=16, S=8
    )
    (k_pages, k_scale), (v_pages, v_scale) = quantize(k_pages, dtype), quantize(v_pages, dtype)
    pool = write_pages(Pool(k_pages, v_pages, k_scale, v_scale), k_new, v_new, rows)
    assert pool.k_PKSH.dtype == dtype
    assert pool.shape == (*k_scale.shape, 16)
    out = np.asarray(paged_attention(q, pool, rows, scale=0.3))

    def stored(values):
        values, scale = quantize(jnp.asarray(values), dtype)
        return np.asarray(unpack(values, jnp.float32) * scale[..., None], np.float64)

    kept = [tuple(map(stored, pair)) for pair in contexts]
    want = expected(np.asarray(q, np.float64), lens, kept, 0.3, None)
    np.testing.assert_allclose(out[:total], want[:total], rtol=3e-5, atol=3e-5)
    near = {"float8_e4m3fn": 0.2, "float8_e5m2": 0.4, "int8": 0.02, "uint8": 0.3}[dtype]
    exact = expected(np.asarray(q, np.float64), lens, contexts, 0.3, None)
    np.testing.assert_allclose(out[:total], exact[:total], atol=near)


def test_a_row_per_token_gives_the_same():
    lens = [(1, 9), (5, 5), (6, 20)]
    kinds = {"K": 2, "G": 3, "H": 16, "S": 8}
    (q, k_pages, v_pages, k_new, v_new), rows, contexts = build(
        lens, num_tokens=14, num_rows=4, **kinds
    )
    pool = write_pages(Pool(k_pages, v_pages), k_new, v_new, rows)
    out = np.asarray(paged_attention(q, pool, split(rows), scale=0.3, window=6))
    want = expected(np.asarray(q, np.float64), lens, contexts, 0.3, 6)
    np.testing.assert_allclose(out[:12], want[:12], rtol=2e-5, atol=2e-5)


def test_bfloat16_stays_close(kernel_ran):
    for op in ("paged_attention", "write_pages"):
        kernel_ran(op, "reference", "bfloat16", "cpu")
    lens = CASES["mixed"]
    (q, k_pages, v_pages, k_new, v_new), rows, contexts = build(
        lens, num_tokens=80, num_rows=6, K=2, G=2, H=16, S=8, dtype=jnp.bfloat16
    )
    pool = write_pages(Pool(k_pages, v_pages), k_new, v_new, rows)
    out = paged_attention(q, pool, rows, scale=0.25)
    assert out.dtype == jnp.bfloat16
    want = expected(np.asarray(q, np.float64), lens, contexts, 0.25, None)
    total = sum(queries for queries, _ in lens)
    np.testing.assert_allclose(np.asarray(out, np.float64)[:total], want[:total], atol=0.05)


def test_writes_land_in_their_slots_and_padding_in_page_zero():
    lens = [(1, 6), (3, 5)]
    (_, k_pages, v_pages, k_new, v_new), rows, contexts = build(
        lens, num_tokens=7, num_rows=3, K=1, G=1, H=4, S=4
    )
    k_after = write_pages(Pool(k_pages, v_pages), k_new, v_new, rows).k_PKSH
    before, after = np.asarray(k_pages), np.asarray(k_after)
    changed = {
        (page, slot)
        for page, slot in np.argwhere((np.nan_to_num(before) != np.nan_to_num(after)).any((1, 3)))
        if page
    }
    table = np.asarray(rows.page_table_BM)
    assert changed == {
        (table[0, 1], 1), (table[1, 0], 2), (table[1, 0], 3), (table[1, 1], 0)
    }  # fmt: skip
    np.testing.assert_allclose(after[table[0, 1], 0, 1], contexts[0][0][5, 0], rtol=1e-6)


def test_shapes_that_disagree_are_named():
    (q, k_pages, v_pages, *_), rows, _ = build(
        [(1, 3)], num_tokens=2, num_rows=1, K=2, G=1, H=4, S=4
    )
    with pytest.raises(ShapeError, match=r"pool_PKSH has K=1, but q_TKGH has K=2"):
        paged_attention(q, Pool(k_pages[:, :1], v_pages[:, :1]), rows, scale=1.0)
