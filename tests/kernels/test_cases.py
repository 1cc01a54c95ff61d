"""The list of named shapes covers what it says, and its shapes are those of real arrays."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from jaxinfer.kernels import cases
from tests.kernels.groups import build
from tests.kernels.ragged import Batch


@pytest.mark.parametrize(
    ("lines", "sizes"),
    [(cases._PAIRS, [5, 3, 4, 5, 4, 6, 3, 2, 2]), (cases._PRODUCT_PAIRS, [5, 8, 2, 2])],
)
def test_every_pair_of_values_is_covered(lines, sizes):
    assert len(lines) <= 100
    lines = [line for line in lines if line[0] not in ("nothing", "none")]
    columns = [dict.fromkeys(values) for values in zip(*lines, strict=True)]
    assert [len(values) for values in columns] == sizes
    for (i, some), (j, others) in itertools.combinations(enumerate(columns), 2):
        pairs = {(line[i], line[j]) for line in lines}
        assert pairs == set(itertools.product(some, others))


def test_names_are_unique():
    assert len(cases.SMALL) == len(cases._PAIRS)
    assert len(cases.REAL) == len(cases.MODELS) * len(cases.BATCHES) + 4 * len(cases.BATCHES) + 1


@pytest.mark.parametrize("name", list(cases.SMALL)[::4])
def test_abstract_shapes_are_those_of_a_batch(name):
    """But for the padding, and for pages that nobody holds."""
    case = cases.SMALL[name]
    batch = Batch.of(case, scale=1.0, padding=0)
    _, *page = batch.after.k_PKSH.shape
    q_TKGH, pool, rows = cases.abstract(case)
    assert (q_TKGH.shape, q_TKGH.dtype) == (batch.q.shape, batch.q.dtype)
    assert list(pool.k_PKSH.shape[1:]) == page
    assert pool.k_PKSH.dtype == batch.after.k_PKSH.dtype
    assert pool.shape[1:] == (case.K, case.S, case.H)
    assert (pool.k_scale_PKS is None) == (batch.after.k_scale_PKS is None)
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(batch.rows)]
    assert [leaf.dtype for leaf in jax.tree.leaves(rows)] == dtypes


@pytest.mark.parametrize("name", list(cases.SMALL_PRODUCTS)[::4])
def test_abstract_shapes_are_those_of_a_product(name):
    """But for the five tokens of no group."""
    case = cases.SMALL_PRODUCTS[name]
    x_TD, weight, sizes = build(case, jnp.bfloat16)
    found = cases.abstract_product(case)
    x_TD = x_TD[: case.num_tokens]
    if case.single:
        weight, sizes = jax.tree.map(lambda leaf: leaf[0], weight), None
    want = jax.eval_shape(lambda: (x_TD, weight, sizes))
    assert jax.tree.structure(found) == jax.tree.structure(want)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)


def test_routed_tokens_are_all_there():
    for name, case in cases.REAL_PRODUCTS.items():
        model, step, _ = name.split(", ")
        each = cases.EXPERTS[model][1] if model in cases.EXPERTS else 1
        assert case.num_tokens == each * int(step.split()[1]), name
        assert case.single == (model not in cases.EXPERTS)
