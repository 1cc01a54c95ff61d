"""Saved models: what comes back, on which devices, and what interruption or damage does."""

import asyncio
import dataclasses
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore

from jaxinfer import LLM, SamplingParams, checkpoint, saving, shardings
from jaxinfer.__main__ import main
from jaxinfer.errors import CheckpointError, EngineClosedError, TokenizerError
from jaxinfer.models import decoder

MODELS = ("llama", "llama-bias", "mistral", "qwen3", "gemma3", "phi3-long", "smollm3", "granite")
ENGINE = {"max_batch_size": 1, "max_num_tokens": 8, "max_seq_len": 32, "num_pages": 8}
needs_four = pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices")


def tree_of(config, devices=1):
    """The parameters of a model, and where they go on so many devices."""
    declared = decoder.parameters(config)
    mesh = shardings.mesh(devices)
    return declared, jax.tree.map(lambda p: shardings.named(mesh, p.letters), declared)


def load(folder, dtype="float32", devices=1, load_format="auto"):
    """The facts of a model, and its weights."""
    files = checkpoint.resolve(folder, load_format)
    declared, places = tree_of(files.config, devices)
    if load_format == "dummy":
        return files, checkpoint.random_weights(declared, places, jnp.dtype(dtype), 0)
    return files, checkpoint.load(files, declared, places, dtype)


def assert_same(got, wanted):
    def same(path, left, right):
        assert left.dtype == right.dtype, path
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right), err_msg=str(path))

    jax.tree_util.tree_map_with_path(same, got, wanted)


@pytest.fixture
def saved(fixtures, tmp_path):
    """A saved model, with a tokenizer."""
    files, weights = load(fixtures / "llama")
    saving.save(tmp_path / "saved", weights, files.config, fixtures / "tokenizer")
    return tmp_path / "saved"


def data_of(folder, name="data-*"):
    (data,) = folder.glob(name)
    return data


# -- what comes back ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_weights_and_facts_come_back(fixtures, tmp_path, name):
    files, weights = load(fixtures / name)
    saving.save(tmp_path / "saved", weights, files.config, None)
    again, loaded = load(tmp_path / "saved")
    assert again.config == dataclasses.replace(files.config, dtype="float32")
    assert_same(loaded, weights)


@pytest.mark.parametrize("kept", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_number_formats(fixtures, tmp_path, kept, dtype):
    files, weights = load(fixtures / "llama3", kept)
    saving.save(tmp_path / "saved", weights, files.config, None)
    again, loaded = load(tmp_path / "saved", dtype)
    assert again.config.dtype == kept
    # NumPy's cast: XLA's flushes what is subnormal in float16.
    assert_same(loaded, jax.tree.map(lambda x: np.asarray(x).astype(dtype), weights))


def test_orbax_reads_it_too(fixtures, saved):
    with (
        ocp.PyTreeCheckpointer() as checkpointer,
        pytest.warns(UserWarning, match="Sharding info not provided"),
    ):
        restored = checkpointer.restore(data_of(saved) / "weights")
    assert_same(restored, load(fixtures / "llama")[1])


@needs_four
@pytest.mark.parametrize("before", [1, 2, 4])
@pytest.mark.parametrize("after", [1, 2, 4])
def test_another_mesh(tiny_model, tmp_path, monkeypatch, before, after):
    files, weights = load(tiny_model, devices=before, load_format="dummy")
    saving.save(tmp_path / "saved", weights, files.config, None)
    taken, real = [], saving.aligned
    monkeypatch.setattr(saving, "aligned", lambda *of: taken.append(real(*of)) or taken[-1])
    _, loaded = load(tmp_path / "saved", devices=after)
    assert_same(loaded, weights)
    mesh = shardings.mesh(after)
    declared = jax.tree.leaves(decoder.parameters(files.config))
    for leaf, parameter in zip(jax.tree.leaves(loaded), declared, strict=True):
        assert leaf.sharding == shardings.named(mesh, parameter.letters)
        shape = leaf.sharding.shard_shape(parameter.shape)
        assert [shard.data.shape for shard in leaf.addressable_shards] == [shape] * after
    # What is split is read once in parts, and what is whole everywhere once as well.
    assert sum(out.nbytes for out in taken) == sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    if after == 1:  # on CPU the array is what was read into
        addresses = {out.ctypes.data for out in taken}
        assert {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(loaded)} == addresses


def test_an_llm_saves_itself_and_lives_on(fixtures, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(fixtures / "llama", source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(fixtures / "tokenizer" / name, source)
    params = SamplingParams(temperature=0, max_tokens=6)
    with LLM(source, skip_tokenizer_init=True, **ENGINE) as llm:
        stream = llm.stream([1, 5, 9], params)
        next(stream)
        llm.save(tmp_path / "saved")
        wanted = list(stream)[-1].outputs[0].token_ids
    with pytest.raises(EngineClosedError):
        llm.save(tmp_path / "other")
    shutil.rmtree(source)
    with LLM(str(tmp_path / "saved"), **ENGINE) as llm:
        output = llm.generate([1, 5, 9], params)
        assert output.outputs[0].token_ids == wanted
        assert llm.tokenizer.encode("a b")
        # Onto the folder that it was loaded from, whose files it copies.
        llm.save(tmp_path / "saved", overwrite=True)
    with LLM(tmp_path / "saved", **ENGINE) as llm:
        assert llm.generate([1, 5, 9], params).outputs[0].token_ids == wanted


def test_the_tokenizer_is_the_one_in_use(fixtures, tmp_path):
    other = str(fixtures / "tokenizer-jinja")
    with LLM(fixtures / "llama", tokenizer=other, **ENGINE) as llm:
        llm.save(tmp_path / "saved")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        copied = data_of(tmp_path / "saved") / name
        assert copied.read_bytes() == (fixtures / "tokenizer-jinja" / name).read_bytes()


def test_a_model_without_a_tokenizer(tiny_model, tmp_path):
    with LLM(tiny_model, load_format="dummy", skip_tokenizer_init=True, **ENGINE) as llm:
        llm.save(tmp_path / "saved")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is missing.*tokenizer="):
        LLM(tmp_path / "saved", **ENGINE)


def test_in_a_running_event_loop(fixtures, tmp_path):
    files, weights = load(fixtures / "llama")

    async def both():
        saving.save(tmp_path / "saved", weights, files.config, None)
        return load(tmp_path / "saved")[1]

    assert_same(asyncio.run(both()), weights)


def test_nothing_is_logged_that_a_user_would_see(fixtures, tmp_path, caplog, capfd):
    files, weights = load(fixtures / "llama", devices=1)
    caplog.set_level(logging.WARNING)
    saving.save(tmp_path / "saved", weights, files.config, fixtures / "tokenizer")
    load(tmp_path / "saved", "bfloat16")
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


# -- where to -----------------------------------------------------------------------------------


def test_folders_that_are_taken(fixtures, tmp_path, saved):
    files, weights = load(fixtures / "llama")
    before = sorted(saved.rglob("*"))
    with pytest.raises(CheckpointError, match=r"holds a saved model.*overwrite=True"):
        saving.save(saved, weights, files.config, None)
    assert sorted(saved.rglob("*")) == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="is a file: name a folder"):
        saving.save(tmp_path / "file", weights, files.config, None, overwrite=True)
    other = tmp_path / "other"
    (other / "data-set").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="holds other files, which are not replaced"):
        saving.save(other, weights, files.config, None, overwrite=True)
    assert (other / "data-set").is_dir()
    (tmp_path / "empty").mkdir()
    saving.save(tmp_path / "empty", weights, files.config, None)
    assert_same(load(tmp_path / "empty")[1], weights)


def test_overwriting_replaces_only_the_model(fixtures, saved):
    (saved / "notes.md").write_text("mine")
    (saved / "data-set").mkdir()
    files, weights = load(fixtures / "qwen3")
    saving.save(saved, weights, files.config, None, overwrite=True)
    again, loaded = load(saved)
    assert_same(loaded, weights)
    assert sorted(entry.name for entry in saved.iterdir()) == sorted(
        [again.path.name, "data-set", "jaxinfer.json", "notes.md"]
    )
    assert not (data_of(saved, again.path.name) / "tokenizer.json").exists()


def test_the_home_folder_is_found(fixtures, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    files, weights = load(fixtures / "llama")
    saving.save("~/saved", weights, files.config, None)
    assert_same(load("~/saved")[1], weights)


# -- interruptions ------------------------------------------------------------------------------

POINTS = (
    (ocp.PyTreeCheckpointHandler, "save"),
    (ocp.PyTreeCheckpointHandler, "finalize"),
    (shutil, "copyfile"),
    (saving, "_synced_sizes"),
    (os, "replace"),
)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize(("owner", "name"), POINTS, ids=[name for _, name in POINTS])
def test_a_save_that_fails(fixtures, tmp_path, saved, monkeypatch, owner, name, error):
    old = load(saved)[1]
    files, weights = load(fixtures / "qwen3")

    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        kind = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
        for folder in (saved, tmp_path / "new"):
            with pytest.raises(kind) as raised:
                saving.save(folder, weights, files.config, fixtures / "tokenizer", overwrite=True)
            if kind is CheckpointError:
                assert f"{folder} cannot be written: disk full" in str(raised.value)
    assert_same(load(saved)[1], old)
    failed = isinstance(error, OSError)  # then nothing of the new one is left
    assert len(list(saved.glob("data-*"))) == (1 if failed else 2)
    with pytest.raises(
        CheckpointError, match="new has neither" if failed else "new: .*interrupted"
    ):
        checkpoint.resolve(tmp_path / "new")
    saving.save(tmp_path / "new", weights, files.config, None)
    assert_same(load(tmp_path / "new")[1], weights)


KILLED = """
import os, shutil, signal, sys
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxinfer import saving
from jaxinfer.config import ModelConfig

folder, point = sys.argv[1:]
owner, _, name = point.rpartition(".")
owner = {"handler": ocp.PyTreeCheckpointHandler, "saving": saving, "shutil": shutil}[owner]
config = ModelConfig.from_dict(%r)
weights = {"embed_VD": jnp.ones((8, 8))}
setattr(owner, name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
saving.save(folder, weights, config, None, overwrite=True)
"""


@pytest.mark.parametrize(
    ("point", "new"),
    [("handler.finalize", False), ("saving._synced_sizes", False), ("shutil.rmtree", True)],
)
def test_a_save_that_is_killed(fixtures, tmp_path, saved, point, new):
    files, old = load(saved)
    folders = [saved] if new else [saved, tmp_path / "fresh"]
    root = str(Path(saving.__file__).parents[1])
    script = KILLED % json.loads((saved / saving.MANIFEST).read_text())["config"]
    killed = [
        subprocess.Popen(
            [sys.executable, "-c", script, folder, point], env={**os.environ, "PYTHONPATH": root}
        )
        for folder in folders
    ]
    assert [process.wait() for process in killed] == [-signal.SIGKILL] * len(killed)
    assert len(list(saved.glob("data-*"))) == 2
    if new:  # the embedding that the script saved, and nothing else
        manifest = json.loads((saved / saving.MANIFEST).read_text())
        shape = jax.ShapeDtypeStruct((8, 8), jnp.float32)
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        (loaded,) = saving.restore(
            saved / manifest["data"], {"embed_VD": shape}, {"embed_VD": place}, jnp.float32
        ).values()
        np.testing.assert_array_equal(loaded, np.ones((8, 8)))
    else:
        assert_same(load(saved)[1], old)
        with pytest.raises(CheckpointError, match=r"fresh: .*interrupted; save the model there"):
            LLM(tmp_path / "fresh", **ENGINE)
        saving.save(tmp_path / "fresh", old, files.config, None)  # needs no overwrite
        assert_same(load(data_of(tmp_path / "fresh").parent)[1], old)
    saving.save(saved, old, files.config, None, overwrite=True)
    data_of(saved)  # what was left is gone


# -- damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["missing", "truncated", "longer"])
def test_every_file_is_looked_at(saved, harm):
    files = [path for path in data_of(saved).rglob("*") if path.is_file()]
    assert len(files) > 5
    for file in files:
        content = file.read_bytes()
        message = f"{file.name} has .* bytes instead of {len(content)}; copy it anew, or save"
        if harm == "missing":
            file.unlink()
            message = f"{file.name} is missing; copy it anew, or save"
        elif harm == "truncated" and content:
            file.write_bytes(content[:-1])
        else:
            file.write_bytes(content + b"x")
        with pytest.raises(CheckpointError, match=message):
            checkpoint.resolve(saved)
        file.write_bytes(content)
    load(saved)


def test_the_data_folder_is_gone(saved):
    shutil.rmtree(data_of(saved))
    with pytest.raises(CheckpointError, match="is missing; copy it anew"):
        checkpoint.resolve(saved)


@pytest.mark.parametrize("name", ["manifest.ocdbt", "d/*"])
def test_files_of_the_right_size_with_wrong_bytes(saved, name):
    # Of the index: the weights themselves have no checksums, as in safetensors.
    for file in (data_of(saved) / "weights").glob(name):
        file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(CheckpointError, match=r"weights cannot be read: .*save the model again"):
        load(saved)


def change(folder, **values):
    file = folder / saving.MANIFEST
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": 2, "jaxinfer": "9.8"}, r"format 2, written by jaxinfer 9\.8.*install"),
        ({"format": 0}, "format or data is not as it was written; save the model again"),
        ({"format": None}, "format is missing"),
        ({"format": "1"}, "format is missing or not as it was written"),
        ({"colour": 1}, "no field 'colour'"),
        ({"files": None}, "files is missing"),
        ({"data": "../elsewhere"}, "format or data is not as it was written"),
        ({"data": "data-../../../../../../etc"}, "format or data is not as it was written"),
        ({"config": {}}, "vocab_size is missing; save the model again"),
    ],
)  # fmt: skip
def test_a_manifest_that_makes_no_sense(saved, values, message):
    change(saved, **values)
    with pytest.raises(CheckpointError, match=rf"jaxinfer\.json\b.*{message}"):
        checkpoint.resolve(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_a_manifest_that_is_no_json(saved, text):
    (saved / saving.MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=r"jaxinfer\.json (cannot be read|must hold)"):
        checkpoint.resolve(saved)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_layers", "2", r"num_layers must be a whole number"),
        ("hidden", 2, r"no field 'hidden'; did you mean"),
        ("rope_scaling", 2, "rope_scaling must be a mapping"),
        ("rope_scaling", {"kind": "yarn"}, "rope_scaling.factor is missing"),
        ("no_rope_layers", 1, "must be a tuple of whole numbers"),
    ],
)
def test_facts_that_make_no_sense(saved, field, value, message):
    config = json.loads((saved / saving.MANIFEST).read_text())["config"]
    change(saved, config=config | {field: value})
    with pytest.raises(
        CheckpointError, match=rf"jaxinfer\.json: .*{message}.*save the model again"
    ):
        checkpoint.resolve(saved)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("intermediate_size", 30, r"down_DF has the shape \[36, 36\].*must be \[30, 36\]"),
        ("num_layers", 3, r"parameters are missing, such as layers\.2\."),
        ("num_layers", 1, r"parameters are left over, such as layers\.1\."),
        ("qkv_bias", True, r"2 parameters are missing, such as layers\.0\.qkv_bias_KUH"),
    ],
)
def test_facts_that_do_not_fit_the_weights(saved, field, value, message):
    config = json.loads((saved / saving.MANIFEST).read_text())["config"]
    change(saved, config=config | {field: value})
    with pytest.raises(CheckpointError, match=rf"weights: .*{message}.*; save the model again"):
        load(saved)


def test_a_piece_is_missing(saved):
    files = checkpoint.resolve(saved)
    database = f"file://{data_of(saved) / 'weights'}/|ocdbt:"
    del tensorstore.KvStore.open(database).result()["layers.1.down_DF/0.0"]
    with pytest.raises(
        CheckpointError, match=r"cannot be read: .*layers\.1\.down_DF/.*save the model"
    ):
        checkpoint.load(files, *tree_of(files.config), jnp.float32)


# -- the command --------------------------------------------------------------------------------


def test_the_command(fixtures, tmp_path, capsys):
    words = ["save", "--model", str(fixtures / "llama-bf16"), "--output", str(tmp_path / "saved")]
    assert main(words) == 0
    assert "saved" in capsys.readouterr().err
    files, loaded = load(tmp_path / "saved")
    assert files.config.dtype == "bfloat16"  # the checkpoint's, on CPU too
    assert_same(loaded, load(fixtures / "llama-bf16")[1])
    assert main(words) == 1
    assert "set overwrite=True" in capsys.readouterr().err
    assert main([*words, "--overwrite", "--dtype", "float16"]) == 0
    assert load(tmp_path / "saved")[0].config.dtype == "float16"
    assert main([*words, "--overwrite", "--dtype", "int3"]) == 2
    assert "EngineConfig.dtype must be one of" in capsys.readouterr().err


def test_a_model_that_replaced_the_one_it_came_from_keeps_its_tokenizer(fixtures, tmp_path):
    shutil.copytree(fixtures / "llama", tmp_path / "hf")
    shutil.copytree(fixtures / "tokenizer", tmp_path / "hf", dirs_exist_ok=True)
    first, second = tmp_path / "first", tmp_path / "second"
    with LLM(tmp_path / "hf", **ENGINE) as llm:
        llm.save(first)
    with LLM(first, **ENGINE) as llm:
        llm.save(first, overwrite=True)  # which removes the files it was loaded from
        llm.save(second)
        assert (data_of(second) / "tokenizer.json").is_file()
        shutil.rmtree(first)
        with pytest.raises(CheckpointError, match="where the tokenizer was, is gone"):
            llm.save(tmp_path / "third")
