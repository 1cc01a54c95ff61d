"""Model folders become sharded weights.

`resolve` finds a model and says what it is, `load` reads its weights, of which each device gets
only its slice, and `random_weights` draws some where there are none.  Folders in Hugging Face
layout are converted on the way; what `saving` made is not.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import zlib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import SequenceKey
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from jaxinfer import saving
from jaxinfer.config import ModelConfig
from jaxinfer.configs import find_model_preset, load_model_preset
from jaxinfer.errors import CheckpointError, ConfigError, TokenizerError, UnsupportedModelError
from jaxinfer.models import Family, architecture_of, family_of, model_config, token_ids
from jaxinfer.models.family import Part
from jaxinfer.saving import aligned, read_json

DEMO = Path(__file__).with_name("demo") / "model"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F32", "F16", "BF16")

PROGRESS_BYTES = 10**9


@dataclass(frozen=True)
class ModelFiles:
    """A model that was found.

    path: the folder of weights and tokenizer; None for a preset, which has neither.
    family: how the weights are spelled; None if `saving.save` wrote them as they are in memory.
    """

    path: Path | None
    config: ModelConfig
    family: Family | None
    generation_config: Mapping[str, Any] = field(default_factory=dict)

    def tokenizer_folder(self) -> Path:
        """Where the tokenizer is; raises `TokenizerError` for a preset, which has none."""
        if self.path is None:
            raise TokenizerError(
                "a preset has no tokenizer: set tokenizer= to a folder that has one, or "
                "skip_tokenizer_init=True to work on token ids"
            )
        return self.path


# -- finding a model --------------------------------------------------------------------------


def resolve(model: str | Path, load_format: str = "auto") -> ModelFiles:
    """Find a model: a local folder, "demo", a preset's name or a hub id, tried in that order.

    A preset has no weights, so it needs load_format="dummy"; with that a hub id that a preset
    knows needs no files either.  Raises `ConfigError` for an unknown name, `CheckpointError` for
    files that are missing or unsound, `UnsupportedModelError` for what is not implemented.
    """
    folder, name = Path(model).expanduser(), str(model)
    if folder.is_dir():
        return _from_folder(folder)
    if folder.exists():
        raise CheckpointError(f"{folder} is a file; name the folder that holds config.json")
    if name == "demo":
        return _from_folder(DEMO)
    is_hub_id = bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name))
    if isinstance(model, Path) or (os.sep in name and not is_hub_id):
        raise CheckpointError(f"there is no folder {folder}")
    if load_format == "dummy" and (preset := find_model_preset(name)):
        return _from_preset(preset)
    if is_hub_id:
        return _from_folder(_hub_folder(name, with_weights=load_format != "dummy"))
    if preset := find_model_preset(name):
        source = load_model_preset(preset).source
        raise ConfigError(
            f"the preset {preset!r} has no weights: set load_format='dummy' for random ones, or "
            f"name a folder or the hub id {source!r}"
        )
    try:
        return _from_preset(name)
    except ConfigError as error:
        raise ConfigError(
            f"{name!r} is no folder and no hub id (organisation/name): {error}"
        ) from None


def _from_preset(name: str) -> ModelFiles:
    preset = load_model_preset(name)
    return ModelFiles(None, preset.config, family_of(preset.architecture))


def _from_folder(path: Path) -> ModelFiles:
    if (path / saving.MANIFEST).exists():
        data, config = saving.find(path)
        return ModelFiles(data, config, None)
    file = path / "config.json"
    if not file.is_file():
        if saving.is_unfinished(path):
            raise CheckpointError(f"{path}: saving it was interrupted; save the model there again")
        raise CheckpointError(
            f"{path} has neither config.json (a model in Hugging Face layout) nor "
            f"{saving.MANIFEST} (a saved one)"
        )
    values, generation_file = read_json(file), path / "generation_config.json"
    config = model_config(values, str(file))
    generation = read_json(generation_file) if generation_file.is_file() else {}
    more = token_ids(generation.get("eos_token_id"), f"{generation_file}: eos_token_id")
    ends = tuple(dict.fromkeys(config.eos_token_ids + more))
    config = dataclasses.replace(config, eos_token_ids=ends)
    return ModelFiles(path, config, family_of(architecture_of(values, str(file))), generation)


def _hub_folder(name: str, *, with_weights: bool) -> Path:
    """The folder of a hub model: where an earlier download left it, or a new download."""
    home = (
        os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME', '~/.cache')}/huggingface"
    )
    cache = Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()
    repository = cache / f"models--{name.replace('/', '--')}"
    revision = repository / "refs" / "main"
    if revision.is_file():
        snapshot = repository / "snapshots" / revision.read_text().strip()
        if _is_complete(snapshot, with_weights=with_weights):
            return snapshot
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(
            f"there is no folder {name!r}, and no complete download of it in {cache}; download "
            'it, or install jaxinfer with the extra "hub" to have that done'
        ) from None
    patterns = ["*.json", "*.jinja"] + ["model*.safetensors"] * with_weights
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # its errors and those of the HTTP library have no common parent
        raise CheckpointError(
            f"there is no folder {name!r}, and the hub does not give it: {error}"
        ) from error


def _is_complete(folder: Path, *, with_weights: bool) -> bool:
    if not (folder / "config.json").is_file():
        return False
    try:
        return not with_weights or bool(_shards(folder))
    except CheckpointError:
        return False


# -- reading weights --------------------------------------------------------------------------


def load(files: ModelFiles, parameters: Any, shardings: Any, dtype: Any) -> Any:
    """Read all parameters: the tree of `parameters` as arrays of `dtype` with `shardings`.

    parameters: tree of `decoder.Parameter`; shardings: the same tree of `NamedSharding`.

    Everything is checked before a tensor is read.  Then one parameter at a time is read, so the
    host never holds the model beside the devices (on CPU the array is the memory read into).
    Raises `CheckpointError` naming the file and what is wrong with it.
    """
    if files.path is None:
        raise CheckpointError("a preset has no weights to load: set load_format='dummy'")
    dtype, sizes, family = jnp.dtype(dtype), files.config.sizes, files.family
    if family is None:
        return saving.restore(files.path, parameters, shardings, dtype)
    leaves, tree = jax.tree_util.tree_flatten_with_path(parameters)
    with ExitStack() as stack:
        tensors = _open(files.path, stack)
        plans = [family.parts(*place(path), sizes) for path, _ in leaves]
        _check(files, family, tensors, [part for parts in plans for part in parts])
        total = sum(math.prod(part.shape) for parts in plans for part in parts) * dtype.itemsize
        arrays = []
        with tqdm(
            total=total, unit="B", unit_scale=True, desc="weights", disable=total < PROGRESS_BYTES
        ) as progress:
            for (_, parameter), parts, sharding in zip(
                leaves, plans, tree.flatten_up_to(shardings), strict=True
            ):
                arrays.append(_array(parameter, parts, sharding, dtype, sizes, tensors))
                progress.update(arrays[-1].nbytes)
    return tree.unflatten(arrays)


def place(path: tuple[Any, ...]) -> tuple[str, int | None]:
    """The name of a parameter and its layer, if it is in one, from its path in the tree."""
    layer = next((entry.idx for entry in path if isinstance(entry, SequenceKey)), None)
    return path[-1].key, layer


def _shards(folder: Path) -> list[Path]:
    """The files that hold the weights; raises `CheckpointError` if there are none or some lack."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        kinds = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}
        found = sorted(file.name for file in folder.iterdir() if file.suffix in kinds)
        if found and not any(name.endswith(".safetensors") for name in found):
            advice = "convert the model to safetensors (in transformers: save_pretrained)"
        else:
            advice = "download the model again"
        there = f" but {_some(found)}" if found else ""
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}{there}: {advice}")
    names = read_json(folder / INDEX).get("weight_map")
    files: list[Any] = list(names.values()) if isinstance(names, dict) else [None]
    if not all(isinstance(name, str) and Path(name).name == name for name in files):
        raise CheckpointError(f"{folder / INDEX}: weight_map must map tensors to names of files")
    shards = [folder / name for name in sorted(set(files))]
    for shard in shards:
        if not shard.is_file():
            raise CheckpointError(f"{shard} is missing, although {INDEX} names it; download it")
    return shards


def _open(folder: Path, stack: ExitStack) -> dict[str, tuple[Path, Any]]:
    """All tensors: name → the file that has it, and the file opened.  Reads headers only."""
    tensors = {}
    for shard in _shards(folder):
        try:
            opened = stack.enter_context(safe_open(shard, framework="np"))
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{shard} is truncated or corrupt ({error}); download it again"
            ) from error
        names = opened.keys()
        tensors.update((name, (shard, opened)) for name in names)
    return tensors


def _check(
    files: ModelFiles, family: Family, tensors: Mapping[str, Any], parts: list[Part]
) -> None:
    """Raise `CheckpointError` unless the tensors are the ones that the configuration wants."""
    missing = [part.tensor for part in parts if part.tensor not in tensors]
    if missing:
        raise CheckpointError(
            f"{files.path}: {len(missing)} tensors are missing that config.json asks for: "
            + _some(missing)
        )
    for part in parts:
        shard, opened = tensors[part.tensor]
        tensor = opened.get_slice(part.tensor)
        if tensor.get_dtype() not in FLOATS:
            raise UnsupportedModelError(
                f"{shard}: {part.tensor} is {tensor.get_dtype()}; only {', '.join(FLOATS)} can be "
                "read, quantized checkpoints cannot"
            )
        wanted = [part.rows, *part.shape[1:]]
        if list(tensor.get_shape()) != wanted:
            raise CheckpointError(
                f"{shard}: {part.tensor} has the shape {tensor.get_shape()}, but by config.json it "
                f"must be {wanted}"
            )
    ignored = list(family.ignored)
    if files.config.tie_word_embeddings:
        ignored += [source.tensor for source in family.weights["head_VD"]]
    needed = {part.tensor for part in parts}
    unused = [
        name
        for name in tensors
        if name not in needed and not any(fnmatch(name, pattern) for pattern in ignored)
    ]
    if unused:
        raise CheckpointError(
            f"{files.path}: {len(unused)} tensors are not part of the model that config.json "
            f"describes: {_some(unused)}"
        )


def _some(names: list[str]) -> str:
    return ", ".join(sorted(names)[:5]) + (", …" if len(names) > 5 else "")


def _array(
    parameter: Any, parts: list[Part], sharding: Any, dtype: Any, sizes: Mapping[str, int],
    tensors: Mapping[str, tuple[Path, Any]],
) -> Array:  # fmt: skip
    """One parameter, of which each device gets its slice."""
    letters, shape = parameter.letters, parameter.shape

    @functools.cache  # devices that hold the same slice share one reading
    def read(*bounds: tuple[int, int]) -> np.ndarray:
        out = aligned([stop - start for start, stop in bounds], dtype)
        for part in parts:
            tensor = tensors[part.tensor][1].get_slice(part.tensor)
            _read(part, letters, dict(zip(letters, bounds, strict=True)), sizes, tensor, out)
        return out

    def callback(index: Any) -> np.ndarray:
        return read(*(s.indices(size)[:2] for s, size in zip(index, shape, strict=True)))

    return jax.make_array_from_callback(shape, sharding, callback, dtype=dtype)


def _read(
    part: Part, letters: str, bounds: dict[str, tuple[int, int]], sizes: Mapping[str, int],
    tensor: Any, out: np.ndarray,
) -> None:  # fmt: skip
    """Fill `out`, which is the parameter within these bounds, with what the tensor has of it."""
    if part.stacked:
        axis, (low, high) = letters.index(part.stacked), bounds[part.stacked]
        start, stop = max(low, part.start), min(high, part.stop)
        if start >= stop:
            return
        out = _along(out, axis, start - low, stop - low)
        if part.extra:
            bounds = bounds | {part.extra: (start - part.start, stop - part.start)}
        else:
            out = out.squeeze(axis)
        letters = letters.replace(part.stacked, part.extra)
    theirs = "".join(part.groups)
    values = _slab(part, bounds, sizes, tensor).astype(out.dtype, copy=False)
    out[...] = values.transpose([theirs.index(letter) for letter in letters])


def _along(array: np.ndarray, axis: int, start: int, stop: int) -> np.ndarray:
    return array[(slice(None),) * axis + (slice(start, stop),)]


def _slab(
    part: Part, bounds: Mapping[str, tuple[int, int]], sizes: Mapping[str, int], tensor: Any
) -> np.ndarray:
    """The source within these bounds, with an axis for each letter.

    Of letters that are merged in one axis, the leading one decides the rows that are read; the
    others are cut afterwards.
    """
    read = {x: (0, sizes[x]) for group in part.groups for x in group}
    rows, above = [], part.above
    for group in part.groups:
        below = math.prod(sizes[letter] for letter in group[1:])
        start, stop = read[group[0]] = bounds[group[0]]
        rows.append(slice(above + start * below, above + stop * below))
        above = 0  # only the first axis holds several sources
    values = tensor[tuple(rows)].reshape([stop - start for start, stop in read.values()])
    cut = [slice(bounds[x][0] - start, bounds[x][1] - start) for x, (start, _) in read.items()]
    return values[tuple(cut)]


# -- random weights ---------------------------------------------------------------------------


def random_weights(parameters: Any, shardings: Any, dtype: Any, seed: int) -> Any:
    """Draw all parameters: normal with deviation 0.02, or what `Parameter.init` says.

    Each device draws only its slice.  Values depend on the seed (its low 32 bits) and on the
    parameter's place in the tree, not on the sharding.
    """

    @functools.cache  # one program for all parameters that are alike
    def program(shape: tuple[int, ...], init: str, sharding: Any) -> Any:
        def draw(seed: Array, path: Array) -> Array:
            if init != "normal":
                return {"ones": jnp.ones, "zeros": jnp.zeros}[init](shape, dtype)
            key = jax.random.fold_in(jax.random.key(seed), path)
            return (0.02 * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

        return jax.jit(draw, out_shardings=sharding)

    def array(path: tuple[Any, ...], parameter: Any, sharding: Any) -> Array:
        name = zlib.crc32(jax.tree_util.keystr(path).encode())
        draw = program(parameter.shape, parameter.init, sharding)
        return draw(np.uint32(seed % 2**32), np.uint32(name))

    return jax.tree_util.tree_map_with_path(array, parameters, shardings)
