"""The package as users get it, what an import costs them, and who may import whom."""

from __future__ import annotations

import ast
import functools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import jaxinfer

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Folder in the checkout → folder in a wheel.
FOLDERS = {
    "jaxinfer": "jaxinfer",
    "kernels": "jaxinfer/kernels",
    "shardings": "jaxinfer/shardings",
    "configs": "jaxinfer/configs",
}
# Who may import whom: a module may import what stands beside its name, and what that may import.
# A folder stands for its modules; models/decoder.py and models/<family>.py are "models".
MAY_IMPORT = {
    "errors": "",
    "shapes": "errors",
    "config": "errors",
    "request": "config",
    "pages": "errors",
    "scheduler": "pages request",
    "chat_template": "errors",
    "tokenizer": "chat_template",
    "stop": "",
    "configs": "config",
    "hardware": "errors",
    "aot": "checkpoint options planner step work",
    "kernels": "configs shapes",
    "shardings": "shapes config",
    "cache": "config kernels shardings",
    "layers": "config kernels shardings",
    "models": "cache layers",
    "saving": "config",
    "distribution": "",
    "layout": "",
    "sampling": "distribution layout request shapes",
    "work": "step",
    "batch": "kernels sampling scheduler",
    "step": "batch models",
    "checkpoint": "configs models saving",
    "planner": "scheduler",
    "validation": "scheduler tokenizer",
    "output": "request stop tokenizer",
    "loading": "checkpoint hardware planner tokenizer",
    "export": "checkpoint",
    "asynchronous": "output",
    "interrupts": "",
    "llm": "asynchronous interrupts loading step validation",
    "tasks": "request",
    "options": "config",
    "__main__": "llm options tasks",
    "bench": "export llm options work",
    "demo": "",
}
HOST_MODULES = ("errors", "shapes", "config", "request", "pages", "scheduler", "tokenizer")
# Where a distribution is not named as what it lets one import.
DISTRIBUTIONS = {"yaml": "pyyaml", "orbax": "orbax-checkpoint"}

PROBE = """
import importlib.util, pathlib
import jaxinfer, jaxinfer.kernels, jaxinfer.shardings, jaxinfer.configs, jaxinfer.demo
if {installed}:
    found = [name for name in ("kernels", "shardings", "configs") if importlib.util.find_spec(name)]
    assert not found, found
for folder in {folders}:
    home = pathlib.Path(importlib.util.find_spec(folder.replace("/", ".")).origin).parent
    for path in sorted(home.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            print("file", folder + "/" + path.relative_to(home).as_posix())
print("version", jaxinfer.__version__)
print("home", jaxinfer.__path__[0])
"""


def run(*command: object, **options: Any) -> str:
    """The standard output of a command; a failure shows all that it wrote."""
    words = [str(word) for word in command]
    done = subprocess.run(words, text=True, capture_output=True, check=False, **options)
    assert not done.returncode, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@functools.cache
def tracked() -> tuple[Path, ...]:
    """The files of the repository: all in a clean checkout, in another those git would take."""
    names = run(
        "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT
    ).split("\0")
    return tuple(Path(name) for name in sorted(names) if name and (ROOT / name).is_file())


def shipped() -> set[str]:
    """The paths in a wheel of all files that must be in it."""
    return {
        "/".join([FOLDERS[path.parts[0]], *path.parts[1:]])
        for path in tracked()
        if path.parts[0] in FOLDERS
    }


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository's files, which a build may litter."""
    copy = tmp_path_factory.mktemp("checkout")
    for path in tracked():
        if path.parts[0] in FOLDERS or len(path.parts) == 1:
            (copy / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, copy / path)
    return copy


def environment(folder: Path) -> Path:
    """The interpreter of a new virtual environment that sees this one's packages as well."""
    venv.create(folder, symlinks=True, with_pip=False)
    python = folder / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # A path in a .pth file adds that folder but not its own .pth files, so not jaxinfer itself.
    Path(site, "outer.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return python


def pip(*arguments: object) -> None:
    run(sys.executable, "-m", "pip", *arguments, "--no-deps", "--no-index", "--no-build-isolation")


def probe(python: Path, home: Path, *, installed: bool, path: str = "") -> None:
    """Assert that from an empty folder all of jaxinfer is found, under `home`."""
    empty = python.parent / "empty"
    empty.mkdir()
    script = PROBE.format(installed=installed, folders=tuple(FOLDERS.values()))
    env = {**os.environ, "PYTHONPATH": path}
    said: dict[str, set[str]] = defaultdict(set)
    for line in run(python, "-c", script, cwd=empty, env=env).splitlines():
        key, _, value = line.partition(" ")
        said[key].add(value)
    assert said["file"] == shipped()
    assert said["version"] == {jaxinfer.__version__}
    assert all(Path(path).is_relative_to(home) for path in said["home"])


def test_wheel(checkout: Path, tmp_path: Path) -> None:
    pip("wheel", "--wheel-dir", tmp_path, checkout)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == shipped()
    assert wheel.name == f"jaxinfer-{jaxinfer.__version__}-py3-none-any.whl"

    python = environment(tmp_path / "env")
    pip("--python", python, "install", wheel)
    probe(python, tmp_path, installed=True)


def test_editable_install(checkout: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "env")
    pip("--python", python, "install", "--editable", checkout)
    probe(python, checkout, installed=True)


def test_bare_checkout(checkout: Path, tmp_path: Path) -> None:
    probe(environment(tmp_path / "env"), checkout, installed=False, path=str(checkout))


def test_sdist_holds_the_sources(checkout: Path, tmp_path: Path) -> None:
    build = "import sys, setuptools.build_meta as b; b.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, tmp_path, cwd=checkout)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    sources = {p.as_posix() for p in tracked() if p.parts[0] in FOLDERS}
    assert sources | {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_packages_are_every_folder_with_python() -> None:
    folders = {path.parent for path in tracked() if path.suffix == ".py"}
    expected = {
        ".".join([FOLDERS[folder.parts[0]], *folder.parts[1:]]).replace("/", ".")
        for folder in folders
        if folder.parts and folder.parts[0] in FOLDERS
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == expected


def fresh(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a new process that finds jaxinfer in this checkout."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *options, *(["-c", script] if script else [])]
    return subprocess.run(command, text=True, capture_output=True, env=env, check=True)


def test_import_is_lazy() -> None:
    script = """
import sys, jaxinfer
heavy = {"jax", "jaxlib", "flax", "numpy", "tokenizers"}
print(sorted(heavy & set(sys.modules)), set(jaxinfer.__all__) <= set(dir(jaxinfer)))
jaxinfer.SamplingParams, jaxinfer.EngineConfig, jaxinfer.RequestOutput
print("jax" in sys.modules)
try:
    jaxinfer.nothing
except AttributeError as error:
    print(error)
"""
    assert fresh(script).stdout.splitlines() == [
        "[] True",
        "False",
        "module 'jaxinfer' has no attribute 'nothing'",
    ]


def test_public_names_exist() -> None:
    assert [name for name in jaxinfer.__all__ if not hasattr(jaxinfer, name)] == []


@pytest.mark.parametrize("module", HOST_MODULES)
def test_host_modules_import_no_jax(module: str) -> None:
    script = f"import sys, jaxinfer.{module}; print(sorted({{'jax', 'flax'}} & set(sys.modules)))"
    assert fresh(script).stdout == "[]\n"


def test_help_loads_no_jax() -> None:
    done = fresh("", "-X", "importtime", "-m", "jaxinfer", "--help")
    assert "generate" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "jaxinfer" in imported
    assert {"jax", "flax"} & imported == set()


def test_each_dependency_is_declared() -> None:
    project = PROJECT["project"]
    declared = [*project["dependencies"]]
    for name, extra in project["optional-dependencies"].items():
        declared += extra if name in ("hub", "train", "compare") else []
    names = {re.split(r"[^\w-]", line)[0].lower() for line in declared}
    used = {
        name.partition(".")[0]
        for path in sources()
        for name in imports(path)
        if name.partition(".")[0] not in sys.stdlib_module_names
    }
    assert {DISTRIBUTIONS.get(name, name).lower() for name in used} - names == {"jaxinfer"}


def sources() -> Iterator[Path]:
    yield from (p for p in tracked() if p.suffix == ".py" and p.parts[0] in FOLDERS)


@functools.cache
def imports(path: Path) -> tuple[str, ...]:
    """Every module that a file imports, at its top or within; `from a import b` gives a.b."""
    names = []
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(names)


def word(parts: tuple[str, ...]) -> str:
    """The name in MAY_IMPORT of `("jaxinfer", "models", "decoder")`, of `("jaxinfer", "LLM")`."""
    if parts[0] != "jaxinfer" or len(parts) == 1:
        return parts[0]
    return jaxinfer._HOME.get(parts[1], parts[1]).removeprefix("jaxinfer.")


def reachable(module: str) -> set[str]:
    """All that MAY_IMPORT lets a module import, itself included."""
    below = MAY_IMPORT[module].split()
    return {module}.union(*(reachable(lower) for lower in below))


def test_imports_point_one_way() -> None:
    wrong = []
    for path in sources():
        module = word(path.with_suffix("").parts)
        if module == "__init__":  # jaxinfer/__init__.py: names for type checkers only
            continue
        assert module in MAY_IMPORT, f"{path}: give {module!r} its line in MAY_IMPORT"
        allowed = {"jaxinfer", "__version__", *reachable(module)}
        names = [name.split(".") for name in imports(path)]
        wrong += [
            f"{path} imports {'.'.join(name)}"
            for name in names
            if name[0] == "jaxinfer" and word(tuple(name)) not in allowed
        ]
        # These would be second copies of the modules, with pytree classes of their own.
        wrong += [
            f"{path} imports {'.'.join(name)} for jaxinfer.{name[0]}"
            for name in names
            if name[0] in FOLDERS and name[0] != "jaxinfer"
        ]
    assert wrong == []


def test_import_table_names_modules_that_exist() -> None:
    modules = {word(path.with_suffix("").parts) for path in sources()}
    assert modules - {"__init__"} == set(MAY_IMPORT)


def test_no_module_is_a_drawer() -> None:
    drawers = {"utils", "util", "common", "base", "manager", "helpers", "misc"}
    assert [str(path) for path in sources() if path.stem in drawers] == []
