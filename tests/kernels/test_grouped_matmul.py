"""Visits by enumeration, and the reference of grouped products against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.errors import ShapeError
from jaxinfer.kernels import cases
from jaxinfer.kernels.grouped_matmul import grouped_matmul, visits
from jaxinfer.kernels.quantized import FORMATS
from jaxinfer.kernels.quantized_matmul import quantized_matmul
from tests.kernels.groups import build, expected

planned = jax.jit(visits, static_argnums=(1, 2))


@given(st.lists(st.integers(0, 12), min_size=5, max_size=5), st.sampled_from([1, 3, 8]))
def test_every_token_of_a_group_is_visited_once(sizes, tile):
    total = 61
    plan = planned(jnp.asarray(sizes, jnp.int32), total, tile)
    owner = np.full(total, -1)
    seen = []
    for visit in range(int(plan.count)):
        begin, end = int(plan.begin[visit]), int(plan.end[visit])
        assert begin < end, "no visit is for nothing"
        assert begin // tile == (end - 1) // tile == int(plan.tile[visit])
        assert (owner[begin:end] == -1).all()
        owner[begin:end] = int(plan.expert[visit])
        seen.append(begin)
    assert seen == sorted(seen)
    np.testing.assert_array_equal(owner[: sum(sizes)], np.repeat(np.arange(len(sizes)), sizes))
    assert (owner[sum(sizes) :] == -1).all()
    assert len(plan.expert) >= int(plan.count)


STACKS = [name for name, case in cases.SMALL_PRODUCTS.items() if not case.single]


@pytest.mark.parametrize("name", STACKS)
def test_matches_float64(name, kernel_ran):
    case = cases.SMALL_PRODUCTS[name]
    kernel_ran("grouped_matmul", "reference", case.format or "float32", "cpu")
    x, weight, sizes = build(case)
    out = np.asarray(grouped_matmul(x, weight, sizes))
    want = expected(x, weight, case.groups)
    np.testing.assert_allclose(out, want, rtol=0, atol=3e-6 * max(np.abs(want).max(), 1))
    assert not out[case.num_tokens :].any(), "what is behind the groups comes out zero"


@pytest.mark.parametrize("name", [None, "int8", "mxfp4"])
def test_bfloat16_stays_close(name, kernel_ran):
    kernel_ran("grouped_matmul", "reference", name or "bfloat16", "cpu")
    case = cases.Product(cases.GROUPS["gaps"], 256, 160, name)
    x, weight, sizes = build(case, jnp.bfloat16)
    out = grouped_matmul(x, weight, sizes)
    assert out.dtype == jnp.bfloat16
    want = expected(x, weight, case.groups)
    np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=2**-8, atol=0.2)


@pytest.mark.parametrize("name", FORMATS)
def test_one_group_is_a_quantized_matmul(name):
    x, weight, sizes = build(cases.Product((11,), 256, 160, name))
    out = np.asarray(grouped_matmul(x, weight, sizes))[:11]
    one = jax.tree.map(lambda leaf: leaf[0], weight)
    np.testing.assert_allclose(out, np.asarray(quantized_matmul(x, one))[:11], rtol=1e-4, atol=1e-4)


def test_shapes_that_disagree_are_named():
    with pytest.raises(ShapeError, match=r"group_sizes_E has E=3, but weight_EDF has E=2"):
        grouped_matmul(jnp.ones((4, 8)), jnp.ones((2, 8, 8)), jnp.ones(3, jnp.int32))
