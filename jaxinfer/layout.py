"""A tree of small arrays as one, so that one copy takes it to the device or back."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

# Elements of four bytes: arrays of their own begin at multiples of 256 bytes, and GPU kernels
# rely on it.
ALIGNMENT = 64


class Layout:
    """Where each leaf of a tree lies in one array of int32.

    like: the tree, with anything that has shape and dtype for leaves; of dtypes, those of 4 bytes.
    size: elements of the one array.
    """

    def __init__(self, like: Any):
        self._leaves, self._structure = jax.tree.flatten(like)
        sizes = [math.prod(leaf.shape) for leaf in self._leaves]
        self._paddings = [-size % ALIGNMENT for size in sizes]
        ends = np.add(sizes, self._paddings).cumsum().tolist()
        starts = [0, *ends[:-1]]
        self._places = [slice(at, at + size) for at, size in zip(starts, sizes, strict=True)]
        self.size = ends[-1]

    def split(self, joined: Any) -> Any:
        """The tree: of a NumPy array, views of it, which may also be filled."""
        return self._structure.unflatten(
            joined[place].view(leaf.dtype).reshape(leaf.shape)
            for place, leaf in zip(self._places, self._leaves, strict=True)
        )

    def join(self, tree: Any) -> Array:
        """The one array, in compiled code."""
        flat = [leaf.reshape(-1).view(jnp.int32) for leaf in self._structure.flatten_up_to(tree)]
        return jnp.concatenate(
            [jnp.pad(leaf, (0, more)) for leaf, more in zip(flat, self._paddings, strict=True)]
        )
