"""The KV cache: one pool of pages per layer, as a value that a step takes and returns."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from jaxinfer import shardings
from jaxinfer.config import ModelConfig
from jaxinfer.shapes import Leaf


@struct.dataclass
class Cache:
    """Keys and values of all tokens in flight; entry i of each tuple is layer i's pool.

    A page is `[K, S, H]`: on CPU, attention over this order is ten times faster than over
    `[S, K, H]`.  A slot that no token of a row has written may hold anything finite or not.
    """

    k_PKSH: tuple[Leaf, ...]
    v_PKSH: tuple[Leaf, ...]


def abstract(
    config: ModelConfig, num_pages: int, page_size: int, dtype: jnp.dtype, mesh: Mesh
) -> Cache:
    """The cache's shapes, dtypes and shardings, without its memory."""
    sizes = {**config.sizes, "P": num_pages, "S": page_size}
    page = jax.ShapeDtypeStruct(
        tuple(sizes[axis] for axis in "PKSH"), dtype, sharding=shardings.named(mesh, "PKSH")
    )
    pool = (page,) * config.num_layers
    return Cache(k_PKSH=pool, v_PKSH=pool)


def bytes_per_slot(config: ModelConfig, dtype: jnp.dtype) -> int:
    """Bytes that one token takes over all layers, keys and values, on all devices together."""
    elements = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return elements * jnp.dtype(dtype).itemsize
