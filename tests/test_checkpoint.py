import json
import math
import shutil
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import Mesh, NamedSharding

from jaxinfer import checkpoint, configs, shardings
from jaxinfer.errors import CheckpointError, ConfigError, TokenizerError, UnsupportedModelError
from jaxinfer.models import decoder

MODELS = (
    "llama", "llama-bf16", "llama-bias", "llama-linear", "llama3", "mistral", "qwen2",
    "qwen2-window", "qwen3", "gemma3", "phi3", "phi3-partial", "olmo2",
)  # fmt: skip
FILE_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def tree_of(files, devices=1):
    """The parameters of a model and where they go on so many devices."""
    declared = decoder.parameters(files.config)
    mesh = shardings.mesh(devices)
    return declared, jax.tree.map(lambda p: shardings.named(mesh, p.letters), declared)


def load(files, dtype=jnp.float32, devices=1):
    return checkpoint.load(files, *tree_of(files, devices), dtype)


def tensors_of(folder):
    """All tensors of a folder, parsed from the bytes of its files."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, facts in json.loads(data[8:start]).items():
            if name != "__metadata__":
                low, high = facts["data_offsets"]
                values = np.frombuffer(
                    data[start + low : start + high], FILE_DTYPES[facts["dtype"]]
                )
                tensors[name] = values.reshape(facts["shape"])
    return tensors


def apart(tensors, config):
    """The tensors with the fused ones of Phi-3 cut into those that other models have."""
    queries, keys = (count * config.head_dim for count in (config.num_heads, config.num_kv_heads))
    cuts = {
        "qkv_proj": {"q_proj": queries, "k_proj": keys, "v_proj": keys},
        "gate_up_proj": {
            "gate_proj": config.intermediate_size,
            "up_proj": config.intermediate_size,
        },
    }
    for name in [name for name in tensors if "qkv_proj" in name or "gate_up_proj" in name]:
        fused, values = name.split(".")[-2], tensors.pop(name)
        for part, rows in cuts[fused].items():
            tensors[name.replace(fused, part)], values = values[:rows], values[rows:]
        assert not len(values)
    return tensors


def norms(tensors, base, config):
    """The norms of one layer: under which names depends on where they stand."""
    if not config.post_norm:
        names = {"attn_norm_D": "input", "mlp_norm_D": "post_attention"}
    else:
        names = {"attn_post_norm_D": "post_attention", "mlp_post_norm_D": "post_feedforward"}
        if config.pre_norm:
            names |= {"attn_norm_D": "input", "mlp_norm_D": "pre_feedforward"}
    return {ours: tensors[f"{base}{theirs}_layernorm.weight"] for ours, theirs in names.items()}


def expected(files):
    """The weight tree, head by head from the tensors."""
    config = files.config
    tensors = apart(tensors_of(files.path), config)
    width, group = config.head_dim, config.num_heads // config.num_kv_heads

    def heads(kind, prefix):
        values = tensors[prefix + kind]
        return [values[i : i + width].T for i in range(0, len(values), width)]

    def fused(prefix, kind):
        q, k, v = (heads(f"{x}_proj.{kind}", prefix) for x in "qkv")
        per_kv = [
            np.stack([*q[i * group : (i + 1) * group], k[i], v[i]], axis=-2)
            for i in range(config.num_kv_heads)
        ]
        return np.stack(per_kv, axis=-3)

    tree = {
        "embed_VD": tensors["model.embed_tokens.weight"],
        "final_norm_D": tensors["model.norm.weight"],
        "layers": [],
    }
    if not config.tie_word_embeddings:
        tree["head_VD"] = tensors["lm_head.weight"]
    for i in range(config.num_layers):
        base = f"model.layers.{i}."
        attention, mlp = base + "self_attn.", base + "mlp."
        out = tensors[attention + "o_proj.weight"].T
        layer = {
            **norms(tensors, base, config),
            "qkv_KUHD": fused(attention, "weight"),
            "out_DKGH": np.stack(
                [np.stack([out[(k * group + g) * width :][:width] for g in range(group)])
                 for k in range(config.num_kv_heads)]
            ),
            "gate_up_WFD": np.stack(
                [tensors[mlp + "gate_proj.weight"].T, tensors[mlp + "up_proj.weight"].T], 1
            ),
            "down_DF": tensors[mlp + "down_proj.weight"].T,
        }  # fmt: skip
        if config.qkv_bias:
            layer["qkv_bias_KUH"] = fused(attention, "bias")
        if config.out_bias:
            layer["out_bias_D"] = tensors[attention + "o_proj.bias"]
        if config.mlp_bias:
            layer["gate_up_bias_WF"] = np.stack(
                [tensors[mlp + "gate_proj.bias"], tensors[mlp + "up_proj.bias"]]
            )
            layer["down_bias_D"] = tensors[mlp + "down_proj.bias"]
        if config.qk_norm_across_heads:
            shape = (config.num_kv_heads, group, width)
            layer["q_norm_KGH"] = tensors[attention + "q_norm.weight"].reshape(shape)
            layer["k_norm_KH"] = tensors[attention + "k_norm.weight"].reshape(shape[::2])
        elif config.qk_norm:
            layer["q_norm_H"] = tensors[attention + "q_norm.weight"]
            layer["k_norm_H"] = tensors[attention + "k_norm.weight"]
        tree["layers"].append(layer)
    return tree


def assert_same(loaded, wanted, dtype):
    def same(path, got, want):
        want = want.astype(dtype)
        assert got.dtype == dtype, path
        np.testing.assert_array_equal(np.asarray(got), want, err_msg=str(path))

    jax.tree_util.tree_map_with_path(same, loaded, wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_of_a_checkpoint(fixtures, name, dtype):
    files = checkpoint.resolve(fixtures / name)
    assert_same(load(files, dtype), expected(files), jnp.dtype(dtype))


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_formats_in_the_file(copied, stored, dtype):
    folder = copied("qwen3")
    tensors = tensors_of(folder)
    kind = jnp.dtype(stored)
    safetensors.numpy.save_file(
        {name: values.astype(kind) for name, values in tensors.items()}, folder / checkpoint.SINGLE
    )
    files = checkpoint.resolve(folder)
    assert_same(load(files, dtype), expected(files), jnp.dtype(dtype))


@pytest.mark.parametrize(
    ("name", "devices"), [("qwen3", 2), ("llama3", 2), ("mistral", 2), ("phi3", 1), ("olmo2", 2)]
)
def test_chunks_of_any_size_give_the_same(fixtures, monkeypatch, name, devices):
    files = checkpoint.resolve(fixtures / name)
    wanted = expected(files)
    for size in (1, 333, 4096):
        monkeypatch.setattr(checkpoint, "CHUNK_BYTES", size)
        # 151 rows of embeddings do not divide: only the layers are split.
        declared, places = tree_of(files)
        split = tree_of(files, devices)[1]
        places["layers"] = split["layers"]
        loaded = checkpoint.load(files, declared, places, jnp.float32)
        assert_same(loaded, wanted, jnp.float32)


def wide_model(folder, **change):
    """A checkpoint whose every axis divides by 4, with its tensors."""
    config = {
        "architectures": ["Qwen3ForCausalLM"], "vocab_size": 32, "hidden_size": 24,
        "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 64,
        "tie_word_embeddings": False, "attention_bias": True, "dtype": "float32", "eos_token_id": 2,
        **change,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    files = checkpoint.resolve(folder)
    random = np.random.default_rng(0)
    tensors = {}
    for path, _ in jax.tree_util.tree_flatten_with_path(decoder.parameters(files.config))[0]:
        layer = next((key.idx for key in path if hasattr(key, "idx")), None)
        for part in files.family.parts(path[-1].key, layer, files.config.sizes):
            shape = (part.rows, *part.shape[1:])
            tensors[part.tensor] = random.normal(size=shape).astype(np.float32)
    safetensors.numpy.save_file(tensors, folder / checkpoint.SINGLE)
    return files


class CountingSlice:
    def __init__(self, tensor, counts):
        self.tensor, self.counts = tensor, counts

    def __getattr__(self, name):
        return getattr(self.tensor, name)

    def __getitem__(self, index):
        values = self.tensor[index]
        self.counts.append(values.nbytes)
        return values


def counted(monkeypatch):
    """Counts the bytes that are read from checkpoints from now on."""
    counts, real = [], checkpoint.safe_open

    class Opened:
        def __init__(self, *args, **kwargs):
            self.file = real(*args, **kwargs)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def keys(self):
            return self.file.keys()

        def get_slice(self, name):
            return CountingSlice(self.file.get_slice(name), counts)

    monkeypatch.setattr(checkpoint, "safe_open", Opened)
    return counts


needs_four = pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices")


@needs_four
@pytest.mark.parametrize("family", ["Qwen3", "Phi3"])
def test_each_device_reads_only_its_slice(tmp_path, monkeypatch, family):
    files = wide_model(tmp_path / "model", architectures=[f"{family}ForCausalLM"])
    counts = counted(monkeypatch)
    loaded = load(files, devices=4)
    assert_same(loaded, expected(files), jnp.float32)
    for leaf, place in zip(
        jax.tree.leaves(loaded), jax.tree.leaves(tree_of(files, 4)[1]), strict=True
    ):
        assert leaf.sharding == place
        assert len(leaf.sharding.device_set) == 4
    layer = loaded["layers"][0]
    assert layer["qkv_KUHD"].addressable_shards[0].data.shape == (24, 1, 4, 8)
    # Whatever is split is read once in parts, and what is whole everywhere once as well.
    stored = sum(values.nbytes for values in tensors_of(files.path).values())
    assert sum(counts) == stored


@needs_four
def test_a_process_reads_nothing_for_others(tmp_path, monkeypatch):
    """With one device's share of the split parameters, about a quarter of the file is read."""
    files = wide_model(tmp_path / "model")
    declared, places = tree_of(files, 4)
    monkeypatch.setattr(
        jax, "make_array_from_callback",
        lambda shape, sharding, callback, dtype: callback(
            next(iter(sharding.devices_indices_map(shape).values()))
        ),
    )  # fmt: skip
    counts = counted(monkeypatch)
    first = checkpoint.load(files, declared, places, jnp.float32)
    wanted = 0
    for leaf, whole, place in zip(
        jax.tree.leaves(first), jax.tree.leaves(declared), jax.tree.leaves(places), strict=True
    ):
        assert leaf.shape == place.shard_shape(whole.shape)
        wanted += leaf.nbytes
    assert sum(counts) == wanted


@needs_four
@pytest.mark.parametrize("family", ["Qwen3", "Phi3"])
@pytest.mark.parametrize("letter", ["D", "G", "H", "U", "W"])
def test_axes_that_are_merged_or_fused_can_be_split(tmp_path, letter, family):
    """No rule splits these today; the reading is right all the same."""
    files = wide_model(  # U = 6, G = 4
        tmp_path / "model", num_attention_heads=16, architectures=[f"{family}ForCausalLM"]
    )
    size = files.config.sizes[letter]
    mesh = Mesh(np.array(jax.devices()[: 2 if size % 4 else 4]), ("x",))
    declared = decoder.parameters(files.config)
    places = jax.tree.map(
        lambda p: NamedSharding(mesh, shardings.spec(p.letters, {letter: "x"})), declared
    )
    loaded = checkpoint.load(files, declared, places, jnp.float32)
    assert_same(loaded, expected(files), jnp.float32)


@needs_four
def test_replicas_share_one_reading(tmp_path, monkeypatch):
    files = wide_model(tmp_path / "model")
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))
    declared = decoder.parameters(files.config)
    rules = {"K": "tensor", "F": "tensor", "V": "tensor"}
    places = jax.tree.map(lambda p: NamedSharding(mesh, shardings.spec(p.letters, rules)), declared)
    counts = counted(monkeypatch)
    assert_same(checkpoint.load(files, declared, places, jnp.float32), expected(files), np.float32)
    assert sum(counts) == sum(values.nbytes for values in tensors_of(files.path).values())


def test_on_cpu_the_array_is_what_was_read_into(fixtures, monkeypatch):
    addresses, real = set(), checkpoint.aligned

    def remember(shape, dtype):
        out = real(shape, dtype)
        addresses.add(out.ctypes.data)
        return out

    monkeypatch.setattr(checkpoint, "aligned", remember)
    loaded = load(checkpoint.resolve(fixtures / "llama"))
    assert {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(loaded)} == addresses


def test_progress_is_shown_for_big_models_only(fixtures, monkeypatch, capsys):
    files = checkpoint.resolve(fixtures / "llama")
    load(files)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(checkpoint, "PROGRESS_BYTES", 0)
    load(files)
    assert "weights: 100%" in capsys.readouterr().err


# -- what is found ------------------------------------------------------------------------------


@pytest.fixture
def copied(fixtures, tmp_path):
    """Copies a fixture to where a test may harm it."""

    def copy(name):
        folder = tmp_path / name
        shutil.copytree(fixtures / name, folder)
        return folder

    return copy


def edit(file, **change):
    """Change keys of a JSON file; None removes one."""
    values = json.loads(file.read_text()) | change
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def test_ends_of_both_files_are_merged(fixtures, copied):
    files = checkpoint.resolve(fixtures / "llama3")
    assert files.config.eos_token_ids == (2, 3)
    assert files.generation_config["temperature"] == 0.6
    assert files.tokenizer_folder() == fixtures / "llama3"
    folder = copied("llama3")
    (folder / "generation_config.json").unlink()
    files = checkpoint.resolve(str(folder))
    assert files.config.eos_token_ids == (2,)
    assert files.generation_config == {}


def test_presets(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for name in ("llama-3.1-8b", "Llama-3.1-8B", "meta-llama/Llama-3.1-8B"):
        files = checkpoint.resolve(name, "dummy")
        assert files.config == configs.load_model_preset("llama-3.1-8b").config
        assert files.path is None
        assert files.family.architectures == ("LlamaForCausalLM",)
    with pytest.raises(TokenizerError, match="skip_tokenizer_init"):
        files.tokenizer_folder()
    with pytest.raises(CheckpointError, match="load_format='dummy'"):
        checkpoint.load(files, {}, {}, jnp.float32)
    with pytest.raises(ConfigError, match=r"load_format='dummy'.*'meta-llama/Llama-3.1-8B'"):
        checkpoint.resolve("llama-3.1-8b")
    with pytest.raises(ConfigError, match=r"no folder.*close to it: llama-3.1-8b"):
        checkpoint.resolve("llama-3.1-9b", "dummy")


def test_a_folder_comes_before_a_preset(fixtures, tmp_path, monkeypatch):
    shutil.copytree(fixtures / "llama", tmp_path / "llama-3.1-8b")
    monkeypatch.chdir(tmp_path)
    assert checkpoint.resolve("llama-3.1-8b", "dummy").config.vocab_size == 131


def test_the_demo_is_in_the_package():
    assert Path(checkpoint.__file__).parent / "demo" / "model" == checkpoint.DEMO
    if checkpoint.DEMO.is_dir():
        assert checkpoint.resolve("demo").path == checkpoint.DEMO


def in_hub_cache(folder, home):
    """Lay a model out as a download of org/name leaves it."""
    repository = home / "hub" / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc123\n")
    snapshot = repository / "snapshots" / "abc123"
    shutil.copytree(folder, snapshot)
    return snapshot


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """An empty hub cache, and no library that could fill it."""
    for name in ("HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    return tmp_path / "home"


def test_hub_ids_are_found_in_the_cache(fixtures, no_hub):
    with pytest.raises(CheckpointError, match=r"no folder 'org/name'.*extra \"hub\""):
        checkpoint.resolve("org/name")
    snapshot = in_hub_cache(fixtures / "mistral", no_hub)
    assert checkpoint.resolve("org/name").path == snapshot
    (snapshot / "model-00003-of-00003.safetensors").unlink()
    assert checkpoint.resolve("org/name", "dummy").path == snapshot  # needs no weights
    with pytest.raises(CheckpointError, match="no complete download"):
        checkpoint.resolve("org/name")


def test_hub_ids_are_downloaded_where_the_library_is(fixtures, no_hub, monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name == "org/private":
            raise OSError("401 Unauthorized")
        return str(fixtures / "llama")

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert checkpoint.resolve("org/name").path == fixtures / "llama"
    checkpoint.resolve("org/name", "dummy")
    assert asked == [
        ("org/name", ["*.json", "*.jinja", "model*.safetensors"]),
        ("org/name", ["*.json", "*.jinja"]),
    ]
    with pytest.raises(CheckpointError, match=r"'org/private'.*hub does not give it: 401"):
        checkpoint.resolve("org/private")


# -- what is wrong ------------------------------------------------------------------------------


def test_folders_that_are_no_models(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no folder .*nowhere"):
        checkpoint.resolve(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"there is no folder .*nowhere"):
        checkpoint.resolve(str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match=r"neither config\.json"):
        checkpoint.resolve(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file; name the folder"):
        checkpoint.resolve(tmp_path / "file")


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "\x00"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_broken_json(copied, name, text):
    folder = copied("llama")
    (folder / name).write_text(text)
    with pytest.raises(CheckpointError, match=f"/{name} (cannot be read as JSON|must hold)"):
        checkpoint.resolve(folder)


def test_json_that_is_no_text(copied):
    folder = copied("llama")
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        checkpoint.resolve(folder)


def test_models_that_are_not_supported(copied):
    folder = copied("llama")
    edit(folder / "config.json", architectures=["MambaForCausalLM"])
    with pytest.raises(UnsupportedModelError, match=r"config\.json: .*Mamba.*LlamaForCausalLM"):
        checkpoint.resolve(folder)


def test_quantized_checkpoints(copied):
    folder = copied("llama")
    tensors = tensors_of(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(np.int8)
    safetensors.numpy.save_file(tensors, folder / checkpoint.SINGLE)
    with pytest.raises(UnsupportedModelError, match=r"up_proj.weight is I8.*quantized"):
        load(checkpoint.resolve(folder))
    edit(folder / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(UnsupportedModelError, match=r"quantization_config.*gptq"):
        checkpoint.resolve(folder)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ("pytorch_model.bin", r"but pytorch_model\.bin: convert the model to safetensors"),
        ("model-00001-of-00002.safetensors", "but model-00001-of-00002.safetensors: download"),
        ("notes.txt", "has neither model.safetensors nor .*index.json: download the model"),
    ],
)
def test_no_safetensors(copied, found, message):
    folder = copied("llama")
    (folder / checkpoint.SINGLE).rename(folder / found)
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint.resolve(folder))


def test_a_shard_is_missing(copied):
    folder = copied("mistral")
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003.safetensors is missing"):
        load(checkpoint.resolve(folder))


@pytest.mark.parametrize("names", [None, [], {"a": 1}, {"a": "../model.safetensors"}])
def test_an_index_that_makes_no_sense(copied, names):
    folder = copied("mistral")
    edit(folder / checkpoint.INDEX, weight_map=names)
    with pytest.raises(CheckpointError, match=r"index\.json: weight_map must map"):
        load(checkpoint.resolve(folder))


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize(
    "harm",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[:100],
        lambda data: data[:5],
        lambda data: b"",
        lambda data: data[:8] + b"#" + data[9:],
        lambda data: (2**40).to_bytes(8, "little") + data[8:],
        lambda data: bytes(len(data)),
    ],
    ids=["half", "last byte", "in header", "in size", "empty", "no JSON", "huge header", "zeros"],
)
def test_truncated_and_corrupt_files(copied, name, harm):
    folder = copied(name)
    file = max(folder.glob("*.safetensors"))
    file.write_bytes(harm(file.read_bytes()))
    with pytest.raises(CheckpointError, match=f"{file.name} is truncated or corrupt .*download"):
        load(checkpoint.resolve(folder))


def rewrite(folder, change):
    tensors = tensors_of(folder)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / checkpoint.SINGLE)
    return checkpoint.resolve(folder)


def test_missing_tensors(copied):
    files = rewrite(copied("llama"), lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"))
    with pytest.raises(CheckpointError, match=r"1 tensors are missing.*layers.1.self_attn.k_proj"):
        load(files)


def test_nothing_is_read_of_an_unsound_checkpoint(copied, monkeypatch):
    files = rewrite(copied("llama"), lambda t: t.pop("model.norm.weight"))
    counts = counted(monkeypatch)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        load(files)
    assert counts == []


def test_wrong_shapes(copied):
    folder = copied("qwen3")
    edit(folder / "config.json", intermediate_size=30)
    message = r"model\.safetensors: .*down_proj\.weight .*\[20, 28\].*must be \[20, 30\]"
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint.resolve(folder))


def test_tensors_that_are_left_over(copied):
    folder = copied("llama3")  # tied
    table = np.zeros(10, np.float32)

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = table
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    assert load(rewrite(folder, add))  # harmless
    files = rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": table}))
    with pytest.raises(CheckpointError, match=r"1 tensors are not part.*self_attn.q_proj.bias"):
        load(files)
    files = rewrite(copied("llama"), lambda t: t.update({f"x.{i}": table for i in range(9)}))
    with pytest.raises(CheckpointError, match=r"9 tensors.*: x.0, x.1, x.2, x.3, x.4, …"):
        load(files)


# -- random weights -----------------------------------------------------------------------------


def test_random_weights_are_as_declared(fixtures):
    files = checkpoint.resolve(fixtures / "llama-bias", "dummy")
    declared, places = tree_of(files)
    weights = checkpoint.random_weights(declared, places, jnp.bfloat16, seed=3)
    for parameter, weight in zip(jax.tree.leaves(declared), jax.tree.leaves(weights), strict=True):
        assert (weight.shape, weight.dtype) == (parameter.shape, jnp.bfloat16)
        values = np.asarray(weight, np.float32)
        if parameter.init == "normal":
            assert abs(values.mean()) < 0.004
            assert 0.018 < values.std() < 0.022
            assert len(np.unique(values)) > math.sqrt(values.size)
        else:
            assert (values == {"ones": 1, "zeros": 0}[parameter.init]).all()
    first, second = weights["layers"]
    assert not np.array_equal(first["qkv_KUHD"], second["qkv_KUHD"])


@needs_four
def test_random_weights_depend_on_the_seed_alone(tmp_path):
    files = wide_model(tmp_path / "model")
    declared, places = tree_of(files)
    one = checkpoint.random_weights(declared, places, jnp.float32, seed=2**40 + 7)
    split = tree_of(files, 4)[1]
    four = checkpoint.random_weights(declared, split, jnp.float32, seed=2**40 + 7)
    other = checkpoint.random_weights(declared, places, jnp.float32, seed=8)
    for parameter, a, b, c, place in zip(
        *map(jax.tree.leaves, (declared, one, four, other, split)), strict=True
    ):
        assert b.sharding == place
        np.testing.assert_array_equal(a, b)
        assert (parameter.init != "normal") == np.array_equal(a, c)
    half = checkpoint.random_weights(declared, places, jnp.bfloat16, seed=2**40 + 7)
    np.testing.assert_array_equal(half["embed_VD"], one["embed_VD"].astype(jnp.bfloat16))


@needs_four
def test_alike_parameters_share_a_program(tmp_path):
    files = wide_model(tmp_path / "model", num_hidden_layers=6)
    declared, places = tree_of(files, 4)
    compiled = []

    def listen(event, *_, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        checkpoint.random_weights(declared, places, jnp.float32, seed=0)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    leaves = zip(jax.tree.leaves(declared), jax.tree.leaves(places), strict=True)
    assert len(compiled) == len({(p.shape, p.init, s.spec) for p, s in leaves})
