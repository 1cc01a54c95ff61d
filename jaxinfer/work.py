"""The least that steps must move and compute, whatever implements them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jaxinfer.step import Step


class Work:
    """Adds up, step by step, the least that any implementation must move and compute.

    Bytes: the weights of the layers once a step, those of the head once a step that samples (of the
    embedding a few rows: not counted), the keys and values of each row's context once, those of
    each new token written once.  Operations: two for each weight of a layer and token, and of the
    head and sampled position, and four for each query head, its width and pair of positions that
    attend.  Padding, activations, norms and sampling count nothing.

    bytes, flops: of one device.
    """

    def __init__(self, step: Step, weights: dict[str, Any]):
        """weights: the model's, or their shapes, with their shardings."""
        import jax

        from jaxinfer import cache, shardings

        config = step.config
        head = weights.get("head_VD", weights["embed_VD"])
        self._layers = sum(leaf.size for leaf in jax.tree.leaves(weights["layers"]))
        self._head = config.vocab_size * config.hidden_size
        self._layer_bytes = shardings.device_bytes(weights["layers"])
        self._head_bytes = shardings.device_bytes(head)
        self._devices = step.mesh.size
        stored = step.abstract_state.cache.pools[0].k_PKSH.dtype
        slot_bytes = cache.bytes_per_slot(config, stored) / self._devices
        self._bytes_per_slot_and_layer = slot_bytes / config.num_layers
        self._flops_per_pair_and_layer = 4 * config.num_heads * config.head_dim
        self._windows = Counter(config.window(layer) for layer in range(config.num_layers))
        self.bytes = self.flops = 0.0

    def add(self, starts_B: np.ndarray, lens_B: np.ndarray, num_selected: int) -> None:
        """Count one step: row b computes the `lens_B[b]` tokens that follow its first
        `starts_B[b]`; logits are computed of `num_selected` positions."""
        num_tokens = int(lens_B.sum())
        first_T = np.repeat(starts_B - (lens_B.cumsum() - lens_B), lens_B)
        positions_T = first_T + np.arange(num_tokens)
        self.bytes += self._layer_bytes + self._head_bytes * (num_selected > 0)
        flops = 2 * (self._layers * num_tokens + self._head * num_selected)
        for window, layers in self._windows.items():
            context_B, seen_T = starts_B + lens_B, positions_T + 1
            if window is not None:
                context_B = np.minimum(context_B, lens_B + window - 1)
                seen_T = np.minimum(seen_T, window)
            slots = int(context_B.sum()) + num_tokens
            self.bytes += layers * slots * self._bytes_per_slot_and_layer
            flops += layers * int(seen_T.sum()) * self._flops_per_pair_and_layer
        self.flops += flops / self._devices
