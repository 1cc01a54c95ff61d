"""Families with more mathematics than Llama's: what their config.json means.

The configurations are as published, without the keys that mean nothing for inference; the fact
sheets in configs/models say the same in our words.
"""

import dataclasses

import numpy as np
import pytest

from jaxinfer.config import ModelConfig, RopeScaling
from jaxinfer.configs import load_model_preset
from jaxinfer.errors import CheckpointError, ConfigError, UnsupportedModelError
from jaxinfer.layers import rope_attention_factor, rope_frequencies
from jaxinfer.models import model_config

GEMMA_2 = {
    "architectures": ["Gemma2ForCausalLM"], "attention_bias": False,
    "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid",
    "eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 128,
    "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 4608, "intermediate_size": 36864, "max_position_embeddings": 8192,
    "model_type": "gemma2", "num_attention_heads": 32, "num_hidden_layers": 46,
    "num_key_value_heads": 16, "query_pre_attn_scalar": 144, "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0, "sliding_window": 4096, "sliding_window_size": 4096,
    "torch_dtype": "bfloat16", "vocab_size": 256000,
}  # fmt: skip
GEMMA_3 = {
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False,
    "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid",
    "eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
    "max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4,
    "num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16", "vocab_size": 262144,
}  # fmt: skip
PHI_4_MINI = {
    "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "bos_token_id": 199999,
    "eos_token_id": 199999, "full_attn_mod": 1, "hidden_act": "silu", "hidden_size": 3072,
    "intermediate_size": 8192, "interpolate_factor": 1, "lm_head_bias": False,
    "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "phi3",
    "num_attention_heads": 24, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "long_factor": list(load_model_preset("phi-4-mini").config.rope_scaling.long_factor),
        "short_factor": [1.0] * 48, "type": "longrope",
    },
    "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "vocab_size": 200064,
}  # fmt: skip
SMOLLM_3 = {
    "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "bos_token_id": 128000,
    "eos_token_id": 128012, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 11008,
    "layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536,
    "max_window_layers": 28, "mlp_bias": False, "model_type": "smollm3",
    "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16,
    "num_hidden_layers": 36, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 5000000.0, "sliding_window": None, "torch_dtype": "bfloat16",
    "use_sliding_window": False, "vocab_size": 128256,
}  # fmt: skip
OLMO_2 = {
    "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "eos_token_id": 100257,
    "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008,
    "max_position_embeddings": 4096, "model_type": "olmo2", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False,
    "torch_dtype": "float32", "vocab_size": 100352,
}  # fmt: skip
OLMO_3 = {
    **OLMO_2, "architectures": ["Olmo3ForCausalLM"], "max_position_embeddings": 65536,
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8, "model_type": "olmo3",
    "rope_scaling": {
        "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0,
        "original_max_position_embeddings": 8192, "rope_type": "yarn",
    },
    "sliding_window": 4096, "torch_dtype": "bfloat16", "vocab_size": 100278,
}  # fmt: skip
GRANITE = {
    "architectures": ["GraniteForCausalLM"], "attention_bias": False,
    "attention_multiplier": 0.0078125, "bos_token_id": 0, "embedding_multiplier": 12.0,
    "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 12800,
    "logits_scaling": 16.0, "max_position_embeddings": 131072, "mlp_bias": False,
    "model_type": "granite", "num_attention_heads": 32, "num_hidden_layers": 40,
    "num_key_value_heads": 8, "residual_multiplier": 0.22, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 10000000.0, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "vocab_size": 49159,
}  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "published"),
    [
        ("gemma-2-27b", GEMMA_2), ("gemma-3-1b", GEMMA_3), ("phi-4-mini", PHI_4_MINI),
        ("smollm3-3b", SMOLLM_3), ("olmo-2-7b", OLMO_2), ("olmo-3-7b", OLMO_3),
        ("granite-3.3-8b", GRANITE),
    ],
)  # fmt: skip
def test_the_fact_sheets_say_what_was_published(preset, published):
    sheet = load_model_preset(preset).config
    # Further ends are in generation_config.json.
    config = model_config(published)
    assert set(config.eos_token_ids) <= set(sheet.eos_token_ids)
    assert dataclasses.replace(config, eos_token_ids=sheet.eos_token_ids) == sheet


def new_spelling(published, **sliding):
    """As transformers 5 writes it: an object of rotary parameters for each kind of layer."""
    config = {key: value for key, value in published.items() if not key.startswith("rope_")}
    full = {"rope_theta": published["rope_theta"], **(published["rope_scaling"] or {})}
    default = {"rope_type": "default", **sliding}
    config["rope_parameters"] = {
        "full_attention": default | full, "sliding_attention": default,
    }  # fmt: skip
    return config


@pytest.mark.parametrize(("published", "theta"), [(GEMMA_3, 10000.0), (OLMO_3, 500000.0)])
def test_two_ropes_in_the_new_spelling(published, theta):
    assert model_config(new_spelling(published, rope_theta=theta)) == model_config(published)
    other = model_config(new_spelling(published, rope_theta=77.0))
    assert (other.rope(0), other.rope_theta) == ((77.0, None), published["rope_theta"])
    absent = new_spelling(published)
    absent["rope_parameters"]["sliding_attention"] = None
    assert model_config(absent) == model_config(published)


def test_two_ropes_in_the_layers():
    scaling = {"rope_type": "linear", "factor": 8.0}
    config = model_config({**GEMMA_3, "rope_scaling": scaling})
    slow = (1e6, RopeScaling(kind="linear", factor=8.0))
    assert [config.rope(i) for i in (0, 4, 5, 25)] == [(1e4, None)] * 2 + [slow, (1e4, None)]
    assert [config.window(i) for i in (4, 5)] == [512, None]


def test_layers_that_do_not_rotate():
    config = model_config({**SMOLLM_3, "no_rope_layers": None, "no_rope_layer_interval": 5})
    assert config.no_rope_layers == (4, 9, 14, 19, 24, 29, 34)
    assert config.rope(4) is None
    assert config.rope(5) == (5e6, None)
    sliding = model_config(
        {**SMOLLM_3, "layer_types": None, "use_sliding_window": True, "sliding_window": 7}
    )
    assert [sliding.window(i) for i in (2, 3)] == [None, 7]


def test_soft_caps_may_be_off():
    off = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    config = model_config({**GEMMA_2, **off})
    assert (config.attention_soft_cap, config.logit_soft_cap) == (None, None)


def test_what_the_absence_of_keys_means():
    """As transformers has it."""
    known = (
        "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads",
    )  # fmt: skip

    def bare(published):
        return model_config({key: published[key] for key in known})

    gemma = bare(GEMMA_2)
    assert (gemma.attention_soft_cap, gemma.logit_soft_cap, gemma.head_dim) == (50.0, 30.0, 256)
    assert (gemma.sliding_window, gemma.num_kv_heads, gemma.attention_scale) == (4096, 4, 1 / 16)
    assert (gemma.activation, gemma.tie_word_embeddings) == ("gelu_tanh", True)
    gemma = bare(GEMMA_3)
    assert gemma.rope(0) == (1e4, None)
    assert gemma.rope(5) == (1e6, None)
    assert gemma.attention_soft_cap is None
    phi = bare(PHI_4_MINI)
    assert (phi.sliding_window, phi.rotary_dim, phi.num_kv_heads) == (None, None, 24)
    olmo = bare(OLMO_3)
    assert ((olmo.sliding_layers or ())[:4], olmo.rope_theta, olmo.rms_norm_eps) == (
        (0, 1, 2, 4),
        5e5,
        1e-5,
    )
    granite = bare(GRANITE)
    assert (granite.attention_scale, granite.embedding_scale, granite.logit_scale) == (
        1.0,
        1.0,
        1.0,
    )
    assert bare(SMOLLM_3).rope_theta == 2e6


def changed(published, **change):
    return {**published, **change}


LONG = PHI_4_MINI["rope_scaling"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed(GEMMA_2, hidden_activation="relu"), "hidden_activation = 'relu'"),
        (changed(GEMMA_2, use_bidirectional_attention=True), "use_bidirectional_attention"),
        (changed(GEMMA_3, attn_logit_softcapping=50.0), "attn_logit_softcapping"),
        (changed(PHI_4_MINI, rope_scaling={**LONG, "short_mscale": 1.1}), "short_mscale"),
        (changed(OLMO_3, rope_scaling={**OLMO_3["rope_scaling"], "mscale": 2.0}), "mscale"),
        (changed(OLMO_2, partial_rotary_factor=0.5), "partial_rotary_factor"),
        (changed(OLMO_2, clip_qkv=8.0), "clip_qkv"),
        (changed(GRANITE, architectures=["GraniteMoeForCausalLM"]), "GraniteMoeForCausalLM"),
        (
            changed(GEMMA_3, architectures=["Gemma3ForConditionalGeneration"]),
            "Gemma3ForConditionalGeneration",
        ),
        (
            new_spelling(GEMMA_3, rope_type="linear", factor=2.0),
            "rope_parameters: scaling in sliding_attention",
        ),
    ],
)
def test_mathematics_that_is_not_implemented_is_named(config, message):
    with pytest.raises(UnsupportedModelError, match=f"^config.json: .*{message}"):
        model_config(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed(GEMMA_2, query_pre_attn_scalar=0), "query_pre_attn_scalar must be a number above"),
        (changed(GRANITE, logits_scaling=0.0), "logits_scaling must be a number above 0"),
        (changed(GEMMA_3, sliding_window_pattern=0), "sliding_window_pattern must be a number"),
        (changed(GEMMA_2, final_logit_softcapping=-1.0), "logit_soft_cap must be above 0"),
        (changed(SMOLLM_3, no_rope_layers=[1, 0]), "no_rope_layers must list one entry for each"),
        (changed(PHI_4_MINI, partial_rotary_factor=0.7), "rotary_dim must be even and at most"),
        (changed(PHI_4_MINI, partial_rotary_factor=1.0), "short_factor must have 64 numbers above"),
        (
            changed(PHI_4_MINI, rope_scaling={**LONG, "long_factor": [0.0] * 48}),
            "long_factor must have 48 numbers above 0",
        ),
        (
            changed(PHI_4_MINI, rope_scaling={**LONG, "long_factor": ["1"] * 48}),
            "long_factor must be a tuple of numbers",
        ),
        (changed(PHI_4_MINI, rope_scaling={"type": "su"}), "rope_scaling: short_factor is missing"),
        (changed(PHI_4_MINI, original_max_position_embeddings=0), "original_max_position_emb"),
        (
            changed(GEMMA_3, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
            "rope_parameters must have an object for each of",
        ),
    ],
)
def test_values_that_make_no_sense_are_named(config, message):
    with pytest.raises(CheckpointError, match=f"^config.json: .*{message}"):
        model_config(config)


def test_long_rope_is_decided_once_by_the_longest_sequence():
    config = load_model_preset("phi-3-mini-128k").config
    assert config.for_length(4096).rope_scaling.use_long is False
    assert config.for_length(4097).rope_scaling.use_long is True
    plain = theta_frequencies(96, 1e4)
    for length, factors in ((4096, "short_factor"), (4097, "long_factor")):
        scaling = config.for_length(length).rope_scaling
        got = rope_frequencies(96, 1e4, scaling)
        np.testing.assert_allclose(got, plain / getattr(scaling, factors))
        # By both papers' formula: sqrt(1 + ln 32 / ln 4096) = 1.1902.
        assert rope_attention_factor(scaling) == pytest.approx(1.190238, abs=1e-6)
    other = load_model_preset("llama-3.1-8b").config
    assert other.for_length(100) is other


def theta_frequencies(width, theta):
    return np.array([theta ** (-2 * i / width) for i in range(width // 2)])


def test_yarn_keeps_quick_pairs_and_slows_the_others():
    scaling = load_model_preset("olmo-3-7b").config.rope_scaling
    plain = rope_frequencies(128, 5e5, None)
    np.testing.assert_allclose(plain, theta_frequencies(128, 5e5))
    ratio = rope_frequencies(128, 5e5, scaling) / plain
    turns = 8192 * plain / (2 * np.pi)
    assert (ratio[turns > 45] == 1).all()
    np.testing.assert_allclose(ratio[turns < 0.75], 1 / 8)
    assert (np.diff(ratio) <= 0).all()
    # 0.1 ln(factor) + 1, which the published file spells out.
    unsaid = dataclasses.replace(scaling, attention_factor=None)
    assert rope_attention_factor(unsaid) == pytest.approx(scaling.attention_factor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, "activation must be one of silu, gelu_tanh"),
        ({"rotary_dim": 6}, r"rotary_dim must be even and at most head_dim \(4\)"),
        ({"attention_soft_cap": 0.0}, "attention_soft_cap must be above 0"),
        ({"sliding_rope_theta": -1.0}, "sliding_rope_theta must be above 0"),
        ({"embedding_scale": float("nan")}, "embedding_scale must be a number"),
        ({"no_rope_layers": (0.5,)}, "no_rope_layers must be a tuple of whole numbers"),
    ],
)
def test_impossible_models(change, message):
    sizes = {
        "vocab_size": 16, "hidden_size": 8, "intermediate_size": 16, "num_layers": 2,
        "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "max_position_embeddings": 32,
    }  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**sizes | change)
