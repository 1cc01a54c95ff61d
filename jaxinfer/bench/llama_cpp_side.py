"""llama.cpp through its C interface, for `compare --against llama.cpp`."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfer import export, layers
from jaxinfer.bench.loop import check_is_llama
from jaxinfer.bench.side import load_extra
from jaxinfer.checkpoint import ModelFiles
from jaxinfer.config import ModelConfig
from jaxinfer.errors import ComparisonError, ConfigError

BATCH = 2048  # most tokens in a call, llama.cpp's default


def write_gguf(
    path: Path, gguf: Any, tensors: Mapping[str, np.ndarray], config: ModelConfig, kind: str
) -> None:
    """Write a model without a tokenizer; matrices are stored as `kind`, vectors as F32."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_layers)
    stored = gguf.GGMLQuantizationType[kind]
    for theirs, array in tensors.items():
        array = array.astype(np.float32)
        for part, heads in (("q_proj", config.num_heads), ("k_proj", config.num_kv_heads)):
            if f".{part}.weight" in theirs:
                array = _interleaved(array, heads)
        name = names.get_name(theirs, try_suffixes=(".weight",))
        if array.ndim == 1 or kind == "F32":
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, stored), raw_dtype=stored)
    if config.rope_scaling is not None:
        writer.add_tensor("rope_freqs.weight", _rope_divisors(config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head in the order in which llama.cpp rotates: pairs (2i, 2i + 1)."""
    return matrix.reshape(heads, 2, -1, matrix.shape[1]).swapaxes(1, 2).reshape(matrix.shape)


def _rope_divisors(config: ModelConfig) -> np.ndarray:
    """How much slower than without scaling each pair turns, float32."""
    if layers.rope_attention_factor(config.rope_scaling) != 1:
        raise ConfigError(
            "--against llama.cpp is not written for models whose rope scaling sharpens attention "
            "(yarn, longrope): choose another model, or --against transformers"
        )
    plain, scaled = (
        layers.rope_frequencies(config.head_dim, config.rope_theta, scaling)
        for scaling in (None, config.rope_scaling)
    )
    return (plain / scaled).astype(np.float32)


@dataclass
class _Sequence:
    """A request that has a place in the cache."""

    index: int
    place: int
    position: int
    new: list[int]  # not yet computed


class LlamaCpp:
    """The other side of a comparison (see `side.Side`), with a copy of the engine's weights."""

    name = "llama.cpp"

    def __init__(
        self, weights: dict[str, Any], files: ModelFiles, max_batch_size: int, max_seq_len: int,
        kind: str,
    ):  # fmt: skip
        config = files.config
        check_is_llama(config, self.name)
        if kind != "F32" and (config.hidden_size % 32 or config.intermediate_size % 32):
            raise ConfigError(f"--llama-type {kind} needs widths that are multiples of 32")
        self._library, gguf = load_extra(self.name, "llama_cpp", "gguf")
        c = self._library
        self._quiet = c.llama_log_callback(lambda *_: None)
        c.llama_log_set(self._quiet, ctypes.c_void_p())
        self.versions = {"llama-cpp-python": c.__version__}
        self.versions |= {"gguf": importlib.metadata.version("gguf")}
        self.how = (
            f"{kind} weights, F32 cache, continuous batch, {os.cpu_count()} threads, "
            + c.llama_print_system_info().decode().strip(" |")
        )
        self._vocab_size, self._rows = config.vocab_size, max_batch_size
        self._batch_size = max(BATCH, max_seq_len)
        self._model = self._context = None
        self._folder = tempfile.TemporaryDirectory()
        path = Path(self._folder.name) / "model.gguf"
        write_gguf(path, gguf, export.tensors(weights, files), config, kind)
        self._model = c.llama_model_load_from_file(
            str(path).encode(), c.llama_model_default_params()
        )
        if not self._model:
            raise ComparisonError("llama.cpp does not load the model that was written for it")
        self._open(max_seq_len)

    def _open(self, max_seq_len: int) -> None:
        c = self._library
        params = c.llama_context_default_params()
        # A cache of its own for each sequence: attention looks at no other one's.
        params.kv_unified = False
        params.n_seq_max = self._rows
        params.n_ctx = self._rows * -(-max_seq_len // 256) * 256  # rounds up to this anyway
        params.n_batch = self._batch_size
        params.n_threads = params.n_threads_batch = os.cpu_count() or 1
        params.type_k = params.type_v = c.GGML_TYPE_F32
        self._context = c.llama_init_from_model(self._model, params)
        if not self._context:
            raise ComparisonError(f"llama.cpp makes no context for {self._rows} sequences")
        self._memory = c.llama_get_memory(self._context)
        self._batch = c.llama_batch_init(self._batch_size, 0, 1)
        self._tokens, self._positions, self._num_ids, self._wanted = (
            np.ctypeslib.as_array(pointer, (self._batch_size,))
            for pointer in (
                self._batch.token, self._batch.pos, self._batch.n_seq_id, self._batch.logits
            )
        )  # fmt: skip
        self._num_ids[:] = 1

    def generate(self, prompts: Sequence[list[int]], lengths: Sequence[int]) -> list[list[int]]:
        """Greedy continuations: rows that end make room for others at once, as in its server."""
        outputs: list[list[int]] = [[] for _ in prompts]
        waiting, places = deque(range(len(prompts))), deque(range(self._rows))
        running: list[_Sequence] = []
        while waiting or running:
            room = self._batch_size - len(running)
            while waiting and places and len(prompts[waiting[0]]) <= room:
                index = waiting.popleft()
                room -= len(prompts[index])
                running.append(_Sequence(index, places.popleft(), 0, prompts[index]))
            for sequence, scores_V in zip(running, self._decode(running), strict=True):
                sequence.new = [int(scores_V.argmax())]
                outputs[sequence.index] += sequence.new
            for sequence in [s for s in running if len(outputs[s.index]) == lengths[s.index]]:
                running.remove(sequence)
                places.append(sequence.place)
                self._library.llama_memory_seq_rm(self._memory, sequence.place, -1, -1)
        return outputs

    def _decode(self, running: Sequence[_Sequence]) -> list[np.ndarray]:
        """Compute what is new of all sequences in one call; the logits [V] after each one's end."""
        start, ends = 0, []
        for sequence in running:
            stop = start + len(sequence.new)
            self._tokens[start:stop] = sequence.new
            self._positions[start:stop] = sequence.position + np.arange(stop - start)
            self._wanted[start:stop] = 0
            self._wanted[stop - 1] = 1
            for at in range(start, stop):
                self._batch.seq_id[at][0] = sequence.place
            sequence.position += stop - start
            ends.append(stop - 1)
            start = stop
        self._batch.n_tokens = start
        if code := self._library.llama_decode(self._context, self._batch):
            raise ComparisonError(f"llama.cpp fails to decode {start} tokens: code {code}")
        return [
            np.ctypeslib.as_array(
                self._library.llama_get_logits_ith(self._context, end), (self._vocab_size,)
            )
            for end in ends
        ]

    def next_scores(self, tokens: list[int]) -> np.ndarray:
        """Logits [V] of the token that follows these."""
        (scores_V,) = self._decode([_Sequence(0, 0, 0, tokens)])
        self._library.llama_memory_seq_rm(self._memory, 0, -1, -1)
        return scores_V.copy()

    def close(self) -> None:
        self._library.llama_batch_free(self._batch)
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)
        self._folder.cleanup()
