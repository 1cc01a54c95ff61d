"""Models in the form that the engine holds them, saved with Orbax: they load without conversion.

A folder that `save` made:

    jaxinfer.json           what the model is, and the name of the data folder; written last
    data-<hex>/weights/     the tree of the weights, an Orbax checkpoint
    data-<hex>/*.json, …    the tokenizer's files

Replacing jaxinfer.json is what makes a save count, and it happens at once: before it the folder is
the old model, or none.  (Orbax writes whole folders at once as well, but knows of the weights only,
and deletes a folder before it replaces it.)
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import secrets
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxinfer import __version__
from jaxinfer.config import ModelConfig, reject_unknown
from jaxinfer.errors import CheckpointError, ConfigError

FORMAT = 1
MANIFEST = "jaxinfer.json"
KEYS = {"format": int, "jaxinfer": str, "data": str, "config": dict, "files": dict}
DATA = "data-" + "[0-9a-f]" * 16  # the pattern of data folders' names
WEIGHTS = "weights"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "generation_config.json",
)  # fmt: skip
GB = 10**9  # Orbax counts in these
READERS = 4  # parameters that are read at a time
AGAIN = "save the model again, with overwrite=True"


def is_unfinished(folder: Path) -> bool:
    """Whether there is nothing in the folder but what an interrupted `save` left."""
    names = [entry.name for entry in folder.iterdir()]
    return bool(names) and all(fnmatchcase(name, DATA) for name in names)


def save(
    path: str | Path,
    weights: Any,
    config: ModelConfig,
    tokenizer_folder: Path | None,
    *,
    overwrite: bool = False,
) -> Path:
    """Save a model as a folder that is complete in itself; each device writes its shards.

    Returns the data folder in it, where the tokenizer's files are, too.

    weights: the tree of arrays.  tokenizer_folder: where the tokenizer's files are, None for none.
    overwrite: replace the model that an earlier `save` left there; others are never touched.

    Whatever interrupts it, `path` holds the whole old model or the whole new one, or nothing that
    can be loaded if there was no old one.  One process at a time may save to a folder.
    Raises `CheckpointError` if there is something at `path`, or it cannot be written.
    """
    path = check_target(path, overwrite)
    if tokenizer_folder is not None and not tokenizer_folder.is_dir():
        raise CheckpointError(
            f"{tokenizer_folder}, where the tokenizer was, is gone: a model saved now would have "
            "none; load the model again"
        )
    data = path / f"data-{secrets.token_hex(8)}"
    try:
        data.mkdir(parents=True)
        _write_weights(data / WEIGHTS, weights)
        if tokenizer_folder is not None:
            _copy_tokenizer(tokenizer_folder, data)
        manifest = {
            "format": FORMAT,
            "jaxinfer": __version__,
            "data": data.name,
            "config": dataclasses.asdict(
                dataclasses.replace(config, dtype=weights["embed_VD"].dtype.name)
            ),
            "files": _synced_sizes(data),
        }
        fresh = data / MANIFEST
        fresh.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        _sync(fresh)
        os.replace(fresh, path / MANIFEST)
    except Exception as error:  # not KeyboardInterrupt, which may come when all is done
        shutil.rmtree(data, ignore_errors=True)
        raise CheckpointError(f"{path} cannot be written: {_reason(error)}") from error
    _sync(path)
    for other in path.glob(DATA):  # the old model, and what interrupted saves left
        if other != data:
            shutil.rmtree(other)
    return data


def check_target(path: str | Path, overwrite: bool) -> Path:
    """The folder to save to, as an absolute path; raises `CheckpointError` if it is not free."""
    path = Path(path).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is a file: name a folder to save to")
    if (path / MANIFEST).exists():
        if not overwrite:
            raise CheckpointError(
                f"{path} holds a saved model: name a new folder, or set overwrite=True"
            )
    elif path.is_dir() and any(path.iterdir()) and not is_unfinished(path):
        raise CheckpointError(
            f"{path} holds other files, which are not replaced: name a new folder"
        )
    return path


def _write_weights(path: Path, weights: Any) -> None:
    import orbax.checkpoint as ocp  # half a second, for those who save

    largest = max(array.nbytes for array in jax.tree.leaves(weights))
    # Uncompressed: inflating takes longer than reading, and only plain data can be mapped.
    handler = ocp.PyTreeCheckpointHandler(
        use_compression=False,
        save_device_host_concurrent_gb=largest // GB + 1,  # must exceed what is copied at once
    )
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(weights))


def _copy_tokenizer(source: Path, target: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _synced_sizes(folder: Path) -> dict[str, int]:
    """The size of each file, by its path in the folder, once all are safe on disk."""
    sizes = {}
    for path in sorted(folder.rglob("*")):
        _sync(path)
        if path.is_file():
            sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    _sync(folder)
    return sizes


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find(folder: Path) -> tuple[Path, ModelConfig]:
    """The data folder and the facts of a saved model, all of whose files are there.

    Raises `CheckpointError` if a file is missing or has not the size it was saved with, or a newer
    version wrote the folder.
    """
    file = folder / MANIFEST
    values = read_json(file)
    form = values.get("format")
    if type(form) is int and form > FORMAT:
        raise CheckpointError(
            f"{file} has format {form}, written by jaxinfer {values.get('jaxinfer')}; jaxinfer "
            f"{__version__} reads up to {FORMAT}: install the newer one"
        )
    reject_unknown(str(file), values, KEYS, CheckpointError)
    for key, kind in KEYS.items():
        if type(values.get(key)) is not kind:
            raise CheckpointError(f"{file}: {key} is missing or not as it was written; {AGAIN}")
    if form != FORMAT or not fnmatchcase(values["data"], DATA):
        raise CheckpointError(f"{file}: format or data is not as it was written; {AGAIN}")
    try:
        config = ModelConfig.from_dict(values["config"])
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}; {AGAIN}") from error
    data = folder / values["data"]
    for name, size in values["files"].items():
        part = data / name
        found = part.stat().st_size if part.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise CheckpointError(f"{part} {state}; copy it anew, or {AGAIN}")
    return data, config


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; raises `CheckpointError`."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} must hold a JSON object")
    return values


def restore(data: Path, parameters: Any, shardings: Any, dtype: Any) -> Any:
    """Read the weights: the tree of `parameters` as arrays of `dtype` with `shardings`.

    parameters: tree of leaves with a `shape`; shardings: the same tree of `Sharding`.

    The mesh may be another than at the saving: the file is mapped, and each device reads of it what
    it gets.  Casting happens on the way, a few parameters at a time, so the host never holds the
    model beside the devices (on CPU the array is the memory read into).  Orbax's own reading copies
    more often and spends 0.1 s on the smallest tree, which makes it slower than converting: this
    asks the library below it.
    Raises `CheckpointError` if the data do not fit or cannot be read.
    """
    path = data.absolute() / WEIGHTS
    leaves, tree = jax.tree_util.tree_flatten_with_path(parameters)
    shapes = {
        jax.tree_util.keystr(keys, simple=True, separator="."): tuple(parameter.shape)
        for keys, parameter in leaves
    }
    try:
        stores = _open(path, shapes)
        with ThreadPoolExecutor(READERS) as pool:
            read = functools.partial(_array, dtype=jnp.dtype(dtype))
            return tree.unflatten(pool.map(read, stores, tree.flatten_up_to(shardings)))
    except (ValueError, OSError) as error:  # TensorStore's
        raise CheckpointError(f"{path} cannot be read: {_reason(error)}; {AGAIN}") from error


def _open(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> list[Any]:
    """The stored arrays with these names and shapes; raises `CheckpointError` if others are there.

    Orbax keeps each array in Zarr's format under its name, in a database of few files (OCDBT).
    """
    import tensorstore

    base = {"driver": "file", "path": f"{path}/"}
    database = {"driver": "ocdbt", "base": base}
    keys = tensorstore.KvStore.open(database).result().list().result()
    found = {key.decode().partition("/")[0] for key in keys}
    for names, state in ((shapes.keys() - found, "missing"), (found - shapes.keys(), "left over")):
        if names:
            raise CheckpointError(
                f"{path}: {len(names)} parameters are {state}, such as {min(names)}; {AGAIN}"
            )
    context = tensorstore.Context({"file_io_mode": {"mode": "memmap"}})
    opening = [
        tensorstore.open(
            {
                "driver": "zarr",
                "kvstore": {**database, "path": f"{name}/"},
                "fill_missing_data_reads": False,  # an error, not zeros
            },
            open=True,
            context=context,
        )
        for name in shapes
    ]
    stores = [future.result() for future in opening]
    for store, (name, shape) in zip(stores, shapes.items(), strict=True):
        if store.shape != shape:
            raise CheckpointError(
                f"{path}: {name} has the shape {list(store.shape)}, but by {MANIFEST} it must be "
                f"{list(shape)}; {AGAIN}"
            )
    return stores


def _array(store: Any, sharding: Any, dtype: np.dtype) -> Array:
    """A stored array, of which each device gets its slice."""
    import tensorstore

    if store.dtype.numpy_dtype != dtype:
        store = tensorstore.cast(store, dtype.name)

    @functools.cache  # devices that hold the same slice share one reading
    def read(*bounds: tuple[int, int]) -> np.ndarray:
        out = aligned([stop - start for start, stop in bounds], dtype)
        slices = tuple(slice(start, stop) for start, stop in bounds)
        tensorstore.array(out).write(store[slices].translate_to[(0,) * len(bounds)]).result()
        return out

    def callback(index: Any) -> np.ndarray:
        return read(*(s.indices(size)[:2] for s, size in zip(index, store.shape, strict=True)))

    return jax.make_array_from_callback(store.shape, sharding, callback, dtype=dtype)


def aligned(shape: list[int], dtype: Any) -> np.ndarray:
    """An empty array at an address that jax takes over on CPU without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 63, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _reason(error: BaseException) -> str:
    """What went wrong first, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}…"
