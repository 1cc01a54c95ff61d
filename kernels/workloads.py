"""One operation on the arrays of one case: what it must move and compute, and who can run it.

For what times kernels (`bench kernels`, `tuning`); nothing here is used by the engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.layout import Format, Layout

from jaxinfer.configs import Chip
from jaxinfer.errors import ConfigError
from jaxinfer.kernels import cases, choice, grouped_matmul, quantized_matmul, timing, tpu
from jaxinfer.kernels.quantized import Quantized, bytes_of, format_of, quantize, values_layout
from jaxinfer.kernels.rows import Rows
from jaxinfer.kernels.write_pages import LARGEST, Pool, write_pages
from jaxinfer.kernels.write_pages import quantize as quantize_slots
from jaxinfer.kernels.xla_options import compiler_options

OPS = ("paged_attention", "write_pages", "quantized_matmul", "grouped_matmul")
# Runs `op(*arguments)`; `write_pages` donates its first argument.
Implementation = Callable[..., Any]


def case_of(op: str, name: str) -> cases.Case | cases.Product:
    """The case of an operation by its name.  Raises `ConfigError`."""
    products = op.endswith("matmul")
    known = {**cases.REAL_PRODUCTS, **cases.MODEST_PRODUCTS} if products else {
        **cases.REAL, **cases.MODEST
    }  # fmt: skip
    if name not in known:
        raise ConfigError(f"{op}: kernels/cases.py has no case {name!r}")
    return known[name]


# -- what any implementation must do ----------------------------------------------------------


def work(op: str, case: Any) -> tuple[int, int]:
    """Bytes to move and operations to compute at least; two for a multiplication and its sum.

    Attention: queries and results, and of each row the keys and values (and scales) that it sees,
    once.  Writing: new keys and values, and what becomes of them.  Products: tokens, results, and
    the weights (as stored, with scales) of the groups that have tokens.  Softmax, conversions,
    page tables and scales' arithmetic count nothing.
    """
    if isinstance(case, cases.Product):
        groups = sum(size > 0 for size in case.groups)
        shape, itemsize = (groups, case.D, case.F), jnp.dtype(case.dtype).itemsize
        weights = bytes_of(case.format, shape) if case.format else groups * case.D * case.F * (
            itemsize
        )  # fmt: skip
        vectors = case.num_tokens * (case.D + case.F) * itemsize
        return weights + vectors, 2 * case.num_tokens * case.D * case.F
    itemsize = jnp.dtype(case.dtype).itemsize
    slot_bytes = 2 * case.K * _slot_bytes(case)
    if op == "write_pages":
        return case.num_tokens * (2 * case.K * case.H * itemsize + slot_bytes), 0
    slots = pairs = 0
    for queries, length in case.lens:
        window = length if case.window is None else case.window
        slots += min(length, queries + window - 1)
        seen = np.minimum(np.arange(length - queries + 1, length + 1), window)
        pairs += int(seen.sum())
    vectors = 2 * case.num_tokens * case.K * case.G * case.H * itemsize
    return vectors + slots * slot_bytes, 4 * pairs * case.K * case.G * case.H


def stored(case: Any) -> str:
    """In which dtype or format a case has what is read most: pages, or weights."""
    return (case.format or case.dtype) if isinstance(case, cases.Product) else case.stored


def _slot_bytes(case: cases.Case) -> int:
    """Bytes that one head's key takes in a pool, with its scale."""
    values = case.H * jnp.dtype(case.stored).itemsize // (2 if case.stored == "uint8" else 1)
    return values + (4 if case.stored in LARGEST else 0)


# -- arrays -----------------------------------------------------------------------------------


def arguments(op: str, case: Any, seed: int = 0) -> tuple[Any, ...]:
    """Random arrays for an implementation of the operation, on the default device."""
    key = jax.random.key(seed)
    if isinstance(case, cases.Product):
        x, weight, *sizes = _product_arrays(key, case)
        if isinstance(weight, Quantized):
            weight = jax.device_put(weight, weight_formats(weight))
        return jax.block_until_ready((x, weight, *sizes))
    new, q, pool, sinks = _page_arrays(key, case)
    if (formats := pool_formats(case)) is not None:
        pool = jax.device_put(pool, formats)
    rows = jax.tree.map(jnp.asarray, rows_of(case, seed))
    found = (pool, *new, rows) if op == "write_pages" else (q, pool, rows, sinks)
    return jax.block_until_ready(found)


def pool_formats(case: cases.Case) -> Pool | None:
    """How a pool lies in the memory of the default device; None: as XLA likes it."""
    if jax.default_backend() != "tpu":
        return None
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: Format(Layout(tuple(range(leaf.ndim))), here), cases.abstract(case)[1]
    )


def weight_formats(weight: Quantized) -> Quantized:
    """How a weight lies in the memory of the default device: as one that a model holds."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    values = Format(values_layout(weight, jax.default_backend()), here)
    return replace(jax.tree.map(lambda _: here, weight), values=values)


def rows_of(case: cases.Case, seed: int = 0) -> Rows:
    """The ragged batch of a case, without padding, on pages in random order; NumPy arrays."""
    free = iter(1 + np.random.default_rng(seed).permutation(case.num_pages - 1))
    lens = np.array(case.lens, np.int32).reshape(-1, 2)
    tables = np.zeros((len(lens), case.table_width), np.int32)
    for row, (_, length) in enumerate(lens):
        need = -(-int(length) // case.S)
        tables[row, :need] = [next(free) for _ in range(need)]
    queries, lengths = lens[:, 0], lens[:, 1]
    starts = (np.cumsum(queries) - queries).astype(np.int32)
    rows_T = np.repeat(np.arange(len(lens), dtype=np.int32), queries)
    offset_T = np.arange(case.num_tokens, dtype=np.int32) - starts[rows_T]
    positions_T = (lengths - queries)[rows_T] + offset_T
    rows, T = np.int32(len(lens)), np.int32(case.num_tokens)
    single = np.int32((queries == 1).sum())
    if case.row_per_token:
        every = np.arange(T, dtype=np.int32)
        tables, rows_T, starts, queries = tables[rows_T], every, every, np.ones_like(every)
        lengths, rows, single = positions_T + 1, T, T
    return Rows(positions_T, rows_T, starts, queries, lengths, tables, T, rows, single)


@partial(jax.jit, static_argnames="case")
def _page_arrays(key: Array, case: cases.Case) -> Any:
    """New keys and values, queries, a pool (all its slots written), sinks or None."""
    keys = jax.random.split(key, 6)
    q_TKGH, pool, _ = cases.abstract(case)
    dtype = q_TKGH.dtype
    new = [jax.random.normal(k, (case.num_tokens, case.K, case.H), dtype) for k in keys[:2]]
    q = jax.random.normal(keys[2], q_TKGH.shape, dtype)
    k, v = (
        jax.random.normal(k, (case.num_pages, case.K, case.S, case.H), dtype) for k in keys[3:5]
    )
    if pool.k_scale_PKS is None:
        pages = Pool(k.astype(case.stored), v.astype(case.stored))
    else:
        (k, k_scale), (v, v_scale) = quantize_slots(k, case.stored), quantize_slots(v, case.stored)
        pages = Pool(k, v, k_scale, v_scale)
    sinks = jax.random.normal(keys[5], (case.K, case.G)) if case.sinks else None
    return new, q, pages, sinks


@partial(jax.jit, static_argnames="case")
def _product_arrays(key: Array, case: cases.Product) -> Any:
    """Tokens, a weight, and (but if single) the sizes of the groups."""
    keys = jax.random.split(key, 1 + len(case.groups))
    x = jax.random.normal(keys[0], (case.num_tokens, case.D), case.dtype)

    def weight(key: Array) -> Any:
        values = jax.random.normal(key, (case.D, case.F), case.dtype)
        return values if case.format is None else quantize(values, case.format)

    if case.single:
        return x, weight(keys[1])
    # One after the other: in float32 all of them at once would not fit small devices.
    return x, lax.map(weight, keys[1:]), jnp.asarray(case.groups, jnp.int32)


# A kernel agrees with its reference if they differ by no more than this, of the largest result:
# both round to bfloat16, in another order.
AGREES = 0.03


def difference(result: Any, expected: Any) -> float:
    """The largest difference, as a share of the largest number expected; infinite where a number is
    not finite."""
    pairs = zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True)
    found = max(float(_difference(*pair)) for pair in pairs)
    return found if math.isfinite(found) else math.inf


@jax.jit
def _difference(one: Array, other: Array) -> Array:
    one, other = one.astype(jnp.float32), other.astype(jnp.float32)
    far = jnp.max(jnp.abs(one - other)) / jnp.maximum(jnp.max(jnp.abs(other)), 1e-30)
    return jnp.where(jnp.all(jnp.isfinite(one)) & jnp.all(jnp.isfinite(other)), far, jnp.inf)


# -- how it is timed --------------------------------------------------------------------------

# Calls of one program.
CALLS = 8


def in_one_program(
    op: str, case: Any, call: Implementation, sets: Sequence[tuple[Any, ...]]
) -> Callable[[], list[Any]]:
    """Runs `CALLS` calls with the sets of arrays in turn, and returns their results; the first is
    that of the first set.

    As in a step: a call costs no dispatch, and what calls of attention compute of rows they share,
    as layers do (the rows are those of the first set).  Not for `write_pages`.
    """
    # Different tokens: calls that repeat another XLA would leave out.
    tokens = [sets[n % len(sets)][0] * (1 - n / 64) for n in range(CALLS)]
    others = [one[1:] for one in sets]
    options: Any = compiler_options(jax.default_backend(), case.num_tokens)
    program = jax.jit(partial(calls, op, call))
    compiled = program.lower(tokens, others).compile(compiler_options=options)
    return lambda: compiled(tokens, others)


def seconds_of_one(program: Callable[[], list[Any]], seconds: float | None = None) -> float:
    """Of a call of `in_one_program`; seconds: for all that is timed (`timing.seconds_per_call`)."""
    return timing.seconds_per_call(lambda _: program(), seconds=seconds) / CALLS


def calls(
    op: str, call: Implementation, tokens: list[Array], others: list[tuple[Any, ...]]
) -> list[Any]:
    """A call for each array of tokens, with the other arguments of each set in turn."""

    def one(n: int) -> Any:
        own, *rest = others[n % len(others)]
        if op == "paged_attention":
            rest = others[0][1:]
        # Layers have weights of their own.  Products with the same one XLA would make a single
        # one, and convert what they share once.
        x, own = lax.optimization_barrier((tokens[n], own))
        return call(x, own, *rest)

    return [one(n) for n in range(len(tokens))]


# -- who can run it ---------------------------------------------------------------------------


def implementation(
    op: str, case: Any, backend: str, chip: Chip | None, blocks: dict[str, Any] | None = None
) -> Implementation:
    """The operation by a backend, jitted; raises `ConfigError` with the reason if it cannot.

    chip: the sheet of the device that is to run it.  blocks: arguments of its kernel, by name; if
    None it chooses them itself.
    """
    options = blocks or {}
    if isinstance(case, cases.Product):
        return jax.jit(partial(_product(op, case, backend, chip), **options))
    q_TKGH, pool, _ = cases.abstract(case)
    if refused := choice.refusal(backend, chip, q_TKGH, pool):
        raise ConfigError(f"{backend}: {refused}")
    ops = choice.choose(backend, chip, q_TKGH, pool)
    if op == "write_pages":
        if backend != "reference" and ops.write_pages is write_pages:
            raise ConfigError(f"{backend}: no kernel is needed, XLA scatters in place")
        return jax.jit(ops.write_pages, donate_argnums=0, out_shardings=pool_formats(case))
    attention = partial(
        ops.paged_attention, scale=case.H**-0.5, window=case.window, soft_cap=case.soft_cap,
        **options,
    )  # fmt: skip
    return jax.jit(lambda q, pool, rows, sinks: attention(q, pool, rows, sinks_KG=sinks))


def _product(op: str, case: cases.Product, backend: str, chip: Chip | None) -> Implementation:
    if backend == "reference":
        modules = {"quantized_matmul": quantized_matmul, "grouped_matmul": grouped_matmul}
        return getattr(modules[op], op)
    if case.single and case.format and not format_of(case.format).rows:
        if backend == "mosaic_gpu" and format_of(case.format).as_stored:
            return _on_gpu("quantized_matmul", case, chip)
        raise ConfigError(f"{backend}: no kernel is needed, XLA reads the weight once as it is")
    if backend == "mosaic_gpu":
        kernel = _on_gpu("grouped_matmul", replace(case, single=False), chip)
    else:
        kernel = _grouped_tpu(chip)
    return partial(quantized_matmul.as_one_group, kernel) if case.single else kernel


def _grouped_tpu(chip: Chip | None) -> Implementation:
    if chip is None or chip.tpu is None or chip.name not in tpu.CHIPS:
        raise ConfigError(f"mosaic_tpu: compiled for {', '.join(tpu.CHIPS)} only")
    module = import_module("jaxinfer.kernels.grouped_matmul_tpu")
    return partial(module.grouped_matmul, vmem_bytes=chip.tpu.vmem_bytes, chip=chip.name)


def _on_gpu(op: str, case: cases.Product, chip: Chip | None) -> Implementation:
    if refused := choice.gpu_refusal(chip):
        raise ConfigError(f"mosaic_gpu: {refused}")
    assert chip is not None
    module = import_module(f"jaxinfer.kernels.{op}_gpu")
    gpu = import_module("jaxinfer.kernels.gpu").Gpu.of(chip)
    x_TD, weight, _ = cases.abstract_product(case)
    if refused := module.refusal(x_TD, weight, gpu):
        raise ConfigError(f"mosaic_gpu: {refused}")
    tuned = {"chip": chip.name} if op == "grouped_matmul" else {}
    return partial(getattr(module, op), gpu=gpu, **tuned)
