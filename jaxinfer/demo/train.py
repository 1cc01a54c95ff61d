"""Train the demo models on the source code of Python's standard library.

    python -m jaxinfer.demo.train                   # the model  (jaxinfer/demo/model)
    python -m jaxinfer.demo.train --preset draft    # its draft  (jaxinfer/demo/draft)

The data are the `.py` files of the interpreter that prepares them; tokenizer and tokens are kept in
`--cache-dir` and used again when they are there, so that both models share one tokenizer. The
result is an ordinary Hugging Face folder (LlamaForCausalLM, bfloat16 safetensors).

Array names end in their axes: B rows, T tokens, D model width, N query heads, K key/value heads,
H head width, F feed-forward width, V vocabulary.
"""

import argparse
import json
import math
import platform
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
from tokenizers import Tokenizer
from tqdm import tqdm

from jaxinfer.demo.data import SEPARATOR, VOCAB_SIZE, prepare

HERE = Path(__file__).parent
ROPE_THETA = 10000.0
NORM_EPS = 1e-5


@dataclass(frozen=True)
class Model:
    """The sizes of a Llama-shaped decoder, under their Hugging Face names."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    head_dim: int = 32


PRESETS = {"main": Model(256, 6, 8, 2, 640), "draft": Model(128, 2, 4, 1, 352)}
SHIPPED = {  # what each preset was really trained with, and where it lies
    "main": {"steps": 3000, "learning_rate": 0.015, "weight_decay": 0.5, "output": HERE / "model"},
    "draft": {"steps": 6000, "learning_rate": 0.004, "weight_decay": 0.1, "output": HERE / "draft"},
}


# ---- model ---------------------------------------------------------------------------------------


def init(model: Model, key: jax.Array) -> dict[str, jax.Array]:
    """Float32 weights under their Hugging Face names, so that the export is one call."""
    D, F, H = model.hidden_size, model.intermediate_size, model.head_dim
    q_size, kv_size = model.num_attention_heads * H, model.num_key_value_heads * H
    shapes = {"self_attn.q_proj": (q_size, D), "self_attn.k_proj": (kv_size, D),
              "self_attn.v_proj": (kv_size, D), "self_attn.o_proj": (D, q_size),
              "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}  # fmt: skip
    key, subkey = jax.random.split(key)
    weights = {"model.embed_tokens.weight": 0.02 * jax.random.normal(subkey, (VOCAB_SIZE, D))}
    for i in range(model.num_hidden_layers):
        for name, (rows, columns) in shapes.items():
            key, subkey = jax.random.split(key)
            scale = columns**-0.5
            if name in ("self_attn.o_proj", "mlp.down_proj"):  # keeps the residual stream near 1
                scale *= (2 * model.num_hidden_layers) ** -0.5
            weight = scale * jax.random.normal(subkey, (rows, columns))
            weights[f"model.layers.{i}.{name}.weight"] = weight
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{i}.{name}.weight"] = jnp.ones(D)
    weights["model.norm.weight"] = jnp.ones(D)
    return weights


def linear(x, weight):
    """x @ weight.T: Hugging Face stores a matrix as [out, in]."""
    return x @ weight.astype(x.dtype).T


def rms_norm(x_BTD, scale_D):
    x32_BTD = x_BTD.astype(jnp.float32)
    mean_square = jnp.mean(x32_BTD**2, axis=-1, keepdims=True)
    return (x32_BTD * jax.lax.rsqrt(mean_square + NORM_EPS) * scale_D).astype(x_BTD.dtype)


def rotate(x_BTNH):
    """RoPE in the half-rotation convention: dimension i turns together with i + H/2."""
    T, half = x_BTNH.shape[1], x_BTNH.shape[-1] // 2
    frequency = ROPE_THETA ** (-jnp.arange(half) / half)
    angle = jnp.arange(T)[:, None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x_BTNH[..., :half], x_BTNH[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


def forward(weights, tokens_BT, model: Model, on_gpu: bool = False):
    """Logits_BTV (float32) of the token that follows each position, given all up to it."""
    (B, T), heads = tokens_BT.shape, (*tokens_BT.shape, -1, model.head_dim)
    dtype = jnp.bfloat16 if on_gpu else jnp.float32
    embed_VD = weights["model.embed_tokens.weight"]
    x_BTD = embed_VD[tokens_BT].astype(dtype)  # cast after the gather: its gradient adds in float32
    for i in range(model.num_hidden_layers):
        layer = {name.split(".")[-2]: weight for name, weight in weights.items()
                 if name.startswith(f"model.layers.{i}.")}  # fmt: skip
        y_BTD = rms_norm(x_BTD, layer["input_layernorm"])
        q_BTNH = rotate(linear(y_BTD, layer["q_proj"]).reshape(heads))
        k_BTKH = rotate(linear(y_BTD, layer["k_proj"]).reshape(heads))
        v_BTKH = linear(y_BTD, layer["v_proj"]).reshape(heads)
        mixed_BTNH = jax.nn.dot_product_attention(
            q_BTNH, k_BTKH, v_BTKH, is_causal=True, implementation="cudnn" if on_gpu else "xla"
        )
        x_BTD += linear(mixed_BTNH.reshape(B, T, -1), layer["o_proj"])
        y_BTD = rms_norm(x_BTD, layer["post_attention_layernorm"])
        gate_BTF = jax.nn.silu(linear(y_BTD, layer["gate_proj"]))
        x_BTD += linear(gate_BTF * linear(y_BTD, layer["up_proj"]), layer["down_proj"])
    x_BTD = rms_norm(x_BTD, weights["model.norm.weight"])
    embed_VD = embed_VD.astype(dtype)
    return jnp.einsum("BTD,VD->BTV", x_BTD, embed_VD, preferred_element_type=jnp.float32)


def mean_loss(weights, window_BT, model: Model, on_gpu: bool):
    """Mean cross-entropy (nats a token) of every token of the windows but the first."""
    logits_BTV = forward(weights, window_BT[:, :-1], model, on_gpu)
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, window_BT[:, 1:]).mean()


# ---- training ------------------------------------------------------------------------------------


def evaluate(weights, tokens: np.ndarray, args, loss_fn) -> float:
    """Held-out loss in nats a token, over adjoining windows of the training length."""
    T = args.seq_len
    windows = [tokens[i : i + T + 1] for i in range(0, len(tokens) - T, T)]
    chunks = [np.stack(windows[i : i + 8]).astype(np.int32) for i in range(0, len(windows), 8)]
    return sum(float(loss_fn(weights, c)) * len(c) for c in chunks) / len(windows)


def train(model: Model, args, on_gpu: bool):
    """Return the weights rounded to bfloat16, their held-out loss, and the seconds it took."""
    tokens = jnp.asarray(np.load(args.cache_dir / "train.npy"))
    held_out = np.load(args.cache_dir / "held_out.npy")
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.learning_rate, args.warmup, args.steps, end_value=args.learning_rate / 100
    )
    is_matrix = partial(jax.tree.map, lambda weight: weight.ndim > 1)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.95, weight_decay=args.weight_decay, mask=is_matrix),
    )
    init_key, data_key = jax.random.split(jax.random.key(args.seed))
    loss_fn = jax.jit(partial(mean_loss, model=model, on_gpu=on_gpu))

    def step(tokens, state, count):
        weights, optimizer_state = state
        # Windows start anywhere, so the model meets contexts with and without a separator.
        key, last_start = jax.random.fold_in(data_key, count), len(tokens) - args.seq_len
        starts_B = jax.random.randint(key, (args.batch_size, 1), 0, last_start)
        window_BT = tokens[starts_B + jnp.arange(args.seq_len + 1)].astype(jnp.int32)
        loss, gradients = jax.value_and_grad(loss_fn)(weights, window_BT)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, weights)
        return (optax.apply_updates(weights, updates), optimizer_state), loss

    @partial(jax.jit, donate_argnums=1)
    def many_steps(tokens, state, counts):
        """The tokens live on the device, so one call can take many steps."""
        return jax.lax.scan(partial(step, tokens), state, counts)

    weights = init(model, init_key)
    state, start = (weights, optimizer.init(weights)), time.perf_counter()
    step_tokens = args.batch_size * args.seq_len
    with tqdm(total=args.steps * step_tokens, unit="tok", unit_scale=True, mininterval=5) as bar:
        for first in range(0, args.steps, args.steps_per_call):
            counts = jnp.arange(first, first + args.steps_per_call)
            state, losses = many_steps(tokens, state, counts)
            bar.set_postfix(loss=f"{losses.mean():.3f}", refresh=False)
            bar.update(len(counts) * step_tokens)
            done = first + args.steps_per_call
            if done % args.eval_every == 0:
                loss = evaluate(state[0], held_out, args, loss_fn)
                bar.write(f"step {done}: held-out loss {loss:.4f} nats a token")
    seconds = time.perf_counter() - start
    weights = jax.tree.map(lambda weight: weight.astype(jnp.bfloat16), state[0])
    rounded = jax.tree.map(lambda weight: weight.astype(jnp.float32), weights)
    return weights, evaluate(rounded, held_out, args, loss_fn), seconds


def complete(weights, tokenizer: Tokenizer, prompt: str, length: int, model: Model) -> str:
    """`length` sampled tokens (temperature 0.7, seed 0) after the prompt; simple and slow."""
    weights = jax.tree.map(lambda weight: weight.astype(jnp.float32), weights)
    predict = jax.jit(partial(forward, model=model))
    ids, rng = tokenizer.encode(prompt).ids, np.random.default_rng(0)
    start, window = len(ids), np.zeros((1, len(ids) + length), np.int32)
    for position in range(start, start + length):
        window[0, : len(ids)] = ids
        logits_V = np.asarray(predict(weights, window))[0, position - 1]
        ids.append(int(np.argmax(logits_V / 0.7 + rng.gumbel(size=VOCAB_SIZE))))
        if ids[-1] == tokenizer.token_to_id(SEPARATOR):
            break
    return tokenizer.decode(ids[start:])


# ---- export --------------------------------------------------------------------------------------

CPU_OPTIONS = "--steps 800 --batch-size 16 --seq-len 512 --learning-rate 0.004 --steps-per-call 10"


def export(weights, model: Model, args) -> None:
    """Write the Hugging Face folder."""
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(args.cache_dir / "tokenizer.json"))
    tokenizer.save(str(args.output / "tokenizer.json"))
    separator = tokenizer.token_to_id(SEPARATOR)
    ids = {"bos_token_id": separator, "eos_token_id": separator}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama",
              "vocab_size": VOCAB_SIZE, **asdict(model), **ids, "hidden_act": "silu",
              "max_position_embeddings": args.seq_len, "rope_theta": ROPE_THETA,
              "rms_norm_eps": NORM_EPS, "tie_word_embeddings": True, "attention_bias": False,
              "mlp_bias": False, "torch_dtype": "bfloat16"}  # fmt: skip
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SEPARATOR,
                        "eos_token": SEPARATOR, "model_max_length": args.seq_len,
                        "clean_up_tokenization_spaces": False}  # fmt: skip
    files = {"config": config, "tokenizer_config": tokenizer_config,
             "generation_config": {**ids, "do_sample": True, "temperature": 0.7}}  # fmt: skip
    for name, content in files.items():
        (args.output / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    path = args.output / "model.safetensors"
    arrays = {name: np.asarray(weight) for name, weight in weights.items()}
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes it private to its owner


def write_card(weights, model: Model, args, loss: float, seconds: float) -> None:
    """Fill in card.md: what was trained, how, on what, and how well."""
    tokenizer = Tokenizer.from_file(str(args.cache_dir / "tokenizer.json"))
    prompts = (HERE / "prompts.jsonl").read_text().splitlines()[: args.samples]
    prompts = [json.loads(line)["prompt"] for line in prompts]
    texts = [prompt + complete(weights, tokenizer, prompt, 96, model) for prompt in prompts]
    facts = json.loads((args.cache_dir / "facts.json").read_text())
    held_out, seen = facts["held_out"], args.steps * args.batch_size * args.seq_len
    run = f"python -m jaxinfer.demo.train --preset {args.preset}"
    options = ["steps", "batch_size", "seq_len", "learning_rate", "weight_decay", "warmup", "seed"]
    values = [f"--{name.replace('_', '-')} {getattr(args, name)}" for name in options]
    card = (HERE / "card.md").read_text().format(
        **asdict(model), **facts, vocab_size=VOCAB_SIZE, preset=args.preset, separator=SEPARATOR,
        parameters=sum(weight.size for weight in weights.values()), seq_len=args.seq_len,
        loss=loss, bits=loss / math.log(2) * held_out["tokens"] / held_out["bytes"],
        seen=seen, epochs=seen / facts["train"]["tokens"], minutes=seconds / 60,
        rate=seen / seconds, machine=jax.devices()[0].device_kind,
        versions=f"CPython {platform.python_version()}, JAX {jax.__version__}, "
                 f"optax {optax.__version__}",
        command=f"{run} {values[0]} \\\n    {' '.join(values[1:])}",
        cpu_command=f"{run} \\\n    {CPU_OPTIONS}",
        samples="\n\n".join(f"```python\n{text.rstrip()}\n```" for text in texts),
    )  # fmt: skip
    (args.output / "README.md").write_text(card)
    print(card)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, shipped = parser.add_argument, "(default: the shipped model's)"
    add("--preset", choices=PRESETS, default="main", help="which model")
    add("--steps", type=int, help=f"a multiple of --steps-per-call {shipped}")
    add("--batch-size", type=int, default=32, help="windows in a step")
    add("--seq-len", type=int, default=2048, help="tokens in a window, and the model's context")
    add("--learning-rate", type=float, help=f"peak of warm-up + cosine {shipped}")
    add("--warmup", type=int, default=200, help="steps of linear warm-up")
    add("--weight-decay", type=float, help=f"of AdamW, on matrices only {shipped}")
    add("--seed", type=int, default=0, help="of the initial weights and of the order of the data")
    add("--steps-per-call", type=int, default=50, help="steps compiled into one call")
    add("--eval-every", type=int, default=500, help="steps between held-out losses")
    add("--samples", type=int, default=2, help="completions in the model card")
    add("--cache-dir", type=Path, default=Path("build/demo"), help="tokenizer and tokens")
    add("--output", type=Path, help=f"the folder to write {shipped}")
    add("--prepare-only", action="store_true", help="write the cache and stop")
    args = parser.parse_args()
    for name, value in SHIPPED[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.steps % args.steps_per_call:
        parser.error("--steps must be a multiple of --steps-per-call")

    if not (args.cache_dir / "facts.json").exists():
        prepare(args.cache_dir)
    if args.prepare_only:
        return
    on_gpu = jax.default_backend() == "gpu"
    model = PRESETS[args.preset]
    weights, loss, seconds = train(model, args, on_gpu)
    export(weights, model, args)
    write_card(weights, model, args, loss, seconds)


if __name__ == "__main__":
    main()
