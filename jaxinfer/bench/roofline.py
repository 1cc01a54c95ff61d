"""What a run had to read and compute at least, beside what the device can: MBU and MFU."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxinfer.configs import find_chip
from jaxinfer.scheduler import Plan

if TYPE_CHECKING:
    from jaxinfer.llm import LLM

COPY_BYTES = 2**28


@dataclass(frozen=True)
class Peaks:
    """One device's limits.  flops is None where nothing is known about it; sources are words."""

    bytes_per_second: float
    bytes_source: str
    flops: float | None
    flops_source: str


class Work:
    """Adds up, step by step, the least that any implementation must move and compute.

    Bytes: the weights of the layers once a step, those of the head once a step that samples (of the
    embedding a few rows: not counted), the keys and values of each row's context once, those of
    each new token written once.  Operations: two for each weight of a layer and token, and of the
    head and sampled position, and four for each query head, its width and pair of positions that
    attend.  Padding, activations, norms and sampling count nothing.
    """

    def __init__(self, llm: LLM):
        import jax

        from jaxinfer import cache
        from jaxinfer.models import decoder

        config, tree = llm.model_config, decoder.parameters(llm.model_config)
        counts = {
            name: sum(math.prod(parameter.shape) for parameter in jax.tree.leaves(part))
            for name, part in tree.items()
        }
        devices = llm.engine_config.tensor_parallel_size
        weight_bytes = llm.memory.weights / sum(counts.values())  # of each weight, on one device
        self._layers, self._head = counts["layers"], config.vocab_size * config.hidden_size
        self._layer_bytes = self._layers * weight_bytes
        self._head_bytes = self._head * weight_bytes
        pool = llm.step.abstract_state.cache.pools[0].k_PKSH
        slot_bytes = cache.bytes_per_slot(config, pool.dtype) / devices
        self._bytes_per_slot_and_layer = slot_bytes / config.num_layers
        self._flops_per_pair_and_layer = 4 * config.num_heads * config.head_dim
        self._windows = Counter(config.window(layer) for layer in range(config.num_layers))
        self._devices = devices
        self.bytes = self.flops = 0.0

    def add(self, plan: Plan) -> None:
        """Count one step; bytes and operations are those of one device."""
        selected = len(plan.selected_B)
        self.bytes += self._layer_bytes + self._head_bytes * (selected > 0)
        flops = 2 * (self._layers * plan.num_tokens + self._head * selected)
        for window, layers in self._windows.items():
            context_B, seen_T = plan.starts_B + plan.lens_B, plan.positions_T + 1
            if window is not None:
                context_B = np.minimum(context_B, plan.lens_B + window - 1)
                seen_T = np.minimum(seen_T, window)
            slots = int(context_B.sum()) + plan.num_tokens
            self.bytes += layers * slots * self._bytes_per_slot_and_layer
            flops += layers * int(seen_T.sum()) * self._flops_per_pair_and_layer
        self.flops += flops / self._devices


def peaks(device: Any, dtype: str) -> Peaks:
    """A device's limits: from its fact sheet, or else a copy measured now."""
    chip = find_chip(device.device_kind)
    if chip is None:
        return Peaks(
            copy_bandwidth(device, COPY_BYTES),
            f"a copy of {COPY_BYTES >> 20} MiB measured in this run (bytes read plus written)",
            None,
            f"no peak is known for {device.device_kind!r}",
        )
    flops = chip.flops.get(dtype)
    return Peaks(
        chip.bytes_per_second / chip.devices_per_chip,
        f"configs/hardware/{chip.name}.yaml",
        None if flops is None else flops / chip.devices_per_chip,
        f"configs/hardware/{chip.name}.yaml, {dtype}",
    )


def copy_bandwidth(device: Any, size: int, rounds: int = 5) -> float:
    """Bytes per second, read plus written, of the fastest of several copies of `size` bytes.

    A run whose weights or pages stay in a cache of the processor can exceed it.
    """
    import jax
    import jax.numpy as jnp

    source = jax.device_put(np.zeros(size // 4, np.float32), device)
    copy = jax.jit(lambda array: array + jnp.float32(1))
    copy(source).block_until_ready()
    fastest = math.inf
    for _ in range(rounds):
        started = time.perf_counter()
        copy(source).block_until_ready()
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * source.nbytes / fastest


def utilisation(work: Work, seconds: float, limits: Peaks) -> dict[str, Any]:
    """MBU and MFU over the whole run, arrivals' pauses included."""
    return {
        "mbu": work.bytes / seconds / limits.bytes_per_second,
        "achieved_bytes_per_s": work.bytes / seconds,
        "peak_bytes_per_s": limits.bytes_per_second,
        "peak_bytes_source": limits.bytes_source,
        "mfu": None if limits.flops is None else work.flops / seconds / limits.flops,
        "achieved_flops_per_s": work.flops / seconds,
        "peak_flops_per_s": limits.flops,
        "peak_flops_source": limits.flops_source,
    }
