"""transformers' `generate`, for `compare --against transformers`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxinfer import export
from jaxinfer.bench.side import left_padded, load_extra
from jaxinfer.checkpoint import ModelFiles
from jaxinfer.errors import CheckpointError


class Transformers:
    """The other side of a comparison (see `side.Side`), with a copy of the engine's weights."""

    name = "transformers"
    how = (
        "generate with its default cache and attention, torch on all cores; batches in order of "
        "prompt length, padded on the left, run to the longest output"
    )

    def __init__(self, weights: dict[str, Any], files: ModelFiles, max_batch_size: int):
        self._torch, library = load_extra(self.name, "torch", "transformers")
        self.versions = {m.__name__: m.__version__ for m in (self._torch, library)}
        self._max_batch_size = max_batch_size
        self._torch.set_num_threads(os.cpu_count() or 1)
        values = export.config_json(files)
        architecture = getattr(library, values["architectures"][0])
        config = architecture.config_class.from_dict(values | {"dtype": "float32"})
        self._model = architecture(config).eval()
        self._copy(export.tensors(weights, files))
        # Nothing ends an output early, and nothing is sampled.
        self._model.generation_config = library.GenerationConfig(do_sample=False, pad_token_id=0)

    def _copy(self, tensors: dict[str, np.ndarray]) -> None:
        state = {name: self._torch.from_numpy(array) for name, array in tensors.items()}
        missing, unexpected = self._model.load_state_dict(state, strict=False)
        tied = {"lm_head.weight"} if self._model.config.tie_word_embeddings else set()
        if unexpected or set(missing) - tied:
            raise CheckpointError(
                f"transformers' model has other tensors: it lacks {unexpected}, and wants {missing}"
            )

    def generate(self, prompts: Sequence[list[int]], lengths: Sequence[int]) -> list[list[int]]:
        """Greedy continuations of these lengths.  How long outputs get, no user knows before."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        outputs: dict[int, list[int]] = {}
        for first in range(0, len(order), self._max_batch_size):
            some = order[first : first + self._max_batch_size]
            tokens_BQ, pads_B = left_padded([prompts[i] for i in some])
            width = tokens_BQ.shape[1]
            with self._torch.inference_mode():
                found = self._model.generate(
                    self._torch.from_numpy(tokens_BQ).long(),
                    attention_mask=self._torch.from_numpy(np.arange(width) >= pads_B[:, None]),
                    max_new_tokens=max(lengths[i] for i in some),
                )
            rows = found[:, width:].tolist()
            outputs |= {i: row[: lengths[i]] for i, row in zip(some, rows, strict=True)}
        return [outputs[i] for i in range(len(prompts))]

    def next_scores(self, tokens: list[int]) -> np.ndarray:
        """Logits [V] of the token that follows these."""
        with self._torch.inference_mode():
            return self._model(self._torch.tensor([tokens])).logits[0, -1].numpy()

    def close(self) -> None:
        del self._model
