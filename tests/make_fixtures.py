"""Writes tests/fixtures/: tiny checkpoints and tokenizers with the answers of transformers.

Run by hand, never by the tests: `pip install torch==2.13.0 transformers==5.24.0 jinja2`, then
`python tests/make_fixtures.py [NAME …]`. The versions used are written into every expected.* file.

<model>/expected.npz   prompts [3, 41] int32, padded with -1; for each prompt i of T tokens:
                       logits_i [T, V] float32 (float32 arithmetic, eager attention, no cache),
                       greedy_i [24] int32, gap_i [24] float32 (top-1 minus top-2 logit);
                       seed, attn, versions (JSON). Tokens 2 and 3, the ends, are never in greedy_i.
tokenizer*/expected.json  texts: text, ids, ids_special (with the special tokens added), decoded
                       and decoded_skip (ids_special, special tokens kept and skipped);
                       decodes: the same for ids that no text gives (cut characters);
                       chats: messages, kwargs, then prompt and ids, or the error raised.
sampling.npz           see `make_sampling`.
texts.json             the one input: what the tokenizers learn from, encode and render.
"""

import collections
import itertools
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.generation import logits_process as warpers

FIXTURES = Path(__file__).parent / "fixtures"
SAMPLES = json.loads((FIXTURES / "texts.json").read_text())
VERSIONS = {m.__name__: m.__version__ for m in (torch, transformers, tokenizers, np)}
PROMPT_LENGTHS, NEW_TOKENS = (5, 23, 41), 24

# fmt: off
LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=64)
LINEAR = dict(rope_type="linear", rope_theta=1e4, factor=4.0)
YARN = dict(rope_type="yarn", rope_theta=20.0, factor=4.0, original_max_position_embeddings=32,
            beta_fast=3.0, beta_slow=0.5)
# All prompts are longer than the first one's original context, none is than the second's.
LONG = dict(rope_type="longrope", rope_theta=100.0, short_factor=[9.0] * 6,
            long_factor=[1.0, 1.1, 1.5, 2.0, 3.5, 6.0])
SHORT = dict(rope_type="longrope", rope_theta=100.0, partial_rotary_factor=0.75,
             short_factor=[1.0, 1.2, 1.7, 2.5, 4.0, 4.5], long_factor=[9.0] * 6,
             attention_factor=1.25)
# A window slides in the layers that are not full, with a base of its own and no scaling.
TWO_LINEAR = dict(full_attention=LINEAR,
                  sliding_attention=dict(rope_type="default", rope_theta=100.0))
TWO_YARN = dict(full_attention=YARN,
                sliding_attention=dict(rope_type="default", rope_theta=20.0))
# Name: (family, V, D, F, layers, N, K), other config fields. All else is in `make_model`.
MODELS = {
    "llama": (("llama", 131, 36, 36, 2, 3, 3), dict(head_dim=12)),
    "llama3": (("llama", 149, 24, 40, 2, 6, 2), dict(
        head_dim=20, rope_parameters=LLAMA3, tie_word_embeddings=True, rms_norm_eps=1e-5)),
    "llama-linear": (("llama", 157, 28, 36, 2, 7, 1), dict(head_dim=12, rope_parameters=LINEAR)),
    "llama-bias": (("llama", 133, 28, 36, 2, 4, 1), dict(
        head_dim=24, attention_bias=True, mlp_bias=True)),
    "llama-bf16": (("llama", 139, 36, 44, 3, 3, 3), dict()),
    "mistral": (("mistral", 137, 24, 28, 3, 8, 2), dict(head_dim=12, sliding_window=7)),
    "qwen2": (("qwen2", 139, 48, 24, 2, 4, 1), dict(tie_word_embeddings=True)),
    "qwen2-window": (("qwen2", 137, 36, 24, 3, 3, 1), dict(
        use_sliding_window=True, sliding_window=6, max_window_layers=1)),
    "qwen3": (("qwen3", 151, 20, 28, 2, 8, 2), dict(head_dim=24)),
    "gemma2": (("gemma2", 149, 24, 28, 3, 4, 2), dict(
        head_dim=12, query_pre_attn_scalar=5, sliding_window=7, attn_logit_softcapping=2.0,
        final_logit_softcapping=12.0)),
    "gemma3": (("gemma3_text", 151, 24, 28, 3, 4, 1), dict(
        head_dim=20, query_pre_attn_scalar=7, sliding_window=6, sliding_window_pattern=2,
        rope_parameters=TWO_LINEAR)),
    "phi3": (("phi3", 139, 36, 28, 2, 3, 3), dict(sliding_window=9, pad_token_id=0)),
    "phi3-long": (("phi3", 137, 36, 28, 2, 3, 1), dict(
        rope_parameters=LONG, original_max_position_embeddings=4, pad_token_id=0)),
    "phi3-partial": (("phi3", 149, 48, 20, 2, 3, 1), dict(
        rope_parameters=SHORT, original_max_position_embeddings=128, tie_word_embeddings=True,
        pad_token_id=0)),
    "smollm3": (("smollm3", 149, 36, 28, 3, 3, 1), dict(
        no_rope_layers=[1, 0, 1], use_sliding_window=True, sliding_window=8, pad_token_id=0)),
    "olmo2": (("olmo2", 137, 24, 28, 2, 4, 2), dict(head_dim=12)),
    "olmo3": (("olmo3", 137, 24, 24, 4, 4, 2), dict(
        head_dim=12, sliding_window=7, rope_parameters=TWO_YARN)),
    "granite": (("granite", 151, 36, 28, 3, 3, 1), dict(
        embedding_multiplier=3.0, residual_multiplier=0.4, attention_multiplier=0.2,
        logits_scaling=2.5, tie_word_embeddings=True)),
}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads", "num_key_value_heads")
# The spelling of transformers 4, which most checkpoints have, and that of the first Llama.
OLD = {"llama3", "llama-bf16", "qwen2", "qwen2-window", "gemma2", "gemma3", "phi3-partial",
       "granite"}
ABSENT = {"llama-bf16": ("head_dim", "num_key_value_heads", "rope_theta", "rope_scaling",
                         "attention_bias", "mlp_bias", "tie_word_embeddings"),
          "gemma2": ("layer_types", "tie_word_embeddings"),
          "gemma3": ("layer_types", "tie_word_embeddings")}
# fmt: on


def randomise(model, seed, dtype):
    """Draws weights large enough that attention is uneven and the logits are spread."""
    generator = torch.Generator().manual_seed(seed)
    family = model.config.model_type
    centre = 0 if "gemma" in family else 1  # of what is stored for a norm
    echoes = "gemma" in family or family == "granite"  # scaled and tied: would repeat its input
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        gain = 3.0 if not echoes and ("embed" in name or "lm_head" in name) else 1.5
        if echoes and name == "model.norm.weight":
            value = centre - 1 + 1.5 * noise
        elif "norm" in name:
            value = centre + 0.3 * noise
        else:
            value = 0.5 * noise if "bias" in name else noise * gain / weight.shape[-1] ** 0.5
        weight.data.copy_(value.to(dtype))


def expected(model, seed):
    """Returns the arrays of expected.npz for prompts drawn from `seed`."""
    rng, vocab_size = np.random.default_rng(seed), model.config.vocab_size
    prompts = np.full((len(PROMPT_LENGTHS), max(PROMPT_LENGTHS)), -1, np.int32)
    assert model.config._attn_implementation == "eager"
    arrays = dict(prompts=prompts, seed=seed, attn="eager", versions=json.dumps(VERSIONS))
    for i, length in enumerate(PROMPT_LENGTHS):
        prompts[i, :length] = rng.integers(4, vocab_size, length)
        ids, gaps = torch.tensor(prompts[None, i, :length], dtype=torch.long), []
        arrays[f"logits_{i}"] = model(ids, use_cache=False).logits[0].numpy()
        for _ in range(NEW_TOKENS):
            top = model(ids, use_cache=False).logits[0, -1].topk(2)
            gaps.append(top.values[0] - top.values[1])
            ids = torch.cat([ids, top.indices[None, :1]], dim=1)
        arrays[f"greedy_{i}"] = ids[0, length:].numpy().astype(np.int32)
        arrays[f"gap_{i}"] = np.array(gaps, np.float32)
    return arrays


def is_telling(arrays):
    """Tells whether the greedy tokens vary, are never close calls and never an end."""
    rows = [(arrays[f"greedy_{i}"], arrays[f"gap_{i}"]) for i in range(len(PROMPT_LENGTHS))]
    sure = all(min(gaps) > 0.01 and not {2, 3} & {*tokens} for tokens, gaps in rows)
    return sure and all(len({*tokens}) >= 10 for tokens, _ in rows)


def rewrite_config(path, absent):
    """Spells config.json as transformers 4 does, without the keys in `absent`."""
    config = json.loads(path.read_text())
    rope, config["torch_dtype"] = config.pop("rope_parameters"), config.pop("dtype")
    if "sliding_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        config["sliding_window_pattern"] = config.pop("_sliding_window_pattern")
        rope = rope["full_attention"]
    config["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    if config["model_type"] == "qwen2":
        config.pop("layer_types", None)
        if not config["use_sliding_window"]:  # checkpoints have these, and they mean nothing
            config.update(sliding_window=6, max_window_layers=1)
    config = {key: value for key, value in config.items() if key not in absent}
    path.write_text(json.dumps(config, indent=2) + "\n")


def make_model(name, sizes, fields):
    """Writes one checkpoint: the first seed with telling answers, read back before it counts."""
    folder, dtype = FIXTURES / name, torch.bfloat16 if "bf16" in name else torch.float32
    fields = dict(zip(SIZES, sizes[1:], strict=True)) | fields
    fields |= dict(max_position_embeddings=512, bos_token_id=1, eos_token_id=2)
    config = AutoConfig.for_model(sizes[0], **fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for seed in itertools.count():
        randomise(model, seed, dtype)
        if is_telling(arrays := expected(model, seed)):
            break
    if name == "llama3":  # as Llama 3.1 has it: several ends, and sampling by default
        model.generation_config.update(eos_token_id=[2, 3], do_sample=True, temperature=0.6)
    shard = "50KB" if name == "mistral" else "1GB"
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    if name in OLD:
        rewrite_config(folder / "config.json", ABSENT.get(name, ()))
    again = dict(dtype=torch.float32, attn_implementation="eager")
    model = AutoModelForCausalLM.from_pretrained(folder, **again).eval()
    for key, value in expected(model, seed).items():
        assert np.array_equal(value, arrays[key]), (name, key)
    np.savez_compressed(folder / "expected.npz", **arrays)


def byte_level():
    """Returns a byte-level BPE as Llama 3 and Qwen have it, with BOS put in front."""
    regex = r"(?i:'s|'t|'re|'ll)| ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(tokenizers.Regex(regex), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|bos|>", "<|eos|>", "<|start|>", "<|end|>"]
    options = dict(special_tokens=special, initial_alphabet=to_bytes.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, **options)
    tokenizer.train_from_iterator(SAMPLES["corpus"], trainer)
    tokenizer.add_tokens(["<think>", "</think>"])  # added, but shown in the text
    bos = processors.TemplateProcessing("<|bos|> $A", "$A $B", [("<|bos|>", 1)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), bos])
    return tokenizer, dict(bos_token="<|bos|>", eos_token="<|end|>", pad_token="<|pad|>")


def byte_fallback():
    """Returns a BPE with bytes for unknown characters, as SentencePiece gives Llama 2."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    known = {c for c, _ in collections.Counter("".join(SAMPLES["corpus"])).most_common(60)}
    corpus = ["".join(c for c in line if c in known) for line in SAMPLES["corpus"]]
    trained.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    state = json.loads(trained.to_str())["model"]
    head = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {token: i for i, token in enumerate([*head, *state["vocab"]])}
    merges, options = map(tuple, state["merges"]), dict(fuse_unk=True, byte_fallback=True)
    bpe = models.BPE(vocab, list(merges), unk_token="<unk>", **options)
    tokenizer = tokenizers.Tokenizer(bpe)
    to_pieces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    to_text = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.normalizer = normalizers.Sequence(to_pieces)
    tokenizer.decoder = decoders.Sequence([*to_text, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(head[:3])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "$A $B", [("<s>", 1)])
    return tokenizer, dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def rewrite_tokenizer_config(path, tokenizer):
    """Spells it as transformers 4 does: special tokens as objects, added tokens by number."""
    config, added = json.loads(path.read_text()), tokenizer.get_added_tokens_decoder()
    added = {i: token.__getstate__() for i, token in added.items()}
    for i, key in enumerate(("unk_token", "bos_token", "eos_token")):
        config[key] = {"__type": "AddedToken", **added[i]}
    config |= dict(added_tokens_decoder=added, add_bos_token=True, add_eos_token=False)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.pop("backend")
    path.write_text(json.dumps(config, indent=2) + "\n")


def make_tokenizer(name, build, template):
    """Writes one tokenizer, with the template in a file of its own if it is called so."""
    folder, (raw, options) = FIXTURES / name, build()
    options["chat_template"] = "\n".join(SAMPLES["templates"][template]) + "\n"
    options |= dict(tokenizer_object=raw, clean_up_tokenization_spaces=False)
    in_file = dict(save_jinja_files=template == "in_file")
    PreTrainedTokenizerFast(**options).save_pretrained(folder, **in_file)
    raw.save(str(folder / "tokenizer.json"), pretty=False)  # a third of the size
    if build == byte_fallback:
        rewrite_tokenizer_config(folder / "tokenizer_config.json", raw)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def decoded(ids):
        skipped = tokenizer.decode(ids, skip_special_tokens=True)
        return dict(decoded=tokenizer.decode(ids), decoded_skip=skipped)

    texts, decodes, chats = [], [], []
    for text in SAMPLES["texts"]:
        ids, ids_special = tokenizer.encode(text, add_special_tokens=False), tokenizer.encode(text)
        assert ids_special == raw.encode(text).ids
        texts.append(dict(text=text, ids=ids, ids_special=ids_special, **decoded(ids_special)))
    cut = tokenizer.encode(SAMPLES["cut"], add_special_tokens=False)
    for ids in (cut[:-1], cut[1:], cut[::-1], [cut[-1]], [2, *cut[:-2], 1, *cut]):
        decodes.append(dict(ids=ids, **decoded(ids)))
    for chat in SAMPLES["chats"]:
        messages, options = chat["messages"], chat["kwargs"]
        try:
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, **options)
            ids = tokenizer.apply_chat_template(messages, return_dict=False, **options)
            chats.append(dict(**chat, prompt=prompt, ids=ids))
        except Exception as error:
            chats.append(dict(**chat, error=str(error)))
    answers = dict(versions=VERSIONS, texts=texts, decodes=decodes, chats=chats)
    lines = json.dumps(answers).replace(', {"text', ',\n{"text').replace(', {"ids', ',\n{"ids')
    (folder / "expected.json").write_text(lines.replace(', {"mess', ',\n{"mess') + "\n")


def make_sampling():
    """Writes sampling.npz: B=12 rows of V=307 logits, some tied, and what survives each filter.

    logits [B, V]; prompt [B, 9] and output [B, 7] int32, padded with -1; the parameters
    repetition_penalty, temperature, min_p, top_k (0: off), top_p [B], neutral values included.
    For each of these five: alone_<filter>_mask and _probs [B, V] (only this filter applied to
    logits; mask is true where a token survives) and pipeline_<filter>_mask and _probs (this
    filter and all before it, in that order). tied_<alone|pipeline> [B]: top_p had to cut among
    equal logits, where which of the equals survive is the sort's choice; their number is not.
    """
    rng, B, V = np.random.default_rng(198), 12, 307  # nothing is within 2e-5 of a threshold
    logits = rng.normal(0, 2.5, (B, V)).astype(np.float32)
    logits[3:7] = np.round(logits[3:7] * 2) / 2  # many ties
    logits[7, ::5] = -np.inf  # banned tokens
    logits[8] = 0.25  # nothing but ties
    prompt = rng.integers(0, V, (B, 9)).astype(np.int32)
    output = rng.integers(0, V, (B, 7)).astype(np.int32)
    prompt[:, 4] = logits.argmax(1)  # a favourite that was said before
    prompt[:, 5] = output[:, 1]  # twice in the history, penalised once
    prompt[1::2, 8] = output[5:, 3:] = output[9] = -1  # row 9 has no output yet
    history = np.concatenate([prompt, output], 1).astype(np.int64)
    # fmt: off
    filters = dict(  # class, its neutral value, the value of each row
        repetition_penalty=(warpers.RepetitionPenaltyLogitsProcessor, 1,
                            [1.3, 1, 2, 1.1, 1.7, 1, 0.8, 1.2, 1.3, 1.5, 1, 1.05]),
        temperature=(warpers.TemperatureLogitsWarper, 1,
                     [1, 0.7, 1.5, 0.3, 1, 2, 0.9, 0.6, 1, 1.1, 0.05, 1.3]),
        min_p=(warpers.MinPLogitsWarper, 0,
               [0, 0.02, 0.001, 0, 0.05, 0.1, 0.01, 0, 0, 1, 0, 0.004]),
        top_k=(warpers.TopKLogitsWarper, 0, [5, 0, 40, 7, 11, 30, 0, 50, 20, 0, 1, 1000]),
        top_p=(warpers.TopPLogitsWarper, 1,
               [0.9, 0.5, 1, 0.8, 0.95, 0.7, 0.35, 0.99, 0.6, 0.9, 0.9, 0.001]),
    )
    # fmt: on
    values = {name: np.array(row, np.float32) for name, (_, _, row) in filters.items()}
    values["top_k"] = values["top_k"].astype(np.int32)

    def apply(name, row, scores):
        make, neutral, _ = filters[name]
        value, ids = values[name][row].item(), torch.tensor(history[row][history[row] >= 0])
        return scores if value == neutral else make(value)(ids[None], scores)

    arrays = dict(logits=logits, prompt=prompt, output=output, **values)
    rows = list(torch.tensor(logits)[:, None])
    for way in ("alone", "pipeline"):
        after = rows
        for name in filters:
            before = after if way == "pipeline" else rows
            after = [apply(name, row, before[row]) for row in range(B)]
            arrays[f"{way}_{name}_mask"] = torch.cat(after).isfinite().numpy()
            arrays[f"{way}_{name}_probs"] = torch.cat(after).softmax(-1).numpy()
        before, kept = torch.cat(before), torch.cat(after).isfinite()
        lowest = before.masked_fill(~kept, np.inf).amin(1, keepdim=True)  # of those that survived
        arrays[f"tied_{way}"] = ((before == lowest) & ~kept).any(1).numpy()
    np.savez_compressed(FIXTURES / "sampling.npz", versions=json.dumps(VERSIONS), **arrays)


def main():
    """Writes everything anew, or (`make_fixtures.py NAME …`) only these checkpoints."""
    transformers.logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)  # sums in one order
    if names := sys.argv[1:]:
        for name in names:
            shutil.rmtree(FIXTURES / name, ignore_errors=True)
            make_model(name, *MODELS[name])
        return
    for folder in (path for path in FIXTURES.iterdir() if path.is_dir()):
        shutil.rmtree(folder)
    for name, case in MODELS.items():
        make_model(name, *case)
    make_tokenizer("tokenizer", byte_level, "in_config")
    make_tokenizer("tokenizer-jinja", byte_level, "in_file")
    make_tokenizer("tokenizer-bytefallback", byte_fallback, "llama2")
    make_sampling()


if __name__ == "__main__":
    main()
