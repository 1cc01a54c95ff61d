import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxinfer import configs
from jaxinfer.config import RopeScaling
from jaxinfer.errors import ConfigError
from jaxinfer.models import decoder, family_of

# As published: what the safetensors files hold, without the copy of a tied head that some have.
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "llama-2-7b": 6_738_415_616,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.3-70b": 70_553_706_496,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-32b": 32_763_876_352,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "phi-3-mini-4k": 3_821_079_552,
    "phi-3-mini-128k": 3_821_079_552,
    "phi-4-mini": 3_836_021_760,
    "phi-4": 14_659_507_200,
    "smollm3-3b": 3_075_098_624,
    "olmo-2-7b": 7_298_617_344,
    "olmo-2-13b": 13_716_198_400,
    "olmo-3-7b": 7_298_011_136,
    "olmo-3-32b": 32_233_522_176,
    "granite-3.3-2b": 2_533_539_840,
    "granite-3.3-8b": 8_170_864_640,
}
GOOD = (configs.MODELS / "qwen2.5-0.5b.yaml").read_text()


def test_there_are_sheets_of_the_published_models():
    assert configs.model_presets() == sorted(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_declared_parameters_add_up(name):
    preset = configs.load_model_preset(name)
    declared = jax.tree.leaves(decoder.parameters(preset.config))
    assert sum(math.prod(parameter.shape) for parameter in declared) == preset.num_parameters
    assert preset.num_parameters == PUBLISHED[name]
    assert preset.name == name


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_facts_fit_the_family(name):
    preset = configs.load_model_preset(name)
    facts = family_of(preset.architecture).facts
    assert {key: getattr(preset.config, key) for key in facts} == facts
    ids = (preset.config.bos_token_id, *preset.config.eos_token_ids)
    assert all(0 <= token < preset.config.vocab_size for token in ids if token is not None)
    assert preset.config.eos_token_ids
    assert re.fullmatch(r"[\w-]+/[\w.-]+", preset.source)


def test_one_sheet_in_full():
    config = configs.load_model_preset("llama-3.1-8b").config
    assert config.rope_scaling == RopeScaling(
        kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )  # fmt: skip
    assert (config.hidden_size, config.num_layers, config.num_kv_heads) == (4096, 32, 8)
    assert (config.rms_norm_eps, config.rope_theta, config.dtype) == (1e-5, 500000.0, "bfloat16")
    assert config.eos_token_ids == (128001,)
    assert configs.load_model_preset("mistral-7b-v0.1").config.window(31) == 4096
    assert configs.load_model_preset("mistral-7b-v0.3").config.window(31) is None


@pytest.mark.parametrize(
    "name", ["Llama-3.1-8B", "llama-3.1-8b", "meta-llama/Llama-3.1-8B", "META-LLAMA/llama-3.1-8b"]
)
def test_names_in_any_case_and_hub_ids(name):
    assert configs.find_model_preset(name) == "llama-3.1-8b"
    assert configs.load_model_preset(name).source == "meta-llama/Llama-3.1-8B"


def test_a_hub_id_that_is_not_named_like_the_preset():
    name = "meta-llama/Llama-3.3-70B-Instruct"
    assert configs.load_model_preset(name).name == "llama-3.3-70b"


def test_unknown_names_list_what_is_close():
    with pytest.raises(ConfigError, match=r"'llama-3\.1-9b'; close to it: llama-3\.1-8b"):
        configs.load_model_preset("llama-3.1-9b")
    with pytest.raises(ConfigError, match="'zzz'; there are: gemma-2-27b, "):
        configs.load_model_preset("zzz")
    assert configs.find_model_preset("someone/llama-3.1-8b") is None
    assert configs.find_model_preset("../models/llama-2-7b") is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_layers:", "num_layer:", "no field 'num_layer'; did you mean 'num_layers'"),
        ("source:", "sources:", "no field 'sources'"),
        ("vocab_size: 151936\n", "", "vocab_size is missing"),
        ("rope_theta: 1000000.0\n", "", "rope_theta is missing"),
        ("num_parameters: 494_032_768\n", "", "num_parameters is missing"),
        ("494_032_768", "4.9e+8", "num_parameters must be a whole number"),
        ("Qwen/Qwen2.5-0.5B", "[]", "source must be a hub id"),
        ("hidden_size: 896", "hidden_size: many", "hidden_size must be a whole number"),
        ("rms_norm_eps: 1.0e-06", "rms_norm_eps: 1e-06", "rms_norm_eps must be a number"),
        ("qkv_bias: true", "qkv_bias: 1", "qkv_bias must be true or false"),
        ("eos_token_ids: [151643]", "eos_token_ids: 151643", "eos_token_ids must be a tuple"),
        ("dtype: bfloat16", "dtype: int3", "dtype must be one of"),
        ("dtype: bfloat16", "dtype: bfloat16\ndtype: float16", "dtype stands twice"),
        ("dtype: bfloat16", "rope_scaling: 4\ndtype: bfloat16", "rope_scaling must be a mapping"),
        ("dtype: bfloat16", "rope_scaling: {kind: linear}\ndtype: bfloat16", "factor is missing"),
        ("dtype: bfloat16", "rope_scaling: {fctor: 2}\ndtype: bfloat16", "no field 'fctor'"),
        ("dtype: bfloat16", "dtype: [bfloat16", "cannot be read"),
    ],
)
def test_unsound_sheets_raise_with_file_and_field(tmp_path, monkeypatch, old, new, message):
    assert GOOD.count(old) == 1
    (tmp_path / "mine.yaml").write_text(GOOD.replace(old, new))
    monkeypatch.setattr(configs, "MODELS", tmp_path)
    with pytest.raises(ConfigError, match=f"(?s)mine.yaml.*{message}"):
        configs.load_model_preset("mine")


@pytest.mark.parametrize("text", ["", "- 1\n", "\x00"])
def test_files_that_are_no_mapping(tmp_path, monkeypatch, text):
    (tmp_path / "mine.yaml").write_text(text)
    monkeypatch.setattr(configs, "MODELS", tmp_path)
    with pytest.raises(ConfigError, match=r"mine\.yaml"):
        configs.load_model_preset("mine")


def test_the_loader_needs_no_jax():
    script = (
        "import sys; from jaxinfer import configs; configs.load_model_preset('qwen3-8b'); "
        "sys.exit('jax' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0
