import subprocess
import sys
from pathlib import Path

import pytest

from jaxinfer.config import ModelConfig, RopeScaling
from jaxinfer.errors import CheckpointError, UnsupportedModelError
from jaxinfer.models import FAMILIES, decoder, family_of, model_config

# As published, without the keys that mean nothing for inference.
LLAMA_2 = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "tie_word_embeddings": False, "torch_dtype": "float16", "use_cache": True,
    "vocab_size": 32000,
}  # fmt: skip
LLAMA_3_2 = {
    **LLAMA_2, "attention_bias": False, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_size": 2048,
    "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
    "num_hidden_layers": 16, "num_key_value_heads": 8, "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "vocab_size": 128256,
}  # fmt: skip
MISTRAL = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
QWEN_2 = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2",
    "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_mrope": False,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN_3 = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "bos_token_id": 151643,
    "dtype": "bfloat16", "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 1024, "intermediate_size": 3072, "layer_types": ["full_attention"] * 28,
    "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06, "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip


def test_llama_2_in_the_old_spelling():
    assert model_config(LLAMA_2) == ModelConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32,
        num_kv_heads=32, head_dim=128, max_position_embeddings=4096, rms_norm_eps=1e-5,
        rope_theta=10000.0, bos_token_id=1, eos_token_ids=(2,), dtype="float16",
    )  # fmt: skip


def test_llama_3_scales_its_frequencies_and_has_several_ends():
    assert model_config(LLAMA_3_2) == ModelConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_layers=16, num_heads=32,
        num_kv_heads=8, head_dim=64, max_position_embeddings=131072, rms_norm_eps=1e-5,
        rope_theta=500000.0, tie_word_embeddings=True, bos_token_id=128000,
        eos_token_ids=(128001, 128008, 128009),
        rope_scaling=RopeScaling(
            kind="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    )  # fmt: skip


def test_mistral_slides_in_all_layers_unless_null():
    config = model_config(MISTRAL)
    assert [config.window(layer) for layer in (0, 31)] == [4096, 4096]
    assert model_config({**MISTRAL, "sliding_window": None}).window(0) is None
    absent = {key: value for key, value in MISTRAL.items() if key != "sliding_window"}
    assert model_config(absent).window(0) == 4096  # as transformers has it


def test_qwen_2_has_biases_on_queries_keys_and_values_only():
    config = model_config(QWEN_2)
    assert (config.qkv_bias, config.out_bias, config.mlp_bias) == (True, False, False)
    assert (config.head_dim, config.num_kv_heads, config.sliding_window) == (64, 2, None)


@pytest.mark.parametrize("original", [QWEN_2, QWEN_3])
def test_qwen_windows(original):
    layers = original["num_hidden_layers"]
    sliding = {**original, "use_sliding_window": True, "sliding_window": 64, "layer_types": None}
    config = model_config({**sliding, "max_window_layers": 3})
    assert [config.window(layer) for layer in (0, 2, 3, layers - 1)] == [None, None, 64, 64]
    assert model_config({**sliding, "max_window_layers": layers}).sliding_window is None
    kinds = ["full_attention"] * layers
    kinds[1] = kinds[5] = "sliding_attention"
    # The list says more than max_window_layers, and wins.
    config = model_config({**sliding, "max_window_layers": 3, "layer_types": kinds})
    assert config.sliding_layers == (1, 5)
    assert model_config({**sliding, "use_sliding_window": False}).sliding_window is None


def test_qwen_3_in_the_new_spelling():
    assert model_config(QWEN_3) == ModelConfig(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_layers=28, num_heads=16,
        num_kv_heads=8, head_dim=128, max_position_embeddings=40960, rms_norm_eps=1e-6,
        rope_theta=1000000.0, tie_word_embeddings=True, qk_norm=True, bos_token_id=151643,
        eos_token_ids=(151645,),
    )  # fmt: skip
    biased = model_config({**QWEN_3, "attention_bias": True})
    assert (biased.qkv_bias, biased.out_bias) == (True, True)


@pytest.mark.parametrize("original", [LLAMA_2, LLAMA_3_2, MISTRAL, QWEN_2])
def test_both_spellings_mean_the_same(original):
    new = dict(original)
    scaling = new.pop("rope_scaling", None) or {"rope_type": "default"}
    new["rope_parameters"] = {**scaling, "rope_theta": new.pop("rope_theta", 10000.0)}
    new["dtype"] = new.pop("torch_dtype")
    assert model_config(new) == model_config(original)


def test_old_names_within_the_old_spelling():
    linear = {**LLAMA_2, "rope_scaling": {"type": "linear", "factor": 4.0}}
    assert model_config(linear).rope_scaling == RopeScaling(kind="linear", factor=4.0)


def test_what_the_absence_of_keys_means():
    needed = (
        "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads",
    )  # fmt: skip
    config = model_config({key: LLAMA_2[key] for key in needed})
    assert (config.num_kv_heads, config.head_dim, config.max_position_embeddings) == (32, 128, 2048)
    assert (config.rms_norm_eps, config.rope_theta) == (1e-6, 10000.0)
    assert (config.tie_word_embeddings, config.qkv_bias, config.eos_token_ids) == (False, False, ())
    assert config.dtype == "float32"
    nulls = model_config({**LLAMA_2, "head_dim": None, "num_key_value_heads": None})
    assert nulls == model_config(LLAMA_2)


def test_biases_of_llama():
    config = model_config({**LLAMA_2, "attention_bias": True, "mlp_bias": True})
    assert (config.qkv_bias, config.out_bias, config.mlp_bias) == (True, True, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "GPT2LMHeadModel.*not supported.*Qwen3ForCausalLM",
        ),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config.*awq"),
        ({"rope_scaling": {"rope_type": "yarn", "mscale": 0.7}}, "rope_scaling: mscale.*'yarn'"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
            "'dynamic'.*default, linear, llama3, yarn, longrope",
        ),
        ({"rope_parameters": {"rope_type": "longrope", "short_mscale": 1}}, "short_mscale"),
        ({"rope_scaling": {"type": "default", "mrope_section": [8, 8]}}, "mrope_section"),
        ({"rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 0.5}}, "partial_rotary"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "full_attention"),
        ({"layer_types": ["chunked_attention"] * 32}, "layer_types: 'chunked_attention'"),
    ],
)
def test_mathematics_that_is_not_implemented_is_named(change, message):
    with pytest.raises(UnsupportedModelError, match=f"^some/config.json: .*{message}"):
        model_config({**LLAMA_2, **change}, "some/config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": None}, "architectures must name"),
        ({"architectures": []}, "architectures must name"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"vocab_size": "32000"}, "vocab_size must be a whole number, got '32000'"),
        ({"num_attention_heads": 0}, "num_heads"),
        ({"num_key_value_heads": 5}, "multiple of num_kv_heads"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a number, got '1e-5'"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
        ({"rope_theta": float("inf")}, "rope_theta must be a number"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id"),
        ({"torch_dtype": "int8"}, "dtype must be one of"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": 4.0}, "rope_scaling must be an object"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "factor must be a number"),
        ({"layer_types": ["full_attention"]}, "one entry for each layer"),
    ],
)
def test_values_that_make_no_sense_are_named(change, message):
    with pytest.raises(CheckpointError, match=f"^config.json: .*{message}"):
        model_config({**LLAMA_2, **change})


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.architectures[0])
def test_every_parameter_has_sources_of_its_axes(family):
    """All parameters that some config can declare have sources whose axes add up to theirs."""
    assert family_of(family.architectures[0]) is family
    may_have = {
        "qkv_bias": "qkv_bias_KUH", "out_bias": "out_bias_D", "mlp_bias": "down_bias_D",
        "qk_norm": "q_norm_H",
    }  # fmt: skip
    features = {feature: name in family.weights for feature, name in may_have.items()}
    config = ModelConfig(
        vocab_size=7, hidden_size=10, intermediate_size=11, num_layers=1, num_heads=6,
        num_kv_heads=2, head_dim=4, max_position_embeddings=8, **features | family.facts,
    )  # fmt: skip
    tree = decoder.parameters(config)
    declared = {**tree, **tree["layers"][0]}
    declared.pop("layers")
    assert declared.keys() == family.weights.keys()
    for name, parameter in declared.items():
        parts = family.parts(name, 0, config.sizes)
        for part in parts:
            theirs = set("".join(part.groups)) - {part.extra}
            assert theirs == set(parameter.letters) - {part.stacked}
        if parts[0].stacked:
            assert parts[-1].stop == config.sizes[parts[0].stacked]
        assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]


def test_families_load_without_jax():
    script = "import sys, jaxinfer.models; sys.exit('jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0
