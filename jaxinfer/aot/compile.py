"""Compiles a function for a chip that is not there: `compile_for`, and what it does in its process.

    report = compile_for("v6e:1", my_kernel, jax.ShapeDtypeStruct((64, 128), jnp.bfloat16))
    assert report.kernels and not report.copies

For several devices the arguments say how they are split, over a mesh of no devices in particular:

    mesh = jax.sharding.AbstractMesh((4,), ("x",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    compile_for("h200:4", function, jax.ShapeDtypeStruct((64, 128), jnp.bfloat16, sharding=split))

In place of a sharding there may be a `jax.experimental.layout.Format`, of a layout and a sharding.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Format
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxinfer.aot import isolate
from jaxinfer.aot import target as targets
from jaxinfer.aot.report import Memory, Report, read
from jaxinfer.errors import CompileError, ConfigError, InsufficientMemoryError

# What compilers say on standard error that concerns the program and not the machine.
WARNING = re.compile(r"spill|shared memory|local memory|register", re.IGNORECASE)
# What ptxas says of every kernel; where registers are spilled it warns besides.
STATISTICS = re.compile(r"ptxas info|bytes stack frame")


def compile_for(
    target: str,
    function: Callable[..., Any],
    *args: Any,
    donate_argnums: int | Sequence[int] = (),
    out_shardings: Any = None,
    unknown_trips: int = 1,
    options: Mapping[str, Any] | None = None,
    timeout: float | None = 600,
) -> Report:
    """Compile `function(*args)` for `target` (see `target`) in a process of its own.

    function: at the top level of a module, jitted or not, or a `functools.partial` of one.
    args: trees of `jax.ShapeDtypeStruct`s (or arrays, of which only shapes and dtypes count).
    donate_argnums, out_shardings: of a function that is not jitted yet, as `jax.jit` takes them.
    unknown_trips: turns that loops count whose number depends on data.
    options: for XLA, as `lowered.compile(compiler_options=…)` takes them.  timeout: seconds.

    Raises `ConfigError` for a target that there is not, `ToolchainError` if its compiler is
    missing, `InsufficientMemoryError` if the program does not fit, `CompileError` for all else
    that the compiler refuses, with its own words.
    """
    where = targets.parse(target)
    args, results = jax.tree.map(_abstract, args), jax.tree.map(_no_devices, out_shardings)
    job = (where, function, args, donate_argnums, results, unknown_trips, options)
    report, said = isolate.run(compile_here, *job, timeout=timeout)
    return dataclasses.replace(report, warnings=warnings_in(said))


def warnings_in(text: str) -> tuple[str, ...]:
    """The compiler's remarks about the program among all that was written."""
    lines = [line.strip() for line in text.splitlines() if not STATISTICS.search(line)]
    return tuple(line for line in lines if WARNING.search(line))


def compile_here(
    target: targets.Target,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    donate_argnums: int | Sequence[int],
    out_shardings: Any,
    unknown_trips: int,
    options: Mapping[str, Any] | None,
) -> Report:
    """`compile_for` in the process that `isolate.run` starts for it."""
    devices = targets.devices(target)
    mesh = _mesh(args, devices)
    args = jax.tree.map(lambda leaf: _placed(leaf, mesh), args)
    results = jax.tree.map(lambda sharding: _on(sharding, mesh), out_shardings)
    jitted = function if hasattr(function, "lower") else jax.jit(
        function, donate_argnums=donate_argnums, out_shardings=results
    )  # fmt: skip
    with jax.set_mesh(mesh):
        started = time.perf_counter()
        lowered: Any = jitted.lower(*args)  # pyright: ignore[reportFunctionMemberAccess]
        seconds = time.perf_counter() - started
    name = getattr(function, "__name__", type(function).__name__)
    return finish(target, name, lowered, seconds, unknown_trips, options)


def finish(
    target: targets.Target,
    name: str,
    lowered: Any,
    lower_seconds: float,
    unknown_trips: int = 1,
    options: Mapping[str, Any] | None = None,
) -> Report:
    """Compile what was lowered for the target's devices, and read the result."""
    started = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=dict(options) if options else None)
    except jax.errors.JaxRuntimeError as error:
        raise _refusal(target, name, str(error)) from error
    seconds = time.perf_counter() - started
    stats = compiled.memory_analysis()
    memory = Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )
    infos = jax.tree.leaves(lowered.args_info, is_leaf=lambda leaf: hasattr(leaf, "donated"))
    return Report(
        target=target.text,
        name=name,
        memory=memory,
        donated=sum(info.donated for info in infos),
        lower_seconds=lower_seconds,
        compile_seconds=seconds,
        **read(compiled.as_text(), unknown_trips),
    )


def _refusal(target: targets.Target, name: str, message: str) -> Exception:
    where = f"{name} for {target.text}"
    if re.search(r"RESOURCE_EXHAUSTED.*\bhbm\b", message, re.IGNORECASE):  # other memories: below
        return InsufficientMemoryError(f"{where} does not fit:\n{message}")
    return CompileError(f"{where} does not compile:\n{message}")


def _abstract(leaf: Any) -> Any:
    """A leaf without its memory, and without devices that another process does not know."""
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        return leaf  # a Python number
    given = leaf.format if isinstance(leaf, jax.ShapeDtypeStruct) else leaf.sharding
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_no_devices(given))


def _no_devices(given: Any) -> Any:
    """A sharding, or a format with one, over its mesh without devices; None if it has no mesh."""
    sharding = given.sharding if isinstance(given, Format) else given
    if not isinstance(sharding, NamedSharding):
        if isinstance(given, Format) and given.layout is not None:
            raise ConfigError(
                "a layout needs a NamedSharding over a jax.sharding.AbstractMesh beside it, not "
                f"{sharding}"
            )
        return None
    sharding = NamedSharding(sharding.mesh.abstract_mesh, sharding.spec)
    return Format(given.layout, sharding) if isinstance(given, Format) else sharding


def _on(given: Any, mesh: Mesh) -> Any:
    """The same over a mesh of devices; whole on each of them if there was none."""
    sharding = given.sharding if isinstance(given, Format) else given
    spec = sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()
    sharding = NamedSharding(mesh, spec)
    return Format(given.layout, sharding) if isinstance(given, Format) else sharding


def _mesh(args: Any, devices: list[Any]) -> Mesh:
    """The one mesh of all arguments, of real devices; of the first one if none has a sharding."""
    leaves = [leaf for leaf in jax.tree.leaves(args) if getattr(leaf, "sharding", None)]
    meshes: set[AbstractMesh] = {leaf.sharding.mesh for leaf in leaves}
    if not meshes:
        return Mesh(np.array(devices[:1]), ("device",))
    if len(meshes) > 1:
        raise ConfigError(f"all arguments must be split over one mesh, found {len(meshes)}")
    (abstract,) = meshes
    if abstract.size > len(devices):
        raise ConfigError(
            f"the arguments are split over {abstract.size} devices, the target has {len(devices)}"
        )
    grid = np.array(devices[: abstract.size]).reshape(abstract.axis_sizes)
    return Mesh(grid, abstract.axis_names, axis_types=abstract.axis_types)


def _placed(leaf: Any, mesh: Mesh) -> Any:
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_on(leaf.format, mesh))
