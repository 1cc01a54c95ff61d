"""The engine's own programs for a target: do they fit, and how fast can they be?"""

from __future__ import annotations

import dataclasses
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxinfer.aot import isolate
from jaxinfer.aot import target as targets
from jaxinfer.aot.report import Report
from jaxinfer.config import ATTENTION_BACKENDS, DTYPES, KV_CACHE_DTYPES
from jaxinfer.configs import Chip
from jaxinfer.errors import ConfigError, InsufficientMemoryError
from jaxinfer.planner import page_size
from jaxinfer.work import Work

if TYPE_CHECKING:
    from jaxinfer.step import Step

# Begins the lines that say which program is compiled next.
MARK = "jaxinfer compiles: "


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What the engine is compiled for.

    model: a folder, "demo", a preset's name or a hub id; no weights are needed.
    batch: requests that decode together.
    context: tokens of each whose keys and values are in the cache, which is just that large.
    prefill: tokens of a step that computes prompts; None: no such step is compiled.
    dtype: number format of weights and activations; "auto": the checkpoint's.
    kv_cache_dtype: of the cache; "auto": `dtype`.
    tensor_parallel_size: devices that each layer is split over.
    page_size: token slots in a page of the cache; None: as the engine has it on that chip.
    attention_backend: as `EngineConfig.attention_backend`.
    """

    model: str
    batch: int = 64
    context: int = 1024
    prefill: int | None = None
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    tensor_parallel_size: int = 1
    page_size: int | None = None
    attention_backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("batch", "context", "prefill", "tensor_parallel_size", "page_size"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"{name} must be a whole number above 0, got {value!r}")
        for name, names in (
            ("dtype", DTYPES), ("kv_cache_dtype", KV_CACHE_DTYPES),
            ("attention_backend", ATTENTION_BACKENDS),
        ):  # fmt: skip
            if getattr(self, name) not in ("auto", *names):
                known = ", ".join(("auto", *names))
                raise ConfigError(f"{name} must be one of {known}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Bound:
    """The least time of a kind of step, as its bytes and its operations have it.

    tokens: of the step, on all devices.  hbm_bytes, flops: of one device.
    flop_seconds: None if the chip's sheet has no peak for the number format.
    """

    tokens: int
    hbm_bytes: int
    flops: float
    byte_seconds: float
    flop_seconds: float | None

    @property
    def seconds(self) -> float:
        return max(self.byte_seconds, self.flop_seconds or 0)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Estimate:
    """What compiling the engine for a target found.  Bytes are of one device.

    programs: by name; one that the compiler found too large is in `refused` with its words.
    weights, kv_cache: as laid out there.  needed: with both, what the largest step takes beside
    them and the programs themselves (None if one was refused).  available: the device's memory.
    decode, prefill: bounds that no implementation can beat: see `Work`.  compiled_decode: the same
    with the bytes that these programs move.
    """

    target: str
    workload: Workload
    devices: int
    programs: dict[str, Report]
    refused: dict[str, str]
    weights: int
    kv_cache: int
    needed: int | None
    available: int
    decode: Bound | None
    compiled_decode: Bound | None
    prefill: Bound | None

    @property
    def fits(self) -> bool:
        return self.needed is not None and self.needed <= self.available

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "programs"
        }
        for name, value in values.items():
            if isinstance(value, Workload | Bound):
                values[name] = dataclasses.asdict(value)
            if isinstance(value, Bound):
                values[name] |= {
                    "seconds": value.seconds, "tokens_per_second": value.tokens_per_second
                }  # fmt: skip
        programs = {name: report.as_dict() for name, report in self.programs.items()}
        return {**values, "fits": self.fits, "programs": programs}


def compile_engine(target: str, workload: Workload, timeout: float | None = 1800) -> Estimate:
    """Compile a model's decode step, and its prefill step if asked for, for `target`.

    The attention over pages is a loop in the reference implementation; its turns are counted as
    those that a context of full length takes.  Raises as `compile_for` does, but a program that
    does not fit is part of the answer.
    """
    from jaxinfer.aot.compile import warnings_in

    where = targets.parse(target)
    found, said = isolate.run(_compile_here, where, workload, timeout=timeout)
    programs = {
        name: dataclasses.replace(report, warnings=warnings_in(_about(name, said)))
        for name, report in found.programs.items()
    }
    return dataclasses.replace(found, programs=programs)


def _say(name: str) -> None:
    """Mark where what compilers say of a program begins, on both of the streams that they use."""
    for stream in (sys.stdout, sys.stderr):
        print(f"{MARK}{name}", file=stream, flush=True)


def _about(name: str, said: str) -> str:
    """What was said between the mark of a program and the next one.

    Of a kernel that several programs have, the compiler speaks once, with the first of them.
    """
    parts = (part.partition("\n") for part in said.split(MARK)[1:])
    return "".join(text for of, _, text in parts if of == name)


def _compile_here(target: targets.Target, workload: Workload) -> Estimate:
    import jax

    from jaxinfer.aot.compile import finish
    from jaxinfer.kernels.xla_options import compiler_options

    step, weights, table = abstract_engine(targets.devices(target), workload, target.chip)
    limits, batch = step.limits, workload.batch
    platform = step.mesh.devices.flat[0].platform
    lowerings = {
        "decode": (step.lower_backbone, (weights,), batch, limits.pages_per_row),
        "head": (step.lower_head, (weights, table), batch, 1),
    }
    if workload.prefill:
        lowerings["prefill"] = (step.lower_backbone, (weights,), limits.max_num_tokens, 1)
    programs, refused = {}, {}
    for name, (lower, arguments, size, turns) in lowerings.items():
        _say(name)
        with jax.set_mesh(step.mesh):
            started = time.perf_counter()
            lowered = lower(*arguments, size)
            seconds = time.perf_counter() - started
        try:
            options = compiler_options(platform, size, side_by_side=name != "head")
            programs[name] = finish(target, name, lowered, seconds, turns, options)
        except InsufficientMemoryError as error:
            refused[name] = str(error)
    return _estimate(target, workload, step, weights, programs, refused)


def abstract_engine(
    devices: list[Any], workload: Workload, chip: Chip | None = None
) -> tuple[Step, dict[str, Any], Any]:
    """The engine's step over these devices, and its weights and sampling table without memory.

    chip: what the devices are; None: none that has a sheet.
    """
    import jax
    import jax.numpy as jnp

    from jaxinfer import cache, checkpoint, shardings
    from jaxinfer.batch import Buckets
    from jaxinfer.models import decoder
    from jaxinfer.sampling import SamplingRows
    from jaxinfer.scheduler import Limits
    from jaxinfer.step import Step

    config = checkpoint.resolve(workload.model, "dummy").config
    shardings.check_divisible(config.sizes, workload.tensor_parallel_size)
    mesh = shardings.mesh(workload.tensor_parallel_size, devices)
    longest = max(workload.context, workload.prefill or 0)
    if longest > config.max_position_embeddings:
        raise ConfigError(
            f"context and prefill may not exceed the model's {config.max_position_embeddings} "
            f"positions, got {longest}"
        )
    platform = "cpu" if chip is None else "tpu" if chip.tpu else "gpu"
    limits = Limits(
        max_batch_size=workload.batch,
        max_num_tokens=max(workload.batch, workload.prefill or 0),
        max_seq_len=workload.context,
        page_size=page_size(workload.page_size, platform),
    )
    buckets = Buckets((limits.max_num_tokens,), (workload.batch,), max_rows=workload.batch)
    dtype = jnp.dtype(config.dtype if workload.dtype == "auto" else workload.dtype)
    kept = workload.kv_cache_dtype
    cache_dtype = cache.stored_dtype(dtype.name if kept == "auto" else kept)
    num_pages = workload.batch * limits.pages_per_row + 1
    config = config.for_length(workload.context)
    ops = cache.operations(
        workload.attention_backend, chip, config, limits.page_size, dtype, cache_dtype, mesh
    )
    step = Step(config, mesh, limits, buckets, num_pages, dtype, cache_dtype, ops)

    whole = shardings.replicated(mesh)
    table = SamplingRows(
        workload.batch + 1,
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=whole),
    ).table()
    return step, shardings.abstract(mesh, decoder.parameters(config), dtype), table


def _estimate(
    target: targets.Target,
    workload: Workload,
    step: Step,
    weights: dict[str, Any],
    programs: dict[str, Report],
    refused: dict[str, str],
) -> Estimate:
    from jaxinfer import cache, shardings

    sizes = {name: size for one in programs.values() for name, size in one.arguments}
    weight_bytes = sum(size for name, size in sizes.items() if name.startswith("weights"))
    cache_bytes = sum(size for name, size in sizes.items() if name.startswith("state.cache"))
    if refused:  # then the compiler did not say, and the weights are without padding
        pages, stored = step.abstract_state.cache.pools[0].shape[0], step.abstract_state.cache
        weight_bytes = shardings.device_bytes(weights)
        cache_bytes = pages * cache.bytes_per_page(
            step.config, step.limits.page_size, stored.pools[0].k_PKSH.dtype, step.mesh, step.ops
        )
    needed = None
    if not refused:
        beside = (
            one.memory.total
            - one.memory.code
            - sum(size for name, size in one.arguments if name.startswith(("weights", "state.c")))
            for one in programs.values()
        )
        code = sum(one.memory.code for one in programs.values())
        needed = weight_bytes + cache_bytes + max(beside) + code
    bound = partial(_bound, target.chip, step, weights)
    decode = _decode_step(workload)
    moved = [programs[name].hbm_bytes for name in ("decode", "head") if name in programs]
    return Estimate(
        target=target.text,
        workload=workload,
        devices=workload.tensor_parallel_size,
        programs=programs,
        refused=refused,
        weights=weight_bytes,
        kv_cache=cache_bytes,
        needed=needed,
        available=target.memory_bytes,
        decode=bound(decode),
        compiled_decode=bound(decode, sum(moved)) if len(moved) == 2 else None,
        prefill=bound(_prefill_step(workload)) if workload.prefill else None,
    )


def _bound(
    chip: Chip,
    step: Step,
    weights: dict[str, Any],
    tokens: tuple[np.ndarray, np.ndarray, int],
    moved: int | None = None,
) -> Bound:
    """Of a step with these tokens (what `Work.add` takes); moved: its bytes, if known better."""
    work = Work(step, weights)
    work.add(*tokens)
    moved = int(work.bytes) if moved is None else moved
    peak = chip.flops.get(step.dtype.name)
    return Bound(
        tokens=int(tokens[1].sum()),
        hbm_bytes=moved,
        flops=work.flops,
        byte_seconds=moved * chip.devices_per_chip / chip.bytes_per_second,
        flop_seconds=None if peak is None else work.flops * chip.devices_per_chip / peak,
    )


def _decode_step(workload: Workload) -> tuple[np.ndarray, np.ndarray, int]:
    """A step in which every request decodes the last token of its context."""
    ones_B = np.ones(workload.batch, np.int64)
    return ones_B * (workload.context - 1), ones_B, workload.batch


def _prefill_step(workload: Workload) -> tuple[np.ndarray, np.ndarray, int]:
    """A step over whole prompts of `context` tokens, the last one as long as fits."""
    whole, rest = divmod(workload.prefill or 0, workload.context)
    lens = [workload.context] * whole + [rest] * (rest > 0)
    return np.zeros(len(lens), np.int64), np.array(lens), len(lens)
