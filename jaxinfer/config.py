"""What a model is (`ModelConfig`) and how it is to be run (`EngineConfig`).  Imports no jax."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from jaxinfer.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16")
KV_CACHE_DTYPES = (*DTYPES, "fp8_e4m3", "fp8_e5m2", "int8", "int4")
_TYPES = {
    "int": (int,), "float": (int, float), "bool": (bool,), "str": (str,),
    "tuple[int, ...]": (tuple,), "tuple[float, ...]": (tuple,),
}  # fmt: skip
ACTIVATIONS = ("silu", "gelu_tanh")
ROPE_KINDS = ("linear", "llama3", "yarn", "longrope")
ATTENTION_BACKENDS = ("reference", "mosaic_tpu", "mosaic_gpu")
SCHEDULING_POLICIES = ("guaranteed_no_evict", "max_utilization")


def reject_unknown(owner: str, given: Any, known: Any, error: type[Exception]) -> None:
    """Raise `error` for the first key of `given` that is not in `known`, with the closest match."""
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), [str(k) for k in known], n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are: {', '.join(known)}"
            raise error(f"{owner} has no field {key!r}; {hint}")


def field_names(cls: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(cls))


def _positive(config: object, *names: str) -> None:
    """Raise `ConfigError` unless the named fields are None or whole numbers above zero."""
    for name in names:
        value = getattr(config, name)
        if value is not None and (not isinstance(value, int) or value <= 0 or value is True):
            raise ConfigError(
                f"{type(config).__name__}.{name} must be a whole number above 0, got {value!r}"
            )


def _check_types(config: Any) -> None:
    """Raise `ConfigError` unless each field holds what it is declared as, and finite numbers."""
    nouns = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a word"}
    for field in dataclasses.fields(config):
        value: Any = getattr(config, field.name)
        declared = str(field.type)
        kind = declared.removesuffix(" | None")
        if kind not in _TYPES or (value is None and kind != declared):
            continue
        good = type(value) in _TYPES[kind]
        if kind.startswith("tuple"):
            items = _TYPES[kind.removeprefix("tuple[").removesuffix(", ...]")]
            good = good and all(type(item) in items and math.isfinite(item) for item in value or ())
        elif kind == "float":
            good = good and math.isfinite(value or 0)
        if not good:
            many = "a tuple of whole numbers" if "int" in kind else "a tuple of numbers"
            noun = nouns.get(kind, many)
            raise ConfigError(f"{type(config).__name__}.{field.name} must be {noun}, got {value!r}")


def _build(cls: Any, owner: str, values: Mapping[str, Any]) -> Any:
    """A dataclass from a mapping, in which its tuples are lists."""
    reject_unknown(owner, values, field_names(cls), ConfigError)
    for field in dataclasses.fields(cls):
        if field.default is dataclasses.MISSING and field.name not in values:
            raise ConfigError(f"{owner}.{field.name} is missing")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _one_of(config: object, name: str, known: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if value not in known:
        raise ConfigError(
            f"{type(config).__name__}.{name} must be one of {', '.join(known)}, got {value!r}"
        )


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context length of pre-training.

    kind: "linear" (all frequencies divided by `factor`; arXiv:2306.15595), "llama3" (low
        frequencies divided, high ones kept, smooth in between; the Llama 3.1 model card), "yarn"
        (the same with other bounds, and larger scores; arXiv:2309.00071) or "longrope" (each
        frequency divided by its own number; arXiv:2402.13753).
    low_freq_factor, high_freq_factor: of llama3: a pair that turns less often than the one in the
        original context is divided, more often than the other: kept.
    beta_slow, beta_fast: the same of yarn.
    attention_factor: of yarn and longrope: multiplies queries and keys; None: as their papers say.
    short_factor, long_factor: of longrope: a divisor for each rotated pair.
    use_long: of longrope: which of the two holds.  An engine cannot rotate cached keys anew when a
        sequence outgrows the original context, so one list holds for all sequences, the long one
        if the engine's max_seq_len exceeds that context (as in vLLM; `ModelConfig.for_length`).
        transformers takes the short one for each sequence while it is short.
    original_max_position_embeddings: context length of pre-training, in tokens.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_slow: float = 1.0
    beta_fast: float = 32.0
    attention_factor: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    use_long: bool = True
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        _one_of(self, "kind", ROPE_KINDS)
        _check_types(self)
        _positive(self, "original_max_position_embeddings")
        if self.factor < 1:
            raise ConfigError(f"RopeScaling.factor must be at least 1, got {self.factor!r}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The facts of a decoder-only model that its mathematics depends on.

    activation: of the feed-forward gate: "silu", or "gelu_tanh" (the tanh form of GELU).
    rope_theta, rope_scaling: of all layers, or of those without a window: see sliding_rope_theta.
    sliding_rope_theta: base of the rotary frequencies in layers with a sliding window, where they
        are not scaled; None: as in all layers.
    no_rope_layers: indices of the layers that do not rotate queries and keys.
    rotary_dim: how many leading dimensions of a head are rotated; None: all.
    sliding_window: a token attends to this many latest positions, itself included; None: to all.
    sliding_layers: indices of the layers that use the window; None: all of them.
    attention_scale: multiplies the attention scores; None: head_dim ** -0.5.
    attention_soft_cap, logit_soft_cap: c, where scores, or logits, are c * tanh(scores / c).
    embedding_scale, residual_scale, logit_scale: multiply the embeddings, what a layer's attention
        and its feed-forward add to the stream, and the logits.
    pre_norm, post_norm: attention and feed-forward have their inputs, their outputs normalised.
    norm_offset: norms multiply by their weight plus this.
    qk_norm: queries and keys are normalised, each head for itself, or (qk_norm_across_heads) all
        heads of a token together.
    dtype: the checkpoint's own number format.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    activation: str = "silu"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    sliding_rope_theta: float | None = None
    no_rope_layers: tuple[int, ...] = ()
    rotary_dim: int | None = None
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] | None = None
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    pre_norm: bool = True
    post_norm: bool = False
    norm_offset: float = 0.0
    qk_norm: bool = False
    qk_norm_across_heads: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        _positive(
            self, "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads",
            "num_kv_heads", "head_dim", "max_position_embeddings", "sliding_window", "rotary_dim",
        )  # fmt: skip
        _one_of(self, "dtype", DTYPES)
        _one_of(self, "activation", ACTIVATIONS)
        _check_types(self)
        for name in ("attention_soft_cap", "logit_soft_cap", "rope_theta", "sliding_rope_theta"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"ModelConfig.{name} must be above 0, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"ModelConfig.num_heads ({self.num_heads}) must be a multiple of num_kv_heads "
                f"({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"ModelConfig.head_dim must be even for RoPE, got {self.head_dim}")
        rotated = self.rotary_dim or self.head_dim
        if rotated % 2 or rotated > self.head_dim:
            raise ConfigError(
                f"ModelConfig.rotary_dim must be even and at most head_dim ({self.head_dim}), got "
                f"{self.rotary_dim}"
            )
        scaling = self.rope_scaling
        if scaling and scaling.kind == "longrope":
            for name in ("short_factor", "long_factor"):
                factors = getattr(scaling, name)
                if len(factors) != rotated // 2 or min(factors) <= 0:
                    raise ConfigError(
                        f"RopeScaling.{name} must have {rotated // 2} numbers above 0, one for "
                        f"each rotated pair, got {factors}"
                    )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from what JSON or YAML can hold; raises `ConfigError` for a key that is unknown,
        missing or of the wrong type."""
        scaling = values.get("rope_scaling")
        if isinstance(scaling, Mapping):
            values = {**values, "rope_scaling": _build(RopeScaling, "rope_scaling", scaling)}
        elif scaling is not None:
            raise ConfigError(f"rope_scaling must be a mapping or null, got {scaling!r}")
        return _build(cls, cls.__name__, values)

    def window(self, layer: int) -> int | None:
        """The sliding window of one layer, in tokens, or None."""
        slides = self.sliding_layers is None or layer in self.sliding_layers
        return self.sliding_window if slides else None

    def rope(self, layer: int) -> tuple[float, RopeScaling | None] | None:
        """Base and scaling of the rotary frequencies of one layer; None if it does not rotate."""
        if layer in self.no_rope_layers:
            return None
        if self.sliding_rope_theta is not None and self.window(layer) is not None:
            return self.sliding_rope_theta, None
        return self.rope_theta, self.rope_scaling

    def for_length(self, max_seq_len: int) -> ModelConfig:
        """The model as run with sequences of up to `max_seq_len` tokens: see `RopeScaling`."""
        scaling = self.rope_scaling
        if scaling is None or scaling.kind != "longrope":
            return self
        use_long = max_seq_len > scaling.original_max_position_embeddings
        return replace(self, rope_scaling=replace(scaling, use_long=use_long))

    @property
    def sizes(self) -> dict[str, int]:
        """Axis letter → size, for every axis that the model alone determines."""
        group = self.num_heads // self.num_kv_heads
        return {
            "L": self.num_layers, "D": self.hidden_size, "F": self.intermediate_size,
            "V": self.vocab_size, "N": self.num_heads, "K": self.num_kv_heads, "G": group,
            "H": self.head_dim, "U": group + 2, "W": 2,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a model is run.  The fields are the keyword arguments of `LLM`.

    dtype: number format of weights and activations; "auto": the checkpoint's, float32 on CPU.
    kv_cache_dtype: number format of the KV cache; "auto": `dtype`.  "fp8_e4m3", "fp8_e5m2", "int8"
        and "int4" hold two to four times as many tokens, with a scale for each slot of each head.
    load_format: "auto" reads the weights of the model folder; "dummy" draws random ones.
    seed: seeds the dummy weights and draws the seeds of requests that bring none; None: from the
        operating system.
    tokenizer: folder of the tokenizer, if it is not the model's own.
    skip_tokenizer_init: work on token ids alone; `text` stays empty, strings are refused.
    max_batch_size: most requests in one step; None: 32 on CPU, 256 elsewhere.
    max_num_tokens: most tokens in one step, prompts' chunks included; None: 256 on CPU, 2048
        elsewhere.
    max_seq_len: longest prompt plus output, in tokens; None: the model's limit, or what the KV
        cache holds if that is less.
    page_size: token slots in a page of the KV cache; None: 32 on CPU, 64 on GPU, 128 on TPU.
    num_pages: pages of the KV cache, the dump page included; None: sized from the memory.
    free_memory_fraction: share of the device memory left after the weights that the KV cache may
        take.
    enable_prefix_caching: requests reuse the cached pages of a common prefix.
    scheduling_policy: "guaranteed_no_evict" admits a request only if all its pages are sure to be
        there; "max_utilization" admits by present need and preempts (recomputes) when pages end.
    tensor_parallel_size: devices that each layer is split over.
    devices: the jax devices to use; None: the first ones present.
    attention_backend: kernels that attention runs on: "reference" (plain JAX), "mosaic_tpu",
        "mosaic_gpu", or "auto": the device's own if they can serve the model, else the reference.
    overlap: plan the next step while the device runs the current one.
    deterministic: one bucket for all steps, so results are bit-identical in any company.
    """

    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    load_format: str = "auto"
    seed: int | None = None
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    max_batch_size: int | None = None
    max_num_tokens: int | None = None
    max_seq_len: int | None = None
    page_size: int | None = None
    num_pages: int | None = None
    free_memory_fraction: float = 0.9
    enable_prefix_caching: bool = True
    scheduling_policy: str = "guaranteed_no_evict"
    tensor_parallel_size: int = 1
    devices: tuple[Any, ...] | None = None
    attention_backend: str = "auto"
    overlap: bool = True
    deterministic: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.tokenizer, Path):
            object.__setattr__(self, "tokenizer", str(self.tokenizer))
        _positive(
            self, "max_batch_size", "max_num_tokens", "max_seq_len", "page_size", "num_pages",
            "tensor_parallel_size",
        )  # fmt: skip
        _check_types(self)
        if self.seed is not None and self.seed < 0:
            raise ConfigError(f"EngineConfig.seed must be 0 or more, got {self.seed}")
        _one_of(self, "dtype", ("auto", *DTYPES))
        _one_of(self, "kv_cache_dtype", ("auto", *KV_CACHE_DTYPES))
        _one_of(self, "load_format", ("auto", "dummy"))
        _one_of(self, "scheduling_policy", SCHEDULING_POLICIES)
        _one_of(self, "attention_backend", ("auto", *ATTENTION_BACKENDS))
        if not 0 < self.free_memory_fraction <= 1:
            raise ConfigError(
                "EngineConfig.free_memory_fraction must be above 0 and at most 1, got "
                f"{self.free_memory_fraction!r}"
            )
        if self.num_pages is not None and self.num_pages < 2:
            raise ConfigError(
                "EngineConfig.num_pages must be at least 2: page 0 is the dump page for padding"
            )
        if self.devices is not None:
            if not isinstance(self.devices, Iterable) or not (devices := tuple(self.devices)):
                raise ConfigError(
                    f"EngineConfig.devices must be a list of jax devices, got {self.devices!r}"
                )
            object.__setattr__(self, "devices", devices)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from keyword arguments; raises `ConfigError` for an unknown one."""
        reject_unknown("EngineConfig", values, field_names(cls), ConfigError)
        return cls(**values)
