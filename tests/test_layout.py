"""Trees of small arrays as one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.layout import ALIGNMENT, Layout

TREE = {
    "ids": np.arange(6, dtype=np.int32).reshape(2, 3) - 3,
    "count": np.array(-7, np.int32),
    "scores": np.array([0.0, -0.0, 1.5, np.inf, np.nan, 1e-45], np.float32),
    "seeds": np.array([0, 2**31, 2**32 - 1], np.uint32),
    "none": np.zeros((0, 4), np.int32),
    "whole": np.full(ALIGNMENT, 9, np.int32),
}


def bits(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf).view(np.uint32).tolist(), tree)


def test_what_is_joined_in_compiled_code_is_split_on_the_host_and_there():
    layout = Layout(TREE)
    joined = jax.jit(layout.join)(TREE)
    assert joined.shape == (layout.size,)
    assert joined.dtype == jnp.int32
    split = layout.split(np.asarray(joined))
    for name, leaf in TREE.items():
        assert split[name].shape == leaf.shape
        assert split[name].dtype == leaf.dtype
    assert bits(split) == bits(TREE)
    assert bits(jax.jit(layout.split)(joined)) == bits(TREE)


def test_views_of_one_array_are_filled_and_overlap_nowhere():
    layout = Layout(TREE)
    joined = np.full(layout.size, 1234567, np.int32)
    views = layout.split(joined)
    for name, leaf in TREE.items():
        assert np.shares_memory(views[name], joined) == (leaf.size > 0)
        views[name][...] = leaf
    assert bits(layout.split(joined)) == bits(TREE)
    assert np.count_nonzero(joined == 1234567) == layout.size - sum(
        leaf.size for leaf in TREE.values()
    )


@pytest.mark.parametrize("like", [{"a": np.zeros(1, np.int32), "b": TREE["ids"]}, TREE])
def test_each_leaf_begins_where_a_buffer_of_its_own_would(like):
    layout = Layout(like)
    assert layout.size % ALIGNMENT == 0
    joined = np.zeros(layout.size, np.int32)
    start = joined.__array_interface__["data"][0]
    for leaf in jax.tree.leaves(layout.split(joined)):
        if leaf.size:
            assert (leaf.__array_interface__["data"][0] - start) % 256 == 0
