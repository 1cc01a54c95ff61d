"""Options: unknown ones and bad values are refused with the field's name."""

import dataclasses

import pytest

from jaxinfer.config import EngineConfig, ModelConfig, RopeScaling
from jaxinfer.errors import ConfigError

SMALL = {
    "vocab_size": 16, "hidden_size": 8, "intermediate_size": 16, "num_layers": 2, "num_heads": 4,
    "num_kv_heads": 2, "head_dim": 4, "max_position_embeddings": 32,
}  # fmt: skip


def test_sizes_by_letter():
    config = ModelConfig(**SMALL)
    assert config.sizes == {
        "L": 2, "D": 8, "F": 16, "V": 16, "N": 4, "K": 2, "G": 2, "H": 4, "U": 4, "W": 2
    }  # fmt: skip


def test_windows_by_layer():
    assert ModelConfig(**SMALL, sliding_window=5).window(0) == 5
    some = ModelConfig(**SMALL, sliding_window=5, sliding_layers=(1,))
    assert (some.window(0), some.window(1)) == (None, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, r"num_heads \(3\) must be a multiple of num_kv_heads \(2\)"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"hidden_size": 0}, "hidden_size must be a whole number above 0"),
        ({"sliding_window": -1}, "sliding_window"),
        ({"dtype": "int8"}, "dtype must be one of"),
    ],
)
def test_impossible_models(change, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**{**SMALL, **change})


def test_rope_scaling_is_checked():
    with pytest.raises(ConfigError, match="kind must be one of"):
        RopeScaling(kind="dynamic", factor=2.0)
    with pytest.raises(ConfigError, match="factor must be at least 1"):
        RopeScaling(kind="linear", factor=0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_batchsize": 3}, "no field 'max_batchsize'; did you mean 'max_batch_size'"),
        ({"max_batch_size": 0}, "max_batch_size must be a whole number above 0, got 0"),
        ({"max_seq_len": "long"}, "max_seq_len"),
        ({"free_memory_fraction": 1.5}, "free_memory_fraction must be above 0 and at most 1"),
        ({"scheduling_policy": "fifo"}, "guaranteed_no_evict, max_utilization"),
        ({"dtype": "fp64"}, "dtype must be one of auto"),
        ({"load_format": "gguf"}, "load_format must be one of auto, dummy"),
        ({"num_pages": 1}, "num_pages must be at least 2"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"overlap": "no"}, "overlap must be true or false"),
        ({"free_memory_fraction": "all"}, "free_memory_fraction must be a number"),
        ({"devices": []}, r"devices must be a list of jax devices, got \[\]"),
        ({"devices": 2}, "devices must be a list of jax devices, got 2"),
    ],
)
def test_engine_options(fields, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig.from_dict(fields)


def test_every_option_is_documented():
    for cls in (EngineConfig,):
        for field in dataclasses.fields(cls):
            assert f"{field.name}:" in (cls.__doc__ or ""), field.name
