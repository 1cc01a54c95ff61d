"""Runs a function in a process of its own, where the compilers of a target may be loaded.

A compiler cannot be unloaded, reads its settings from the environment once, and ends the process
when it meets what it does not expect: none of that may happen to the caller.
"""

from __future__ import annotations

import importlib
import io
import os
import pickle
import subprocess
import sys
import tempfile
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxinfer.aot.target import ENVIRONMENT
from jaxinfer.errors import CompileError, ConfigError, JaxinferError

CHILD = "from jaxinfer.aot import isolate; isolate.serve()"
# The end of what a process said before it died.
TAIL = 4000


def run(function: Callable[..., Any], *args: Any, timeout: float | None = None) -> tuple[Any, str]:
    """Call `function(*args)` elsewhere: its result, and what was written to standard output and
    error.

    Functions travel by name, so each must be one that a module has at its top level, or a
    `functools.partial` of such; everything else is pickled.  timeout: seconds.

    Raises what the function raised, if that is jaxinfer's, `CompileError` for anything else, and
    if the process died or ran out of time.
    """
    with tempfile.TemporaryDirectory(prefix="jaxinfer-aot-") as folder:
        job, answer = Path(folder, "job"), Path(folder, "answer")
        job.write_bytes(_dumps((function, args)))
        env = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)}
        try:
            done = subprocess.run(
                [sys.executable, "-c", CHILD, str(job), str(answer)],
                env=env, capture_output=True, text=True, errors="replace", timeout=timeout,
                check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise CompileError(f"compiling took more than {timeout} s") from error
        if done.returncode:
            raise CompileError(
                f"the compiler ended the process (exit code {done.returncode}):\n"
                f"{(done.stdout + done.stderr)[-TAIL:]}"
            )
        good, result = pickle.loads(answer.read_bytes())
    if good:
        return result, done.stdout + done.stderr
    raise result


def serve() -> None:
    """What the other process does: read the job, do it, write the answer."""
    job, answer = (Path(path) for path in sys.argv[1:])
    try:
        function, args = pickle.loads(job.read_bytes())
        outcome = True, function(*args)
    except JaxinferError as error:
        outcome = False, error
    except Exception as error:
        trace = "".join(traceback.format_exception(error))
        outcome = False, CompileError(f"{type(error).__name__}: {error}\n\n{trace[-TAIL:]}")
    answer.write_bytes(pickle.dumps(outcome))


class _ByName(pickle.Pickler):
    """Sends jitted functions by name, too: plain pickle looks at what they wrap."""

    def reducer_override(self, obj: Any) -> Any:
        if hasattr(obj, "lower") and hasattr(obj, "__wrapped__") and callable(obj):
            _check_name(obj)
            return _find, (obj.__module__, obj.__qualname__)
        if isinstance(obj, types.FunctionType):
            _check_name(obj)
        return NotImplemented


def _check_name(function: Any) -> None:
    home, name = function.__module__, function.__qualname__
    if home == "__main__" or _find(home, name) is not function:
        raise ConfigError(
            f"{home}.{name} cannot be found by its name in another process: move it to the top "
            "level of a module that can be imported, and bind arguments with functools.partial"
        )


def _find(module: str, name: str) -> Any:
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _dumps(value: Any) -> bytes:
    buffer = io.BytesIO()
    _ByName(buffer).dump(value)
    return buffer.getvalue()
