"""The engine beside transformers on the GPU at hand: random weights, Llama-3.1-8B's shape.

    python -m tests.transformers_on_gpu --folder /tmp/model          # 16 GB are written there
    python -m tests.transformers_on_gpu --folder /tmp/model --tiny   # anywhere: does it run?

Says how long a step of transformers' `generate` takes with a static cache (not compiled), and by
how much log-probabilities differ: those of prompts, and of the tokens that the engine decodes, each
given what came before.  Needs the extra `compare`.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import numpy as np

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch has its share

from jaxinfer import LLM, SamplingParams, checkpoint, export
from jaxinfer.bench.side import load_extra

torch, transformers = load_extra("transformers", "torch", "transformers")

TINY = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, vocab_size=512,
)  # fmt: skip
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPTS, DECODED = (5, 33, 129, 300, 700), 24
FEW, MANY = 4, 36  # new tokens: a step is what the further ones take


def random_model(tiny: bool) -> Any:
    """transformers' own, with the weights that it begins with."""
    values = export.config_json(checkpoint.resolve("llama-3.1-8b", "dummy"))
    values = {**values, **(TINY if tiny else {}), "dtype": "bfloat16"}
    config = transformers.LlamaConfig.from_dict(values)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        return transformers.LlamaForCausalLM(config).eval()


@torch.inference_mode()
def logprobs(model: Any, ids: list[int]) -> np.ndarray:
    """Of each token but the first, given those before it."""
    tokens = torch.tensor(ids, device=DEVICE)
    found = torch.log_softmax(model(tokens[None]).logits[0].float(), -1)
    return found[:-1].gather(1, tokens[1:, None])[:, 0].cpu().numpy()


@torch.inference_mode()
def seconds(model: Any, ids: Any, new: int) -> float:
    """Of a call of `generate`, the second one."""
    taken = 0.0
    for _ in range(2):
        started = time.perf_counter()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
            max_new_tokens=new, min_new_tokens=new, cache_implementation="static",
            disable_compile=True,
        )[0, -1].item()  # fmt: skip
        taken = time.perf_counter() - started
    return taken


def scored(folder: str, prompts: list[list[int]], **engine: Any) -> Any:
    """The engine's log-probabilities of the tokens of prompts, and of what it decodes from them.

    By two ways: where those of prompts are wanted, a step has no more tokens than rows, so each
    passes for a row of its own; else prompts run in chunks.
    """
    ways: tuple[Any, ...] = (
        dict(max_tokens=1, prompt_logprobs=0), dict(max_tokens=DECODED, logprobs=0)
    )  # fmt: skip
    limits = dict(max_batch_size=8, max_num_tokens=64, max_seq_len=1024, num_pages=200)
    engine |= dict(dtype="bfloat16", skip_tokenizer_init=True, enable_prefix_caching=False)
    found: list[Any] = []
    with LLM(folder, **limits, **engine) as llm:
        for way in ways:
            params = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, **way)
            found.append(llm.generate(prompts, params))
    for prompt, first, output in zip(prompts, *found, strict=True):
        ids = output.outputs[0].token_ids
        entries = first.prompt_logprobs[1:] + output.outputs[0].logprobs
        told = [
            entry[token].logprob for token, entry in zip(prompt[1:] + ids, entries, strict=True)
        ]
        yield prompt + ids, len(prompt), np.array(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", required=True, help="for the model; what is there is replaced")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rows", type=int, nargs="*", default=[64, 1])
    parser.add_argument("--context", type=int, default=1000)
    parser.add_argument("--pages", nargs="+", default=["auto", "fp8_e4m3", "int8"])
    args = parser.parse_args()
    model = random_model(args.tiny)
    model.save_pretrained(args.folder)
    rng = np.random.default_rng(0)
    for rows in args.rows:
        ids = torch.tensor(rng.integers(model.config.vocab_size, size=(rows, args.context)))
        few, many = (seconds(model, ids.to(DEVICE), new) for new in (FEW, MANY))
        step = (many - few) / (MANY - FEW)
        print(
            f"transformers, {rows} rows: {1e3 * step:.2f} ms a step, prompts {few:.2f} s",
            flush=True,
        )
    prompts = [rng.integers(model.config.vocab_size, size=n).tolist() for n in PROMPTS]
    for pages in args.pages:
        there, decoded, spread = [], [], []
        for ids, length, told in scored(args.folder, prompts, kv_cache_dtype=pages):
            want = logprobs(model, ids)
            there.append(np.abs(told - want)[: length - 1])
            decoded.append(np.abs(told - want)[length - 1 :])
            spread.append(want)
        for words, some in (("prompts", there), ("decoded", decoded)):
            far = np.concatenate(some)
            print(
                f"pages {pages}, {words}: differ by {far.mean():.3f}, at most {far.max():.3f}, of "
                f"{len(far)}, which spread by {np.concatenate(spread).std():.2f}", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
