"""The engine on the GPU at hand: its kernels beside the reference, and the same in any company.

    python -m tests.engine_on_gpu                                    # Llama-3.2-1B's shape
    python -m tests.engine_on_gpu --model demo --backend reference   # anywhere: does it run?

Prompts of 1 to 700 tokens and their outputs run in steps of 64 tokens: some of prompts, some that
decode, most of both.  Both sides round, each in its own order.  With pages of bfloat16 their
log-probabilities may differ by `CLOSE` on average; with quantised pages also by what quantising
alone changes.  The exit code counts what failed.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np

from jaxinfer import LLM, SamplingParams

CLOSE = 0.1
LENGTHS, DECODED = (1, 5, 33, 64, 129, 300, 700), 24
LIMITS = dict(max_batch_size=8, max_num_tokens=64, max_seq_len=1024)
# Of each request its output, their log-probabilities, and those of its prompt's tokens.
Scored = list[tuple[list[int], list[float], list[float]]]


def scored(llm: LLM, prompts: list[list[int]]) -> Scored:
    """What an engine makes of prompts that it is given together."""
    params = SamplingParams(
        temperature=0, max_tokens=DECODED, logprobs=0, prompt_logprobs=0, ignore_eos=True,
        detokenize=False,
    )  # fmt: skip
    outputs: Any = llm.generate(prompts, params)
    found = []
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = output.outputs[0].token_ids
        decoded, there = (
            [entry[token].logprob for token, entry in zip(tokens, entries, strict=True)]
            for tokens, entries in (
                (ids, output.outputs[0].logprobs), (prompt[1:], output.prompt_logprobs[1:])
            )
        )  # fmt: skip
        found.append((ids, decoded, there))
    return found


def far(some: Scored, others: Scored) -> tuple[float, float]:
    """By how much log-probabilities differ on average, and at most: those of the prompts' tokens,
    and of outputs' as far as they follow the same ones."""
    parts = []
    for (ids, decoded, there), (other_ids, other_decoded, other_there) in zip(
        some, others, strict=True
    ):
        parted = [one != other for one, other in zip(ids, other_ids, strict=True)]
        same = parted.index(True) if any(parted) else len(ids)
        parts += [np.subtract(there, other_there), np.subtract(decoded, other_decoded)[:same]]
    differences = np.abs(np.concatenate(parts))
    return float(differences.mean()), float(differences.max())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama-3.2-1b")
    parser.add_argument("--backend", default="mosaic_gpu")
    parser.add_argument("--pages", nargs="+", default=["auto", "fp8_e4m3", "int8"])
    args = parser.parse_args(argv)
    engine: dict[str, Any] = dict(seed=0, enable_prefix_caching=False, **LIMITS)
    if args.model != "demo":
        engine |= dict(load_format="dummy", skip_tokenizer_init=True)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 256, length).tolist() for length in LENGTHS]
    failed, plain = 0, None

    def say(words: str, good: bool) -> None:
        nonlocal failed
        failed += not good
        print(f"{words}: {'good' if good else 'WRONG'}", flush=True)

    for pages in args.pages:
        sides = []
        for backend in (args.backend, "reference"):
            options = dict(attention_backend=backend, kv_cache_dtype=pages)
            with LLM(args.model, **options, **engine) as llm:
                sides.append(scored(llm, prompts))
        (average, most), limit = far(*sides), CLOSE
        words = (
            f"{pages} pages, {args.backend} and reference: {average:.3f} apart, at most {most:.3f}"
        )
        if pages == "auto":
            plain = sides[1]
        elif plain is not None:
            quantising = far(sides[1], plain)[0]
            limit = max(limit, quantising)
            words += f"; quantising changes {quantising:.3f}"
        say(words, average <= limit)

    engine |= dict(attention_backend=args.backend, deterministic=True)
    with LLM(args.model, **engine) as llm:
        together = scored(llm, prompts)
        say("deterministic, again", scored(llm, prompts) == together)
        say("deterministic, in another order", scored(llm, prompts[::-1])[::-1] == together)
        alone = [one for prompt in prompts for one in scored(llm, [prompt])]
        say("deterministic, alone", alone == together)
    return failed


if __name__ == "__main__":
    sys.exit(main())
