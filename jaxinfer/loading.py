"""From a model's name to weights on devices, with every size decided on the way."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxinfer import cache, checkpoint, planner, saving, shardings
from jaxinfer.checkpoint import ModelFiles
from jaxinfer.config import EngineConfig, ModelConfig
from jaxinfer.configs import find_chip
from jaxinfer.errors import ConfigError, TokenizerError
from jaxinfer.hardware import enable_compile_cache, free_bytes
from jaxinfer.kernels.choice import PageOps
from jaxinfer.models import decoder
from jaxinfer.planner import Sizes
from jaxinfer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A model on its devices, and what was decided about it.

    tokenizer: None if not wanted.  tokenizer_folder: where its files are; None if nowhere.
    """

    config: ModelConfig
    mesh: Mesh
    dtype: jnp.dtype
    cache_dtype: jnp.dtype
    sizes: Sizes
    ops: PageOps
    tokenizer: Tokenizer | None
    tokenizer_folder: Path | None
    weights: dict[str, Any]


def load(model: str | Path, engine: EngineConfig) -> Loaded:
    """Find the model, size the cache, then read the weights: what cannot work fails early.

    Raises `ConfigError`, `CheckpointError`, `TokenizerError` or `InsufficientMemoryError`.
    """
    files = checkpoint.resolve(model, engine.load_format)
    mesh = shardings.mesh(engine.tensor_parallel_size, engine.devices)
    shardings.check_divisible(files.config.sizes, engine.tensor_parallel_size)
    enable_compile_cache()
    device = mesh.devices.flat[0]
    own = "float32" if device.platform == "cpu" else files.config.dtype
    dtype = jnp.dtype(own if engine.dtype == "auto" else engine.dtype)
    cache_dtype = cache.stored_dtype(
        dtype.name if engine.kv_cache_dtype == "auto" else engine.kv_cache_dtype
    )

    page_size = planner.page_size(engine.page_size, device.platform)
    ops = cache.operations(
        engine.attention_backend, find_chip(device.device_kind), files.config, page_size,
        dtype, cache_dtype, mesh,
    )  # fmt: skip
    logger.info("attention runs on %s: %s", ops.backend, ops.why)
    declared, places = _declare(files.config, mesh)
    sizes = planner.size(
        files.config,
        engine,
        platform=device.platform,
        free_bytes=free_bytes(device),
        weight_bytes=shardings.device_bytes(shardings.abstract(mesh, declared, dtype)),
        bytes_per_page=cache.bytes_per_page(files.config, page_size, cache_dtype, mesh, ops),
        dtype_bytes=dtype.itemsize,
    )
    logger.info("memory per device:\n%s", sizes.memory.table())
    tokenizer = _tokenizer(files, engine)
    weights = _weights(files, engine, declared, places, dtype)
    return Loaded(
        files.config.for_length(sizes.limits.max_seq_len),
        mesh,
        dtype,
        cache_dtype,
        sizes,
        ops,
        tokenizer,
        _tokenizer_folder(files, engine),
        weights,
    )


def check_chat(model: str | Path, engine: EngineConfig) -> None:
    """Find out, without its weights, whether a model can take part in conversations.

    Raises `ConfigError` if it cannot, and `CheckpointError` or `TokenizerError` as `load` does.
    """
    tokenizer = _tokenizer(checkpoint.resolve(model, engine.load_format), engine)
    if tokenizer is None:
        raise ConfigError("conversations need a tokenizer: leave out skip_tokenizer_init")
    try:
        tokenizer.check_chat_template()
    except TokenizerError as error:
        raise ConfigError(str(error)) from error


def convert(
    model: str | Path, output: str | Path, engine: EngineConfig, *, overwrite: bool
) -> None:
    """Save a model without running it: `LLM(model).save(output)`, less programs and cache.

    dtype="auto" is the checkpoint's on every platform.  Raises as `load` and `saving.save` do.
    """
    files = checkpoint.resolve(model, engine.load_format)
    mesh = shardings.mesh(engine.tensor_parallel_size, engine.devices)
    shardings.check_divisible(files.config.sizes, engine.tensor_parallel_size)
    dtype = jnp.dtype(files.config.dtype if engine.dtype == "auto" else engine.dtype)
    declared, places = _declare(files.config, mesh)
    saving.check_target(output, overwrite)
    weights = _weights(files, engine, declared, places, dtype)
    folder = _tokenizer_folder(files, engine)
    saving.save(output, weights, files.config, folder, overwrite=overwrite)


def _declare(config: ModelConfig, mesh: Mesh) -> tuple[Any, Any]:
    """All parameters of a model, and where they go on the mesh."""
    declared = decoder.parameters(config)
    return declared, jax.tree.map(lambda p: shardings.named(mesh, p.letters), declared)


def _weights(
    files: ModelFiles, engine: EngineConfig, declared: Any, places: Any, dtype: jnp.dtype
) -> dict[str, Any]:
    if engine.load_format == "dummy":
        return checkpoint.random_weights(declared, places, dtype, engine.seed or 0)
    return checkpoint.load(files, declared, places, dtype)


def _tokenizer(files: ModelFiles, engine: EngineConfig) -> Tokenizer | None:
    if engine.skip_tokenizer_init:
        return None
    return Tokenizer.from_folder(engine.tokenizer or files.tokenizer_folder())


def _tokenizer_folder(files: ModelFiles, engine: EngineConfig) -> Path | None:
    return files.path if engine.tokenizer is None else Path(engine.tokenizer)
