"""What `throughput` and `latency` share: their options, the engine, the run, the report."""

from __future__ import annotations

import argparse
import contextlib
import math
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxinfer.bench import dataset, drive, report
from jaxinfer.bench.dataset import Dataset
from jaxinfer.config import EngineConfig
from jaxinfer.errors import ConfigError
from jaxinfer.options import add_fields, given, seed

if TYPE_CHECKING:
    from jaxinfer.llm import LLM

# trtllm-bench's names for options of the engine.
ALIASES = {
    "EngineConfig.free_memory_fraction": ("--kv-cache-free-gpu-mem-fraction",),
    "EngineConfig.tensor_parallel_size": ("--tp",),
    "EngineConfig.scheduling_policy": ("--scheduler-policy",),
}
WITHOUT_OPTION = ("EngineConfig.devices", "EngineConfig.seed", "EngineConfig.skip_tokenizer_init")


def add_arguments(parser: argparse.ArgumentParser, *, num_requests: int, warmup: int) -> None:
    """The options of both commands, with the defaults that differ."""
    add = parser.add_argument
    add("--model", required=True, help='a folder, "demo", a preset\'s name or a hub id')
    add("--dataset", metavar="FILE", default=str(dataset.SHIPPED),
        help="JSON Lines with task_id, prompt or input_ids (they win), output_tokens (default: 256 "
        "prompts of Python source that ship with jaxinfer)")  # fmt: skip
    everything = " (default: all)" if num_requests == 0 else f" (default: {num_requests})"
    add("--num-requests", type=int, default=num_requests, metavar="N",
        help=f"use the data set's first N requests; 0: all{everything}")  # fmt: skip
    add("--skip-bad", action="store_true",
        help="leave out lines that are malformed or cannot be served, and report them")  # fmt: skip
    add("--warmup", type=int, default=warmup, metavar="N",
        help="requests that run before the measurement, with other tokens (default: %(default)s)"
        )  # fmt: skip
    add("--eos-id", type=int, default=-1, metavar="ID",
        help="token that ends an output early; -1: outputs have their full length (default)"
        )  # fmt: skip
    add("--streaming", action="store_true",
        help="make the text token by token, as a server of streams does")  # fmt: skip
    add("--seed", type=seed, default=0, help="of dummy weights and arrivals (default: %(default)s)")
    add("--iteration-log", metavar="FILE",
        help="one JSON line a step: step, running (requests), scheduled, padded (tokens), waiting "
        "(requests), ms since the step before")  # fmt: skip
    add_fields(
        parser.add_argument_group("engine"), EngineConfig, without=WITHOUT_OPTION, aliases=ALIASES
    )


def measure(args: argparse.Namespace, *, concurrency: int, request_rate: float) -> dict[str, Any]:
    """Load the model, warm up, run the data set, report.

    Raises `ConfigError`, `DatasetError` and what `LLM` raises.
    """
    engine = {**given(vars(args), EngineConfig), "seed": args.seed}
    EngineConfig.from_dict(engine)
    if args.warmup < 0 or not request_rate > 0:
        raise ConfigError("--warmup must be 0 or more, and --request-rate above 0")
    from jaxinfer import checkpoint  # jax, only now
    from jaxinfer.llm import LLM

    data = dataset.read(
        args.dataset, num_requests=args.num_requests, skip_bad=args.skip_bad,
        encode=_encoder(args.model, engine),
    )  # fmt: skip
    # What cannot work fails before the weights are read; a small cache may lower the limit again.
    facts = checkpoint.resolve(args.model, engine.get("load_format", "auto")).config
    longest = engine.get("max_seq_len") or facts.max_position_embeddings
    data = dataset.keep_servable(data, longest, facts.vocab_size, skip_bad=args.skip_bad)
    rng = np.random.default_rng(args.seed)
    with contextlib.ExitStack() as stack:
        file = None
        if args.iteration_log:
            try:
                file = stack.enter_context(open(args.iteration_log, "w"))
            except OSError as error:
                raise ConfigError(f"--iteration-log cannot be written: {error}") from error
        # Prompts are token ids by now; text is made of the outputs of streams only.
        llm = stack.enter_context(LLM(args.model, **engine, skip_tokenizer_init=not args.streaming))
        data = dataset.keep_servable(
            data, llm.limits.max_seq_len, llm.model_config.vocab_size, skip_bad=args.skip_bad
        )
        return _run(llm, data, args, concurrency, request_rate, rng, file)


def _run(
    llm: LLM,
    data: Dataset,
    args: argparse.Namespace,
    concurrency: int,
    request_rate: float,
    rng: np.random.Generator,
    file: Any,
) -> dict[str, Any]:
    from jaxinfer.bench import roofline
    from jaxinfer.work import Work

    drive.warm_up(llm, data.items, args.warmup, rng)
    device, devices = llm.step.mesh.devices.flat[0], llm.step.mesh.devices.size
    limits = roofline.peaks(device, str(llm.step.dtype))
    work = Work(llm.step, llm._weights)
    log = drive.StepLog(llm, file, work)
    arrive = drive.arrivals(len(data.items), request_rate, rng)
    preemptions = llm.stats()["preemptions"]
    with drive.compilations() as compiled:
        timings = drive.drive(
            llm, data.items, arrive=arrive, concurrency=concurrency, eos_id=args.eos_id,
            streaming=args.streaming, detokenize=args.streaming, log=log, progress="measuring",
        )  # fmt: skip
    performance = report.performance(timings, devices)
    return {
        "engine": engine_section(llm, args.model),
        "machine": machine_section(device),
        "world_info": world_section(llm, request_rate, concurrency),
        "request_info": report.request_info(timings),
        "performance": performance,
        "streaming_metrics": report.streaming_metrics(timings),
        "decoding_stats": report.decoding_stats(),
        "dataset": {
            "path": str(data.path),
            "num_requests": len(data.items),
            "max_input_length": max(len(item.input_ids) for item in data.items),
            "max_output_length": max(item.output_tokens for item in data.items),
            "num_skipped": len(data.skipped),
            "skipped": data.skipped,
        },
        "steps": {
            **log.summary(),
            "compile_seconds": llm.stats()["compile_seconds"],
            "recompilations": len(compiled),
            "preemptions": llm.stats()["preemptions"] - preemptions,
        },
        "roofline": roofline.utilisation(work, performance["total_latency_ms"] / 1000, limits),
        "memory_bytes": _memory(llm, device),
    }


def _encoder(model: str, engine: dict[str, Any]) -> Callable[[str], list[int]]:
    """Makes token ids of a text, with a tokenizer that is read when it is first needed."""
    found: list[Any] = []

    def encode(text: str) -> list[int]:
        if not found:
            from jaxinfer import checkpoint
            from jaxinfer.tokenizer import Tokenizer

            folder = engine.get("tokenizer")
            if folder is None:
                files = checkpoint.resolve(model, engine.get("load_format", "auto"))
                folder = files.tokenizer_folder()
            found.append(Tokenizer.from_folder(Path(folder)))
        return found[0].encode(text)

    return encode


def engine_section(llm: LLM, model: str) -> dict[str, Any]:
    import jax

    return {
        "model": model,
        "version": report.machine()["jaxinfer"],
        "backend": f"jax {jax.__version__} ({jax.default_backend()})",
        "dtype": str(llm.step.dtype),
        "kv_cache_dtype": str(llm.step.abstract_state.cache.pools[0].k_PKSH.dtype),
        "quantization": None,
        "attention_backend": llm.step.ops.backend,
    }


def machine_section(device: Any) -> dict[str, Any]:
    return {"device": device.device_kind, "platform": device.platform, **report.machine()}


def world_section(llm: LLM, request_rate: float, concurrency: int) -> dict[str, Any]:
    config = llm.engine_config
    return {
        "tp_size": config.tensor_parallel_size,
        "pp_size": 1,
        "ep_size": 1,
        "world_size": llm.step.mesh.devices.size,
        "max_batch_size": llm.limits.max_batch_size,
        "max_num_tokens": llm.limits.max_num_tokens,
        "max_seq_len": llm.limits.max_seq_len,
        "page_size": llm.limits.page_size,
        "num_pages": llm.scheduler.pages.num_pages,
        "scheduling_policy": config.scheduling_policy,
        "kv_cache_percentage": 100 * config.free_memory_fraction,
        "issue_rate": None if math.isinf(request_rate) else request_rate,  # JSON has no infinity
        "concurrency": concurrency if concurrency > 0 else None,
    }


def _memory(llm: LLM, device: Any) -> dict[str, Any]:
    """Bytes by component on each device, as planned, and the peaks that were seen."""
    stats = device.memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        **llm.stats()["memory_bytes"],
        "peak_on_device": stats.get("peak_bytes_in_use"),
        "peak_of_process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }
