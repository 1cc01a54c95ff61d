"""Where kernels' blocks come from: a file for the chip, or the heuristic."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from jaxinfer.errors import ConfigError, ShapeError
from jaxinfer.kernels import blocks, cases
from jaxinfer.kernels.grouped_matmul_tpu import Blocks, grouped_matmul
from tests.kernels.groups import build
from tests.kernels.tpu_interpreter import parameters, run


@dataclass(frozen=True)
class Two:
    wide: int
    deep: int


KEY = {"K": 2, "stored": "int8", "window": None}
ENTRY = {
    "op": "paged_attention", "cases": ["paged_attention: a case"], "key": KEY,
    "blocks": {"wide": 3, "deep": 4},
    "microseconds": 2.5, "gb_per_s": 10.0, "tflop_per_s": 0.5,
    "heuristic": {"wide": 1, "deep": 1}, "heuristic_microseconds": 4.0, "tried": 7, "refused": [],
    "date": "2026-01-01", "versions": {"jax": "0.0"},
}  # fmt: skip


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """A function that writes the file of the chip "h100", with changes to the only entry."""
    monkeypatch.setattr(blocks, "TUNED", tmp_path)

    def write(**changes):
        contents = {"chip": "h100", "device_kind": "some H100", "entries": [{**ENTRY, **changes}]}
        (tmp_path / "h100.yaml").write_text(yaml.safe_dump(contents))
        return tmp_path / "h100.yaml"

    return write


def chosen(chip="h100", key=KEY, op="paged_attention", check=lambda two: None):
    return blocks.choose(op, chip, key, Two, check, lambda: Two(1, 1))


def test_an_entry_serves_its_own_key_and_chip_only(tuned):
    assert chosen() == Two(1, 1), "there is no file yet"
    tuned()
    assert chosen() == Two(3, 4)
    assert chosen(chip=None) == chosen(chip="h200") == Two(1, 1)
    assert chosen(key={**KEY, "K": 4}) == chosen(key={**KEY, "window": 5}) == Two(1, 1)
    assert chosen(op="grouped_matmul") == Two(1, 1)


def test_a_file_that_changed_is_read_again(tuned):
    tuned()
    assert chosen() == Two(3, 4)
    tuned(blocks={"wide": 5, "deep": 6})
    assert chosen() == Two(5, 6)


def refuse(two):
    raise ShapeError(f"{two} is too wide")


@pytest.mark.parametrize(
    ("changes", "check", "words"),
    [
        ({}, refuse, "is too wide; delete the entry, or tune it again: .* --op paged_attention"),
        ({"blocks": {"wide": 3}}, lambda two: None, "missing 1 required .*argument: 'deep'"),
        ({"blocks": {"wide": 3, "deep": 4, "x": 1}}, lambda two: None, "'x'"),
        ({"blocks": {"wide": "3", "deep": 4}}, lambda two: two.wide > 2, "'>' not supported"),
    ],
)
def test_blocks_that_do_not_fit_are_refused_by_name(tuned, changes, check, words):
    path = tuned(**changes)
    with pytest.raises(
        ConfigError, match=f"{path}: the blocks of paged_attention: a case.*{words}"
    ):
        chosen(check=check)


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        ({"entries": []}, "chip is missing"),
        ({"chip": "h200", "device_kind": "x", "entries": []}, "chip must be 'h100'"),
        ({"chip": "h100", "device_kind": "x", "entries": 3}, "entries must be a list"),
        (
            {"chip": "h100", "device_kind": "x", "entries": [{"op": 1}]},
            "entry 1: op must be of type",
        ),
        ({"chip": "h100", "device_kind": "x", "entries": [], "speed": 1}, "speed"),
    ],
)
def test_an_unsound_file_is_refused(tuned, contents, words):
    path = tuned()
    path.write_text(yaml.safe_dump(contents))
    with pytest.raises(ConfigError, match=words):
        chosen()


def test_the_files_of_the_package_are_sound():
    """There are none as long as nobody tuned on a device."""
    for path in blocks.TUNED.glob("*.yaml"):
        assert blocks.read(path).entries, path
        assert blocks.read(path).trying is None, f"{path}: a sweep was not finished"


def test_a_kernel_takes_what_the_file_says(tuned):
    """Tiles of 8 tokens instead of the heuristic's 32: as many visits more in the program."""
    case = cases.SMALL_PRODUCTS["many-bfloat16-256x128"]
    x, weight, sizes = build(case, jnp.bfloat16)

    def product(chip, **options):
        return run(
            lambda *a: grouped_matmul(
                *a, vmem_bytes=2**24, chip=chip, interpret=parameters(), **options
            ),
            x, weight, sizes,
        )  # fmt: skip

    def grid(chip):
        traced = jax.make_jaxpr(lambda *a: grouped_matmul(*a, vmem_bytes=2**24, chip=chip))
        return str(traced(x, weight, sizes))

    key = blocks.product_key(x, weight)
    assert key["tokens"] == 256, "141 of them, rounded up"
    tuned(op="grouped_matmul", key=key, blocks={"tokens": 8, "depth": 128, "width": 128})
    assert grid("h100") != grid(None)
    explicit = product(None, blocks=Blocks(8, 128, 128))
    np.testing.assert_array_equal(np.asarray(product("h100")), np.asarray(explicit))
    tuned(op="grouped_matmul", key=key, blocks={"tokens": 9, "depth": 128, "width": 128})
    with pytest.raises(ConfigError, match="tokens must be a multiple of 8"):
        grid("h100")
    tuned(op="grouped_matmul", key=key, blocks={"tokens": 2**16, "depth": 256, "width": 128})
    with pytest.raises(ConfigError, match="bytes do not fit 16777216"):
        grid("h100")
