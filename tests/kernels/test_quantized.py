"""The quantised formats of weights against NumPy and ml_dtypes."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxinfer.errors import ConfigError, ShapeError
from jaxinfer.kernels.quantized import (
    FORMATS,
    LARGEST,
    STORED,
    Quantized,
    bytes_of,
    dequantize,
    quantize,
    quantize_activations,
)

# Two experts; a column of zeros, one of a single number, one far smaller than the rest.
WEIGHT = np.random.default_rng(0).normal(size=(2, 256, 160)).astype(np.float32)
WEIGHT[0, :, 3] = 0
WEIGHT[1, :, 4] = 0.37
WEIGHT[1, :, 5] *= 1e-4

# Root mean square of the error on normally distributed numbers, as a share of theirs.
ERROR = {
    "fp8": 0.027, "fp8_block": 0.027, "int8": 0.0075, "w8a16": 0.0075, "w4a16": 0.12,
    "nvfp4": 0.097, "mxfp4": 0.118,
}  # fmt: skip


def test_the_largest_numbers_are_those_of_the_formats():
    for name in ("float8_e4m3fn", "float4_e2m1fn"):
        assert LARGEST[name] == float(ml_dtypes.finfo(name).max)
    assert LARGEST["int8"] == np.iinfo(np.int8).max
    assert LARGEST["int4"] == ml_dtypes.iinfo("int4").max
    assert {form.values for form in FORMATS.values()} == set(LARGEST)


def numbers(stored: Quantized) -> tuple[np.ndarray, np.ndarray]:
    """Values and scales as float64, read from their bits by ml_dtypes."""
    form = FORMATS[stored.format]
    values, scales = np.asarray(stored.values), np.asarray(stored.scales)
    if form.values == "float4_e2m1fn":
        values = values.astype(np.uint8) & 15
    return (
        values.view(form.values).astype(np.float64),
        scales.view(form.scales).astype(np.float64),
    )


def by_hand(stored: Quantized) -> np.ndarray:
    """What is stored times its scale, element by element of the blocks, in float64."""
    values, scales = numbers(stored)
    if stored.tensor_scale is not None:
        scales = scales * np.asarray(stored.tensor_scale, np.float64)
    rows = np.arange(values.shape[1]) // stored.rows
    columns = np.arange(values.shape[2]) // stored.columns
    return values * scales[:, rows][:, :, columns]


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_stored_times_its_scale_is_near_the_weight(name):
    stored = quantize(jnp.asarray(WEIGHT), name)
    form = FORMATS[name]
    assert stored.values.dtype == STORED.get(form.values, form.values)
    assert stored.scales.dtype == STORED.get(form.scales, form.scales)
    want = by_hand(stored)
    np.testing.assert_allclose(np.asarray(dequantize(stored, jnp.float32)), want, rtol=1e-6)
    error = np.sqrt(np.mean((want - WEIGHT) ** 2) / np.mean(WEIGHT**2))
    assert ERROR[name] / 2 < error < ERROR[name]
    assert not want[0, :, 3].any()
    assert np.abs(numbers(stored)[0]).max() == LARGEST[form.values], (
        "the range of the format is used"
    )


@pytest.mark.parametrize("name", FORMATS)
def test_values_are_the_nearest_of_the_format(name):
    stored = quantize(jnp.asarray(WEIGHT), name)
    dtype = np.dtype(FORMATS[name].values)
    if dtype.name.startswith("float"):
        every = np.arange(2 ** ml_dtypes.finfo(dtype).bits, dtype=np.uint8).view(dtype)
        every = every.astype(np.float64)
        every = every[np.isfinite(every)]
    else:
        every = np.arange(-LARGEST[dtype.name], LARGEST[dtype.name] + 1)
    ones = {"float4_e2m1fn": 2}.get(dtype.name, 1)  # the bits of one
    scale = by_hand(dataclasses.replace(stored, values=jnp.full_like(stored.values, ones)))[
        ..., :40
    ]
    exact = WEIGHT[..., :40] / scale
    nearest = np.min(np.abs(exact[..., None] - every), axis=-1)
    distance = np.abs(exact - numbers(stored)[0][..., :40])
    np.testing.assert_allclose(distance, nearest, atol=1e-4 * LARGEST[dtype.name])


def test_mxfp4_scales_are_those_of_the_standard():
    """OCP MX 1.0, section 6.3: the power of two of the peak over that of 6, the largest value."""
    peaks = np.array([6.0, 7.9, 4.0, 3.9, 1.0, 0.9, 2.0**-100, 96.0], np.float32)
    weight = np.zeros((32, 8), np.float32)
    weight[5] = peaks
    stored = quantize(jnp.asarray(weight), "mxfp4")
    want = 2.0 ** (np.floor(np.log2(peaks)) - 2)
    values, scales = (part[0] for part in numbers(jax.tree.map(lambda a: a[None], stored)))
    np.testing.assert_array_equal(scales[0], want)
    np.testing.assert_array_equal(values[5], [6, 6, 4, 6, 4, 6, 4, 6])


def test_four_bits_take_half_a_byte_on_disk_and_in_bytes_of():
    shape = (3, 256, 160)
    for name, form in FORMATS.items():
        stored = jax.eval_shape(lambda w, name=name: quantize(w, name), jnp.zeros(shape))
        bits = 4 if form.values in ("int4", "float4_e2m1fn") else 8
        want = stored.values.size * bits // 8 + stored.scales.size * stored.scales.dtype.itemsize
        want += 0 if stored.tensor_scale is None else 4 * 3
        assert bytes_of(name, shape) == want, name


@pytest.mark.parametrize("name", [name for name in FORMATS if FORMATS[name].activations])
def test_activations_keep_their_own_scale(name):
    x = np.random.default_rng(1).normal(size=(4, 256)).astype(np.float32)
    x[1] *= 1e-3
    x[2] = np.nan
    x[3] = 0
    values, scale = (np.asarray(a) for a in quantize_activations(jnp.asarray(x), name))
    groups = 256 // FORMATS[name].rows if FORMATS[name].rows else 1
    assert scale.shape == (4, groups)
    restored = values.astype(np.float32) * np.repeat(scale, 256 // groups, axis=1)
    for token in (0, 1):
        error = np.sqrt(np.mean((restored[token] - x[token]) ** 2) / np.mean(x[token] ** 2))
        assert error < ERROR[name] * 1.3
    assert not restored[3].any()
    assert np.isfinite(restored[[0, 1, 3]]).all()


def test_what_cannot_be_is_named():
    with pytest.raises(ConfigError, match="no format 'int3'; there are fp8, "):
        quantize(jnp.ones((4, 4)), "int3")
    with pytest.raises(
        ShapeError, match="w4a16 scales blocks of 128 inputs, but the weight has 192"
    ):
        quantize(jnp.ones((192, 4)), "w4a16")
