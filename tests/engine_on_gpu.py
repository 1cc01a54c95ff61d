"""The engine on the GPU at hand: its kernels beside the reference, and the same in any company.

    python -m tests.engine_on_gpu                                    # Llama-3.2-1B's shape
    python -m tests.engine_on_gpu --model demo --backend reference   # anywhere: does it run?

Prompts of 1 to 700 tokens, and what follows them, run in steps of up to 64 tokens: of prompts, of
rows that decode, and most of both.  Compared are log-probabilities of the likeliest tokens at each
place of an output that follows the same tokens on both sides.  Both round, each in its own order,
and round numbers of pages alike, so one limit is for pages of any kind: `CLOSE` on average, `MOST`
anywhere.  The exit code counts what failed.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np

from jaxinfer import LLM, SamplingParams

CLOSE, MOST = 0.05, 0.3
LENGTHS, DECODED, LIKELIEST = (1, 5, 33, 64, 129, 300, 700) * 2, 24, 20
LIMITS = dict(max_batch_size=8, max_num_tokens=64, max_seq_len=1024, num_pages=400)
# Of each request its output's tokens, and at each place the likeliest with their log-probabilities.
Scored = list[tuple[list[int], list[dict[int, float]]]]


def scored(llm: LLM, prompts: list[list[int]]) -> Scored:
    """What an engine makes of prompts that it is given together."""
    params = SamplingParams(
        temperature=0, max_tokens=DECODED, logprobs=LIKELIEST, ignore_eos=True, detokenize=False
    )
    outputs: Any = llm.generate(prompts, params)
    found = []
    for output in outputs:
        places = [
            {token: one.logprob for token, one in place.items()}
            for place in output.outputs[0].logprobs
        ]
        found.append((output.outputs[0].token_ids, places))
    return found


def differences(some: Scored, others: Scored) -> np.ndarray:
    """Of the log-probabilities of tokens that both sides name, at places that follow the same
    tokens: where two outputs part is the last."""
    found = []
    for (ids, places), (other_ids, other_places) in zip(some, others, strict=True):
        for token, other_token, place, other_place in zip(
            ids, other_ids, places, other_places, strict=True
        ):
            found += [abs(place[one] - other_place[one]) for one in place if one in other_place]
            if token != other_token:
                break
    return np.array(found)


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
    places, failed = len(prompts) * DECODED, 0

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
                steps = llm.stats()["steps"]
        found = differences(*sides)
        enough = len(found) >= places * LIKELIEST / 8  # outputs may part early, but not all at once
        average, most = (found.mean(), found.max()) if len(found) else (np.inf, np.inf)
        say(
            f"{pages} pages, {steps} steps, {args.backend} and reference: {average:.3f} apart, at "
            f"most {most:.3f}, of {len(found)}",
            enough and average <= CLOSE and most <= MOST,
        )

        options = dict(attention_backend=args.backend, kv_cache_dtype=pages, deterministic=True)
        with LLM(args.model, **options, **engine) as llm:
            together = scored(llm, prompts)
            say("  deterministic, again", scored(llm, prompts) == together)
            say("  deterministic, in another order", scored(llm, prompts[::-1])[::-1] == together)
            alone = [one for prompt in prompts for one in scored(llm, [prompt])]
            say("  deterministic, alone", alone == together)
    return failed


if __name__ == "__main__":
    sys.exit(main())
