"""`compare`: jaxinfer beside what one would use instead, on the same weights and prompts."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from jaxinfer.bench import rounds, serve
from jaxinfer.bench.rounds import Load
from jaxinfer.bench.side import Side, load_extra
from jaxinfer.config import EngineConfig
from jaxinfer.errors import ConfigError
from jaxinfer.options import add_fields, given, seed
from jaxinfer.request import SamplingParams

if TYPE_CHECKING:
    from jaxinfer.llm import LLM

HELP = "beside transformers, llama.cpp or a bare loop, on the same weights and prompts"
DESCRIPTION = """\
Generates with the engine and with something else in turn, with the same weights and from the same
random prompts, greedily, in float32, and reports the ratios of their tokens a second, round by
round.  A first round warms both up and is not counted.  Outputs must be the same but for near-ties,
which are counted (llama.cpp's may differ, and are counted).  docs/benchmarks.md says how the other
side is run and what the figures mean."""

AGAINST = {
    "transformers": ("torch", "transformers"),
    "llama.cpp": ("llama_cpp", "gguf"),
    "loop": (),
}
LLAMA_TYPES = ("F32", "Q8_0")
ROWS = [1, 8, 32]
MIXED_LENGTHS = 16, 256  # of prompts and of outputs, both included
MIXED_BATCH = 32  # most requests of a mixed load in flight at once
# What would make the two sides unlike, or means nothing here.
WITHOUT_OPTION = tuple(
    f"EngineConfig.{name}"
    for name in ("dtype", "kv_cache_dtype", "seed", "tokenizer", "skip_tokenizer_init",
                 "tensor_parallel_size", "devices")
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    add = parser.add_argument
    add("--model", required=True, help='a folder, "demo", a preset\'s name or a hub id')
    add("--against", required=True, choices=AGAINST, help="what to compare with")
    add("--rows", type=int, nargs="+", metavar="N",
        help="numbers of requests of equal lengths; each is a load of its own (default: "
        f"{' '.join(map(str, ROWS))}, or none with --mixed)")  # fmt: skip
    add("--input-len", type=int, default=128, metavar="N",
        help="tokens of each of their prompts (default: %(default)s)")  # fmt: skip
    add("--output-len", type=int, default=64, metavar="N",
        help="tokens of each of their outputs, at least 2 (default: %(default)s)")  # fmt: skip
    add("--mixed", type=int, metavar="N",
        help=f"a load of N requests whose prompts and outputs have {MIXED_LENGTHS[0]} to "
        f"{MIXED_LENGTHS[1]} tokens, at most {MIXED_BATCH} in flight at once")  # fmt: skip
    add("--llama-type", choices=LLAMA_TYPES, default="F32",
        help="how llama.cpp stores its weights (default: %(default)s)")  # fmt: skip
    add("--rounds", type=int, default=5, metavar="N",
        help="rounds that are counted (default: %(default)s)")  # fmt: skip
    add("--seed", type=seed, default=0,
        help="of dummy weights, prompts and lengths (default: %(default)s)")  # fmt: skip
    add_fields(parser.add_argument_group("engine"), EngineConfig, without=WITHOUT_OPTION)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, and return the report; raises a `JaxinferError`."""
    rows = args.rows or ([] if args.mixed else ROWS)
    for name, values, least in (
        ("rows", rows, 1), ("input-len", [args.input_len], 1), ("output-len", [args.output_len], 2),
        ("mixed", [1 if args.mixed is None else args.mixed], 1), ("rounds", [args.rounds], 1),
    ):  # fmt: skip
        if min(values, default=least) < least:
            raise ConfigError(f"--{name} must be at least {least}, got {min(values)}")
    loads = _loads(rows, args)
    longest = max(load.longest for load in loads)
    engine: dict[str, Any] = {
        "max_batch_size": max([*rows, min(args.mixed or 1, MIXED_BATCH)]),
        "max_seq_len": longest,
        **given(vars(args), EngineConfig),
        "seed": args.seed, "dtype": "float32", "skip_tokenizer_init": True,
    }  # fmt: skip
    EngineConfig.from_dict(engine)
    load_extra(args.against, *AGAINST[args.against])  # what lacks shall be said at once
    from jaxinfer.llm import LLM  # jax, only now

    with LLM(args.model, **engine) as llm:
        if llm.limits.max_seq_len < longest:
            raise ConfigError(
                f"a request has {longest} tokens, but max_seq_len is {llm.limits.max_seq_len}: "
                "raise it as far as the model allows, or ask for fewer tokens"
            )
        with contextlib.closing(_other(llm, args)) as other:
            return _measure(llm, other, loads, args)


def _loads(rows: Sequence[int], args: argparse.Namespace) -> list[Load]:
    loads = [Load(f"rows_{n}", [args.input_len] * n, [args.output_len] * n) for n in rows]
    if args.mixed:
        rng = np.random.default_rng(args.seed)
        lengths = rng.integers(*MIXED_LENGTHS, (2, args.mixed), endpoint=True).tolist()
        loads.append(Load(f"mixed_{args.mixed}", *lengths, split=False))
    return loads


class Engine:
    """The engine as one of the two sides."""

    name = "jaxinfer"

    def __init__(self, llm: LLM):
        self._llm = llm

    def generate(self, prompts: Sequence[list[int]], lengths: Sequence[int]) -> list[list[int]]:
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
        outputs = self._llm.generate(list(prompts), params, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]


def _other(llm: LLM, args: argparse.Namespace) -> Side:
    """What the engine is compared with; imports nothing of what it is not."""
    from jaxinfer import checkpoint

    batch = llm.limits.max_batch_size
    if args.against == "loop":
        from jaxinfer.bench.loop import Loop

        return Loop(llm._weights, llm.model_config, batch)
    platform = llm.step.mesh.devices.flat[0].platform
    if platform != "cpu":
        raise ConfigError(
            f"--against {args.against} runs on the CPU, and the engine is on the {platform}: set "
            "JAX_PLATFORMS=cpu"
        )
    files = checkpoint.resolve(args.model, llm.engine_config.load_format)
    if args.against == "llama.cpp":
        from jaxinfer.bench.llama_cpp_side import LlamaCpp

        return LlamaCpp(llm._weights, files, batch, llm.limits.max_seq_len, args.llama_type)
    from jaxinfer.bench.transformers_side import Transformers

    return Transformers(llm._weights, files, batch)


def _measure(
    llm: LLM, other: Side, loads: Sequence[Load], args: argparse.Namespace
) -> dict[str, Any]:
    rng, found = np.random.default_rng(args.seed), []
    total = len(loads) * (args.rounds + 1)
    with tqdm(total=total, desc="measuring", unit="round", disable=None) as bar:
        for load in loads:
            found.append(rounds.measure(
                Engine(llm), other, load, rounds=args.rounds, rng=rng, tick=bar.update,
                vocab_size=llm.model_config.vocab_size, strict=args.against != "llama.cpp",
            ))  # fmt: skip
    return {
        "engine": serve.engine_section(llm, args.model),
        "machine": serve.machine_section(llm.step.mesh.devices.flat[0]),
        "world_info": serve.world_section(llm, np.inf, llm.limits.max_batch_size),
        "against": {"name": other.name, "how": other.how, "versions": other.versions},
        "load": {
            "rounds": args.rounds,
            "seed": args.seed,
            **{
                load.name: {"input_tokens": sum(load.inputs), "output_tokens": sum(load.outputs)}
                for load in loads
            },
        },
        **rounds.report(found, other.name),
    }
