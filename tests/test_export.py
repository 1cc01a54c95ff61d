"""What is written is what was read: tensors and configurations of every family."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors import safe_open

from jaxinfer import checkpoint, export
from jaxinfer.config import EngineConfig
from jaxinfer.configs import model_presets
from jaxinfer.errors import UnsupportedModelError
from jaxinfer.loading import load
from jaxinfer.models import model_config

# The fixtures that differ in how their tensors are named, fused or tied.
FOLDERS = ("llama", "llama3", "llama-bias", "mistral", "gemma2", "phi3", "olmo2", "qwen3")


@pytest.mark.parametrize("folder", FOLDERS)
def test_tensors_are_those_of_the_checkpoint(fixtures, folder):
    files = checkpoint.resolve(fixtures / folder)
    weights = load(fixtures / folder, EngineConfig(skip_tokenizer_init=True)).weights
    found = export.tensors(weights, files)
    for shard in (fixtures / folder).glob("*.safetensors"):
        with safe_open(shard, framework="np") as stored:
            names = stored.keys()
            for name in names:
                np.testing.assert_array_equal(found.pop(name), stored.get_tensor(name))
    assert found == {}, "and nothing else"


def test_a_folders_configuration_is_its_own(fixtures):
    files = checkpoint.resolve(fixtures / "phi3-long")
    stored = json.loads((fixtures / "phi3-long" / "config.json").read_text())
    assert export.config_json(files) == stored


def test_presets_are_written_so_that_they_read_the_same_or_refused():
    refused = {}
    for name in model_presets():
        files = checkpoint.resolve(name, "dummy")
        try:
            written = export.config_json(files)
        except UnsupportedModelError as error:
            refused[name] = str(error)
            continue
        json.dumps(written)
        assert model_config(written) == files.config
    # Not so where no single key tells a fact: factors that follow from sizes, ropes of two kinds.
    plain = ("llama", "mistral", "qwen", "smollm2", "olmo-2", "gemma-2-2b", "phi-3")
    assert [name for name in refused if name.startswith(plain)] == []
    assert all("cannot be written as config.json" in message for message in refused.values())


def test_a_saved_model_has_lost_the_names(fixtures):
    files = dataclasses.replace(checkpoint.resolve(fixtures / "llama"), family=None)
    for spell in (export.config_json, lambda files: export.tensors({}, files)):
        with pytest.raises(UnsupportedModelError, match="use the folder or preset that it was"):
            spell(files)
