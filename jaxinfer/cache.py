"""The KV cache: one pool of pages per layer, as a value that a step takes and returns."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh

from jaxinfer import shardings
from jaxinfer.config import ModelConfig
from jaxinfer.configs import Chip
from jaxinfer.kernels.choice import PageOps, choose
from jaxinfer.kernels.write_pages import LARGEST, Pool

# What `kv_cache_dtype` calls the formats whose numpy name is another.
STORED = {"fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2", "int4": "uint8"}


@struct.dataclass
class Cache:
    """Keys and values of all tokens in flight, a pool for each layer.

    A page is `[K, S, H]`: on CPU, attention over this order is ten times faster than over
    `[S, K, H]`.  A slot that no token of a row has written may hold anything finite or not.
    """

    pools: tuple[Pool, ...]


def stored_dtype(name: str) -> jnp.dtype:
    """The dtype of a pool's arrays for a `kv_cache_dtype`."""
    return jnp.dtype(STORED.get(name, name))


def _width(config: ModelConfig, dtype: jnp.dtype) -> int:
    """Elements that one head's key takes: four-bit values lie two in a byte."""
    return config.head_dim // 2 if dtype == jnp.uint8 else config.head_dim


def abstract(
    config: ModelConfig,
    num_pages: int,
    page_size: int,
    dtype: jnp.dtype,
    mesh: Mesh,
    *,
    row_major: bool = False,
) -> Cache:
    """The cache's shapes, dtypes and shardings, without its memory.

    row_major: the kernels need its arrays in the order of their axes, which XLA may not choose.
    """
    sizes = {**config.sizes, "P": num_pages, "S": page_size, "H": _width(config, dtype)}

    def array(axes: str, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        shape, place = tuple(sizes[axis] for axis in axes), shardings.named(mesh, axes)
        order = Layout(tuple(range(len(axes)))) if row_major else None
        return jax.ShapeDtypeStruct(shape, dtype, sharding=Format(order, place))

    pages = array("PKSH", dtype)
    scales = array("PKS", jnp.dtype(jnp.float32)) if dtype.name in LARGEST else None
    return Cache((Pool(pages, pages, scales, scales),) * config.num_layers)


def bytes_per_page(
    config: ModelConfig, page_size: int, dtype: jnp.dtype, mesh: Mesh, ops: PageOps
) -> int:
    """Bytes that a page takes of each device's memory over all layers, padding included."""
    page = abstract(config, 1, page_size, dtype, mesh)
    return sum(
        ops.array_bytes(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
        for leaf in jax.tree.leaves(page)
    )


def bytes_per_slot(config: ModelConfig, dtype: jnp.dtype) -> int:
    """Bytes of one token's keys and values over all layers, on all devices together: the least that
    attention must read of it.  What it takes in memory may be more: `bytes_per_page`."""
    scale_bytes = 4 if dtype.name in LARGEST else 0
    one = _width(config, dtype) * dtype.itemsize + scale_bytes
    return 2 * config.num_layers * config.num_kv_heads * one


def operations(
    asked: str,
    chip: Chip | None,
    config: ModelConfig,
    page_size: int,
    dtype: jnp.dtype,
    cache_dtype: jnp.dtype,
    mesh: Mesh,
) -> PageOps:
    """The operations over pages that serve a model on a mesh of these chips: see `choice.choose`.

    asked: `EngineConfig.attention_backend`.
    """
    pool = abstract(config, 1, page_size, cache_dtype, mesh).pools[0]
    queries = jax.ShapeDtypeStruct(
        tuple(config.sizes[axis] if axis != "T" else 1 for axis in "TKGH"), dtype,
        sharding=shardings.named(mesh, "TKGH"),
    )  # fmt: skip

    def one_device(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)

    return choose(asked, chip, *jax.tree.map(one_device, (queries, pool)))
