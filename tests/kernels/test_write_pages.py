"""The quantised formats of a pool against NumPy and ml_dtypes; what is written and how."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxinfer.kernels import cases
from jaxinfer.kernels.write_pages import LARGEST, quantize, unpack, write_pages
from tests.kernels.ragged import Batch

VALUES = np.random.default_rng(0).normal(size=(5, 3, 8)).astype(np.float32)
VALUES[1, 2] = 0
VALUES[2] *= 1e-34  # its scale would be no normal number
VALUES[3, 0] = [-7, -6, -1, 0, 1, 2, 6, 7]


def test_the_largest_numbers_are_those_of_the_formats():
    for name in ("float8_e4m3fn", "float8_e5m2"):
        assert LARGEST[name] == float(ml_dtypes.finfo(name).max)
    assert LARGEST["int8"] == np.iinfo(np.int8).max
    assert LARGEST["uint8"] == ml_dtypes.iinfo("int4").max


@pytest.mark.parametrize(("dtype", "step"), [("int8", 127), ("uint8", 7)])
def test_integers_round_to_the_nearest(dtype, step):
    stored, scale = map(np.asarray, quantize(jnp.asarray(VALUES), dtype))
    peak = np.abs(VALUES).max(-1)
    whole = np.asarray(unpack(jnp.asarray(stored), jnp.float32))
    restored = whole * scale[..., None]
    assert np.abs(whole).max() == step
    assert (
        np.abs(restored - VALUES) <= np.maximum(peak, 1e-30)[..., None] / step / 2 * 1.001
    ).all()
    assert (scale > 0).all()


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_floats_round_as_ml_dtypes_does(dtype):
    stored, scale = quantize(jnp.asarray(VALUES), dtype)
    want = (VALUES / np.asarray(scale)[..., None]).astype(dtype)
    np.testing.assert_array_equal(np.asarray(stored).view(np.uint8), want.view(np.uint8))


def test_four_bits_lie_two_in_a_byte():
    stored, scale = quantize(jnp.asarray(VALUES[3, 0]), "uint8")
    assert scale == 1
    assert np.asarray(stored).tolist() == [0x19, 0x2A, 0x6F, 0x70]
    want = np.array([-7, -6, -1, 0, 1, 2, 6, 7]).astype(ml_dtypes.int4)
    np.testing.assert_array_equal(np.asarray(unpack(stored, jnp.float32)), want.astype(np.float32))


@pytest.mark.parametrize("stored", ["bfloat16", "int8", "uint8"])
def test_padding_is_written_nowhere(stored):
    batch = Batch.of(cases.Case(cases.ROWS["mixed"], K=2, G=1, H=64, S=16, stored=stored), scale=1)
    before = jax.tree.map(np.ones_like, batch.before)
    real, rows = int(batch.rows.num_tokens), batch.rows
    changed = np.zeros(before.shape[0::2], bool)  # [P, S]
    positions_T = np.asarray(rows.positions_T)[:real]
    pages_T = np.asarray(rows.page_table_BM)[np.asarray(rows.rows_T)[:real], positions_T // 16]
    changed[pages_T, positions_T % 16] = True
    after = jax.jit(write_pages)(before, batch.k_new, batch.v_new, rows)
    assert real < len(batch.k_new)
    for one, other in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        differs = np.asarray(one).view(np.uint8) != other.view(np.uint8)
        assert not differs.reshape(*one.shape[:3], -1).any((1, 3))[~changed].any()


def test_the_compiler_knows_that_no_two_tokens_meet():
    """Else each number is stored by a loop of atomic exchanges on GPUs."""
    batch = Batch.of(cases.SMALL[next(iter(cases.SMALL))], scale=1)
    text = jax.jit(write_pages).lower(batch.before, batch.k_new, batch.v_new, batch.rows).as_text()
    assert text.count('"stablehlo.scatter"(') == text.count("unique_indices = true") > 0
