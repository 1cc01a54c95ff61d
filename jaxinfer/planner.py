"""How large the KV cache may be, and whether a model fits.  Imports no jax.

All sizes are bytes per device.  A model that does not fit fails here, before anything is read, with
the sum by component.

Weights count without the tiles that a TPU pads arrays to: XLA chooses the order of their axes, so
that padding adds 10 MiB at most to a preset's (2 % of SmolLM2-135M, 0.02 % of all but that and
SmolLM2-360M), where `PageOps.array_bytes`, for axes in their own order, would count 20 % too many.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxinfer.config import EngineConfig, ModelConfig
from jaxinfer.errors import ConfigError, InsufficientMemoryError
from jaxinfer.scheduler import Limits

GIB = 2**30

# Small pages waste less and are shared more; those of GPUs and TPUs must fill tiles.
PAGE_SIZES = {"gpu": 64, "tpu": 128}
# On CPU the cache competes with everything else in the machine, so it stays at this unless told.
CPU_CACHE_CAP = 2 * GIB


@dataclass(frozen=True)
class Memory:
    """Bytes by component on each device, and the device's total (None: not bounded)."""

    weights: int
    workspace: int
    kv_cache: int
    total: int

    def table(self) -> str:
        rows = [
            ("weights", self.weights),
            ("activations and logits", self.workspace),
            ("KV cache", self.kv_cache),
            ("memory there is", self.total),
        ]
        return "\n".join(f"  {name:<24}{size / GIB:9.2f} GiB" for name, size in rows)


@dataclass(frozen=True)
class Sizes:
    limits: Limits
    num_pages: int
    memory: Memory


def page_size(asked: int | None, platform: str) -> int:
    """Token slots in a page: what the user asked for, or what suits a platform (jax's name)."""
    return asked or PAGE_SIZES.get(platform, 32)


def size(
    model: ModelConfig,
    engine: EngineConfig,
    *,
    platform: str,
    free_bytes: int,
    weight_bytes: int,
    bytes_per_page: int,
    dtype_bytes: int,
) -> Sizes:
    """Fill in every limit that the user left open.

    free_bytes: of each device, before the weights are there.  weight_bytes, bytes_per_page: what
    one device holds of the weights, and of one page of the cache.

    Raises `ConfigError` for limits that contradict each other, `InsufficientMemoryError` if the
    weights, or a cache for one sequence, do not fit.
    """
    on_cpu = platform == "cpu"
    slots = page_size(engine.page_size, platform)
    max_batch_size = engine.max_batch_size or (32 if on_cpu else 256)
    max_num_tokens = engine.max_num_tokens or max(256 if on_cpu else 2048, max_batch_size)
    if max_num_tokens < max_batch_size:
        raise ConfigError(
            f"EngineConfig.max_num_tokens ({max_num_tokens}) must be at least max_batch_size "
            f"({max_batch_size}): every running request decodes one token a step"
        )
    wanted_len = engine.max_seq_len or model.max_position_embeddings
    if wanted_len > model.max_position_embeddings:
        raise ConfigError(
            f"EngineConfig.max_seq_len ({wanted_len}) exceeds the model's "
            f"max_position_embeddings ({model.max_position_embeddings})"
        )
    if wanted_len < 2:
        raise ConfigError(
            "EngineConfig.max_seq_len must be at least 2: one token of a prompt and one to follow"
        )
    workspace = _workspace(model, max_num_tokens, max_batch_size, dtype_bytes)
    left = free_bytes - weight_bytes - workspace
    num_pages = engine.num_pages or _num_pages(
        left, bytes_per_page, on_cpu, engine.free_memory_fraction,
        most=max_batch_size * -(-wanted_len // slots) + 1,
    )  # fmt: skip
    memory = Memory(weight_bytes, workspace, max(num_pages, 0) * bytes_per_page, free_bytes)
    if left < num_pages * bytes_per_page or num_pages < 2:
        raise InsufficientMemoryError(
            f"the model does not fit on the device:\n{memory.table()}\n"
            "lower num_pages, max_batch_size, max_num_tokens or max_seq_len, use a smaller dtype, "
            "or split the model with tensor_parallel_size"
        )
    held = (num_pages - 1) * slots
    if engine.max_seq_len and held < engine.max_seq_len:
        raise InsufficientMemoryError(
            f"the KV cache holds {held} tokens, fewer than one sequence of max_seq_len "
            f"({engine.max_seq_len}):\n{memory.table()}\n"
            "lower max_seq_len, or raise free_memory_fraction or num_pages"
        )
    limits = Limits(
        max_batch_size=max_batch_size,
        max_num_tokens=max_num_tokens,
        max_seq_len=min(wanted_len, held),
        page_size=slots,
    )
    return Sizes(limits, num_pages, memory)


def _workspace(model: ModelConfig, num_tokens: int, num_rows: int, dtype_bytes: int) -> int:
    """A generous estimate of what one step needs beside weights and cache."""
    widest = max(
        2 * model.intermediate_size, (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    )
    activations = num_tokens * (6 * model.hidden_size + 2 * widest) * max(dtype_bytes, 2)
    logits = 4 * num_rows * model.vocab_size * 4
    return activations + logits


def _num_pages(left: int, bytes_per_page: int, on_cpu: bool, fraction: float, most: int) -> int:
    """Pages for the cache: a share of what is left; on CPU no more than a full batch can use."""
    budget = int(left * fraction)
    if on_cpu:
        budget = min(budget, CPU_CACHE_CAP, most * bytes_per_page)
    return budget // bytes_per_page
