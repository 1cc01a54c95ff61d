"""The one list of named shapes for which kernels are tested, compiled, tuned and timed.

Plain data.  `SMALL` (pages) and `SMALL_PRODUCTS` are for tests that run a kernel step by step,
`REAL` and `REAL_PRODUCTS` for everything that compiles or times one; `MODEST` and `MODEST_PRODUCTS`
for timing references on a CPU.  `TIMED` and `TIMED_ON_CPU` say what `bench kernels` runs, `TUNED`
what the tuner does.  `abstract` and `abstract_product`
give the arguments' shapes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.kernels.quantized import FORMATS, Quantized, quantize
from jaxinfer.kernels.rows import Rows
from jaxinfer.kernels.write_pages import LARGEST, Pool


@dataclass(frozen=True)
class Case:
    """A ragged batch over a pool, with the options of `paged_attention`.

    lens: for each row how many tokens it brings, and how many its sequence has with them; rows of
        one token come first.
    stored: dtype of the pool's arrays.  Queries are bfloat16, but float32 over a float32 pool.
    row_per_token: the batch comes as rows of one token each, several to a sequence (B = T).
    """

    lens: tuple[tuple[int, int], ...]
    K: int
    G: int
    H: int
    S: int
    stored: str = "bfloat16"
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    row_per_token: bool = False

    @property
    def dtype(self) -> str:
        """Of queries, and of keys and values before they are stored."""
        return "float32" if self.stored == "float32" else "bfloat16"

    @property
    def num_tokens(self) -> int:
        return sum(queries for queries, _ in self.lens)

    @property
    def num_rows(self) -> int:
        return self.num_tokens if self.row_per_token else len(self.lens)

    @property
    def table_width(self) -> int:
        """Pages of the longest sequence."""
        return max((-(-length // self.S) for _, length in self.lens), default=1)

    @property
    def num_pages(self) -> int:
        """Pages of all sequences, and the dump page."""
        return 1 + sum(-(-length // self.S) for _, length in self.lens)


ROWS = {
    "decode": ((1, 1), (1, 150), (1, 16), (1, 64)),
    "tokens": ((1, 9), (5, 5), (6, 70)),
    "chunk": ((13, 141),),
    "prefill": ((70, 70),),
    "mixed": ((1, 9), (1, 130), (0, 0), (5, 5), (40, 60), (2, 33)),
    "nothing": (),
}

# Every pair of values of two columns is in some line (a test counts); "nothing" is in one only.
_PAIRS = (
    # rows, K, G, H, S, stored, window, soft_cap, sinks
    ("decode", 3, 4, 64, 64, "uint8", None, 1.5, True),
    ("decode", 2, 1, 80, 16, "uint8", 5, 1.5, True),
    ("decode", 2, 7, 80, 64, "float32", 40, 1.5, True),
    ("decode", 2, 8, 96, 128, "float8_e4m3fn", 40, 1.5, True),
    ("decode", 1, 1, 96, 32, "float8_e5m2", 5, 1.5, True),
    ("decode", 3, 7, 128, 32, "int8", 40, 1.5, False),
    ("decode", 3, 1, 256, 128, "bfloat16", None, None, False),
    ("tokens", 1, 8, 64, 128, "float32", 5, None, False),
    ("tokens", 2, 7, 80, 128, "int8", 5, None, True),
    ("tokens", 1, 1, 80, 128, "bfloat16", None, None, False),
    ("tokens", 1, 4, 96, 64, "bfloat16", None, 1.5, True),
    ("tokens", 3, 8, 128, 32, "uint8", 40, None, False),
    ("tokens", 2, 8, 128, 16, "float8_e5m2", 40, None, False),
    ("tokens", 2, 1, 256, 64, "float8_e4m3fn", 5, None, True),
    ("chunk", 2, 7, 64, 64, "float8_e5m2", None, None, False),
    ("chunk", 1, 4, 80, 32, "float8_e4m3fn", None, None, False),
    ("chunk", 3, 7, 96, 16, "float32", 40, None, False),
    ("chunk", 1, 7, 128, 128, "uint8", 5, 1.5, True),
    ("chunk", 3, 1, 128, 16, "bfloat16", 40, 1.5, True),
    ("chunk", 1, 8, 256, 16, "int8", None, None, False),
    ("prefill", 1, 7, 64, 128, "bfloat16", 40, None, True),
    ("prefill", 2, 7, 64, 16, "float8_e4m3fn", None, 1.5, True),
    ("prefill", 3, 8, 80, 64, "float8_e5m2", 40, 1.5, True),
    ("prefill", 1, 1, 96, 64, "int8", None, 1.5, True),
    ("prefill", 2, 4, 128, 16, "float32", None, None, True),
    ("prefill", 1, 1, 256, 32, "float32", 5, 1.5, False),
    ("prefill", 2, 7, 256, 64, "uint8", 5, 1.5, True),
    ("mixed", 1, 1, 64, 16, "int8", 40, 1.5, False),
    ("mixed", 2, 8, 64, 32, "bfloat16", 5, 1.5, True),
    ("mixed", 3, 4, 80, 16, "int8", 5, None, True),
    ("mixed", 3, 7, 96, 64, "uint8", 5, None, True),
    ("mixed", 3, 7, 128, 64, "float8_e4m3fn", None, None, True),
    ("mixed", 1, 8, 128, 16, "float32", 5, 1.5, True),
    ("mixed", 2, 4, 256, 128, "float8_e5m2", 40, None, False),
    ("nothing", 2, 4, 64, 16, "bfloat16", None, None, False),
)  # fmt: skip


def _named(line: tuple) -> tuple[str, Case]:
    rows, K, G, H, S, stored, window, soft_cap, sinks = line
    words = [rows, f"{K}x{G}x{H}", f"page{S}", stored]
    words += [f"window{window}"] * (window is not None) + ["cap"] * (soft_cap is not None)
    case = Case(ROWS[rows], K, G, H, S, stored, window, soft_cap, sinks, rows == "tokens")
    return "-".join(words + ["sinks"] * sinks), case


SMALL = dict(map(_named, _PAIRS))

# Attention of public models, on one device.
MODELS = {
    "llama-3.1-8b": dict(K=8, G=4, H=128),
    "llama-3.1-70b/8": dict(K=1, G=8, H=128),  # its share of eight devices
    "llama-3.2-1b": dict(K=8, G=4, H=64),
    "qwen2.5-7b": dict(K=4, G=7, H=128),
    "phi-3-mini": dict(K=32, G=1, H=96),
    "gemma-2-9b": dict(K=8, G=2, H=256, soft_cap=50.0, window=4096),
    "gpt-oss-20b": dict(K=8, G=8, H=64, sinks=True, window=128),
}
BATCHES = {
    "decode 64 x 1k": ((1, 1024),) * 64,
    "decode 4 x 32k": ((1, 32768),) * 4,
    "prefill 2048": ((2048, 2048),),
    "mixed 32 x 1k + 1024": ((1, 1024),) * 32 + ((1024, 1024),),
}
REAL = {
    f"{model}, {batch}": Case(lens=lens, S=64, **sizes)
    for model, sizes in MODELS.items()
    for batch, lens in BATCHES.items()
}
REAL["llama-3.1-8b, decode 1 x 1k"] = replace(
    REAL["llama-3.1-8b, decode 64 x 1k"], lens=((1, 1024),)
)
REAL |= {
    f"llama-3.1-8b, {batch}, {stored}": replace(REAL[f"llama-3.1-8b, {batch}"], stored=stored)
    for batch in BATCHES
    for stored in LARGEST
}


@dataclass(frozen=True)
class Product:
    """Tokens, in groups that have a weight each, times weights of D by F.

    groups: the tokens of each.  format: of the weights; None: arrays of `dtype`.
    dtype: of the tokens.
    single: a case of `quantized_matmul`: there is one group, and its weight has no axis for it.
    """

    groups: tuple[int, ...]
    D: int
    F: int
    format: str | None = None
    dtype: str = "bfloat16"
    single: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(self.groups)


GROUPS = {
    "gaps": (0, 9, 0, 0, 8, 1, 0),
    "one each": (1, 1, 1, 1, 1, 1, 1),
    "one for all": (0, 0, 19, 0, 0, 0, 0),
    "whole tiles": (8, 0, 16, 0, 0, 0, 0),
    "many": (3, 0, 70, 61, 0, 2, 0),
    "none": (0, 0, 0, 0, 0, 0, 0),
}
# Every pair of values of two columns is in some line (a test counts); "none" is in one only.
_PRODUCT_PAIRS = tuple(
    # groups, format, D, F
    (groups, name, (256, 384)[(i + j) % 2], (128, 192)[(i + j // 2) % 2])
    for i, groups in enumerate(GROUPS)
    for j, name in enumerate([None, *FORMATS])
    if groups != "none" or name is None
)
SMALL_PRODUCTS = {
    f"{groups}-{name or 'bfloat16'}-{D}x{F}": Product(GROUPS[groups], D, F, name)
    for groups, name, D, F in _PRODUCT_PAIRS
} | {
    f"single-{tokens}-{name}-256x160": Product((tokens,), 256, 160, name, single=True)
    for tokens in (1, 2, 7)
    for name in FORMATS
}


def _routed(tokens: int, E: int) -> tuple[int, ...]:
    """How many tokens each of E experts gets from a router that has no favourites."""
    return tuple(np.random.default_rng(0).multinomial(tokens, [1 / E] * E).tolist())


# Gate and up of public models: experts (on one device), how many of them a token meets, D and F.
EXPERTS = {
    "qwen3-30b-a3b": (128, 8, 2048, 1536),
    "qwen3-30b-a3b/8": (16, 1, 2048, 1536),  # its share of eight devices
    "mixtral-8x7b": (8, 2, 4096, 28672),
    "gpt-oss-20b": (32, 4, 2880, 5760),
    "deepseek-v3/8": (32, 1, 7168, 4096),
}
DENSE = {"llama-3.1-8b": (4096, 28672), "llama-3.1-70b/4": (8192, 14336)}
# The products of a layer of Llama-3.1-8B.
LAYER = {"qkv": (4096, 6144), "out": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096)}
STEP_TOKENS = {"decode 64": 64, "prefill 2048": 2048}


def _fits(name: str | None, D: int) -> bool:
    return name is None or D % (FORMATS[name].rows or 1) == 0


REAL_PRODUCTS = {
    f"{model}, {step}, {name or 'bfloat16'}": Product(_routed(tokens * each, E), D, F, name)
    for model, (E, each, D, F) in EXPERTS.items()
    for step, tokens in STEP_TOKENS.items()
    for name in [None, *FORMATS]
    if _fits(name, D)
}
REAL_PRODUCTS |= {
    f"{model}, {step}, {name}": Product((tokens,), D, F, name, single=True)
    for model, (D, F) in DENSE.items()
    for step, tokens in STEP_TOKENS.items()
    for name in FORMATS
}
REAL_PRODUCTS |= {
    f"llama-3.1-8b {product}, {step}, {name}": Product((tokens,), D, F, name, single=True)
    for product, (D, F) in LAYER.items()
    for step, tokens in {"decode 64": 64, "prefill 4096": 4096}.items()
    for name in ("fp8", "int8")
}

# Small enough for the reference on a CPU to take milliseconds.
MODEST = {
    f"smollm2-135m, {batch}": Case(lens, K=3, G=3, H=64, S=32, stored=stored)
    for batch, lens, stored in (
        ("decode 8 x 512, float32", ((1, 512),) * 8, "float32"),
        ("decode 8 x 512, int8", ((1, 512),) * 8, "int8"),
        ("prefill 256, float32", ((256, 256),), "float32"),
    )
}
MODEST_PRODUCTS = {
    f"llama-3.2-1b, decode 8, {name}": Product((8,), 2048, 8192, name, "float32", single=True)
    for name in ("int8", "w4a16", "mxfp4")
} | {
    f"16 experts, decode 8, {name or 'float32'}": Product(
        _routed(16, 16), 512, 1024, name, "float32"
    )
    for name in (None, "int8", "w4a16")
}

# What `bench kernels` runs: on accelerators, and on CPUs.
TIMED = {
    "paged_attention": (
        "llama-3.1-8b, decode 64 x 1k",
        "llama-3.1-8b, decode 4 x 32k",
        "llama-3.1-8b, prefill 2048",
        "llama-3.1-8b, mixed 32 x 1k + 1024",
        "llama-3.1-8b, decode 64 x 1k, float8_e4m3fn",
        "llama-3.1-8b, decode 64 x 1k, int8",
        "llama-3.1-8b, decode 64 x 1k, uint8",
        "llama-3.1-8b, prefill 2048, float8_e4m3fn",
        "llama-3.1-70b/8, decode 4 x 32k",
        "gemma-2-9b, prefill 2048",
        "gpt-oss-20b, decode 64 x 1k",
    ),
    "write_pages": ("llama-3.1-8b, prefill 2048", "llama-3.1-8b, prefill 2048, int8"),
    "quantized_matmul": (
        "llama-3.1-70b/4, decode 64, int8",
        "llama-3.1-70b/4, decode 64, fp8_block",
        "llama-3.1-70b/4, decode 64, w4a16",
        "llama-3.1-70b/4, decode 64, mxfp4",
        "llama-3.1-8b gate_up, prefill 4096, fp8",
        "llama-3.1-70b/4, prefill 2048, fp8_block",
        "llama-3.1-70b/4, prefill 2048, w4a16",
    ),
    "grouped_matmul": (
        "qwen3-30b-a3b, decode 64, bfloat16",
        "qwen3-30b-a3b, decode 64, fp8_block",
        "qwen3-30b-a3b, decode 64, w4a16",
        "qwen3-30b-a3b, prefill 2048, bfloat16",
        "gpt-oss-20b, decode 64, mxfp4",
        "gpt-oss-20b, prefill 2048, mxfp4",
        "deepseek-v3/8, decode 64, fp8_block",
    ),
}
# What the tuner tries blocks for; an entry serves all cases of the same key (`kernels/blocks.py`).
TUNED = {
    "paged_attention": (
        "llama-3.1-8b, decode 64 x 1k",
        "llama-3.1-8b, decode 1 x 1k",
        "llama-3.1-8b, decode 4 x 32k",
        "llama-3.1-8b, prefill 2048",
        "llama-3.1-8b, decode 64 x 1k, float8_e4m3fn",
        "llama-3.1-8b, decode 4 x 32k, float8_e4m3fn",
        "llama-3.1-8b, prefill 2048, float8_e4m3fn",
        "llama-3.1-70b/8, decode 64 x 1k",
        "llama-3.1-70b/8, decode 4 x 32k",
        "llama-3.2-1b, decode 64 x 1k",
        "llama-3.2-1b, decode 4 x 32k",
        "gemma-2-9b, prefill 2048",
        "gpt-oss-20b, decode 64 x 1k",
    ),
    "quantized_matmul": (
        "llama-3.1-70b/4, decode 64, fp8_block",
        "llama-3.1-70b/4, decode 64, w4a16",
        "llama-3.1-70b/4, decode 64, mxfp4",
        "llama-3.1-70b/4, prefill 2048, w4a16",
    ),
    "grouped_matmul": (
        "qwen3-30b-a3b, decode 64, bfloat16",
        "qwen3-30b-a3b, prefill 2048, bfloat16",
        "gpt-oss-20b, decode 64, mxfp4",
        "gpt-oss-20b, prefill 2048, mxfp4",
        "deepseek-v3/8, decode 64, fp8_block",
    ),
}
TIMED_ON_CPU = {
    "paged_attention": tuple(MODEST),
    "write_pages": tuple(name for name in MODEST if "prefill" in name),
    "quantized_matmul": tuple(name for name, case in MODEST_PRODUCTS.items() if case.single),
    "grouped_matmul": tuple(name for name, case in MODEST_PRODUCTS.items() if not case.single),
}


def abstract(case: Case) -> tuple[jax.ShapeDtypeStruct, Pool, Rows]:
    """Shapes and dtypes of `paged_attention`'s `q_TKGH`, `pool` and `rows`, without padding."""
    slots = (case.num_pages, case.K, case.S)
    pages = _array(case.stored, *slots, case.H // 2 if case.stored == "uint8" else case.H)
    scales = _array("float32", *slots) if case.stored in LARGEST else None
    per_T, per_B, scalar = (
        _array("int32", case.num_tokens), _array("int32", case.num_rows), _array("int32"),
    )  # fmt: skip
    rows = Rows(
        positions_T=per_T, rows_T=per_T, query_starts_B=per_B, query_lens_B=per_B,
        kv_lens_B=per_B, page_table_BM=_array("int32", case.num_rows, case.table_width),
        num_tokens=scalar, num_rows=scalar, num_single=scalar,
    )  # fmt: skip
    q_TKGH = _array(case.dtype, case.num_tokens, case.K, case.G, case.H)
    return q_TKGH, Pool(pages, pages, scales, scales), rows


def abstract_product(
    case: Product,
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct | Quantized, jax.ShapeDtypeStruct | None]:
    """Shapes and dtypes of `x_TD`, the weight, and `group_sizes_E` (None if it is `single`)."""
    shape = (case.D, case.F) if case.single else (len(case.groups), case.D, case.F)
    weight = _array(case.dtype, *shape)
    if case.format is not None:
        weight = jax.eval_shape(partial(quantize, name=case.format), weight)
    sizes = None if case.single else _array("int32", len(case.groups))
    return _array(case.dtype, case.num_tokens, case.D), weight, sizes


def _array(dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
