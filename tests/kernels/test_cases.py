"""The list of named shapes covers what it says, and its shapes are those of real arrays."""

import itertools

import jax
import pytest

from jaxinfer.kernels import cases
from tests.kernels.ragged import Batch


def test_every_pair_of_values_is_covered():
    lines = [line for line in cases._PAIRS if line[0] != "nothing"]
    columns = [dict.fromkeys(values) for values in zip(*lines, strict=True)]
    assert [len(values) for values in columns] == [5, 3, 4, 5, 4, 6, 3, 2, 2]
    for (i, some), (j, others) in itertools.combinations(enumerate(columns), 2):
        pairs = {(line[i], line[j]) for line in lines}
        assert pairs == set(itertools.product(some, others))


def test_names_are_unique():
    assert len(cases.SMALL) == len(cases._PAIRS)
    assert len(cases.REAL) == len(cases.MODELS) * len(cases.BATCHES) + 4 * len(cases.BATCHES)


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
