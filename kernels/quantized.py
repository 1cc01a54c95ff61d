"""Quantised weights: the formats, as data, and how a weight gets into them and out again.

A weight is `[…, D, F]`: D is summed over, F comes out, and what stands before (experts) are weights
of their own.  It is cut into blocks of some D by some F; what is stored times the scale of its
block is the value.

| format    | values        | scales, and the block of one          | activations become     |
|-----------|---------------|---------------------------------------|------------------------|
| fp8       | float8_e4m3fn | float32, all D × 1                    | fp8, a scale per token |
| fp8_block | float8_e4m3fn | float32, 128 × 128 (arXiv:2412.19437) | fp8, one per 128 of it |
| int8      | int8          | float32, all D × 1                    | int8, one per token    |
| w8a16     | int8          | float32, all D × 1                    | what they are          |
| w4a16     | int4          | bfloat16, 128 × 1                     | what they are          |
| nvfp4     | float4_e2m1fn | float8_e4m3fn, 16 × 1, times one      | what they are          |
|           |               | float32 for the whole weight          |                        |
| mxfp4     | float4_e2m1fn | float8_e8m0fnu, 32 × 1 (OCP MX 1.0)   | what they are          |

Four-bit values are int4 arrays, which XLA packs two in a byte on every platform, and the scales of
mxfp4 uint8 arrays; of float4 and of powers of two they hold the bits.  Chips whose compilers do not
know those dtypes (Hopper, most TPUs) then need no more than arithmetic.

On NVIDIA GPUs the values of fp8 and int8 lie in memory with D innermost: their matrix units (before
Blackwell) multiply 8-bit numbers in no other order.  Whoever makes or loads a weight asks
`values_layout`.

A scale is the largest magnitude in the block over the largest number of the format, except that
mxfp4 takes the power of two that OCP MX 1.0 (section 6.3) prescribes: values above six saturate.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax
from jax.experimental.layout import Layout

from jaxinfer.errors import ConfigError, ShapeError
from jaxinfer.shapes import Leaf

# In which arrays the bits of numbers lie that not every chip knows.
STORED = {"float4_e2m1fn": "int4", "float8_e8m0fnu": "uint8"}
# Largest magnitude of each number format.
LARGEST = {"float8_e4m3fn": 448.0, "int8": 127.0, "int4": 7.0, "float4_e2m1fn": 6.0}
# A block without a larger magnitude than this is as good as zero; its scale must not be.
SMALLEST = 1e-30


@dataclass(frozen=True)
class Format:
    """How a weight is stored, and what becomes of the activations it meets.

    values, scales: the numbers; `STORED` has the dtype of the arrays where it is another.
    rows, columns: the size of a block along D and F; 0 for the whole axis.
    activations: the dtype that activations are quantised to, with a scale for every `rows` of each
        token; None: they stay as they are.
    tensor_scale: the scales are themselves stored times one float32 for the whole weight.
    """

    values: str
    scales: str
    rows: int = 0
    columns: int = 1
    activations: str | None = None
    tensor_scale: bool = False

    @property
    def as_stored(self) -> bool:
        """Whether the values are multiplied as they are stored, with activations of that dtype."""
        return self.activations is not None and not self.rows


FORMATS = {
    "fp8": Format("float8_e4m3fn", "float32", activations="float8_e4m3fn"),
    "fp8_block": Format("float8_e4m3fn", "float32", 128, 128, activations="float8_e4m3fn"),
    "int8": Format("int8", "float32", activations="int8"),
    "w8a16": Format("int8", "float32"),
    "w4a16": Format("int4", "bfloat16", 128),
    "nvfp4": Format("float4_e2m1fn", "float8_e4m3fn", 16, tensor_scale=True),
    "mxfp4": Format("float4_e2m1fn", "float8_e8m0fnu", 32),
}


@struct.dataclass
class Quantized:
    """A weight `[…, D, F]` in one of `FORMATS`.

    values: `[…, D, F]`.  scales: `[…, D / rows, F / columns]`, the latter rounded up.
    tensor_scale: float32 `[…, 1, 1]`, None unless the format has one.
    """

    values: Leaf
    scales: Leaf
    tensor_scale: Leaf | None
    format: str = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def rows(self) -> int:
        """How many D share a scale."""
        return format_of(self.format).rows or self.shape[-2]

    @property
    def columns(self) -> int:
        """How many F share a scale."""
        return format_of(self.format).columns


def stacked(weight: Quantized) -> Quantized:
    """The weight `[D, F]` as a stack `[1, D, F]` of one."""
    return jax.tree.map(lambda leaf: leaf[None], weight)


def format_of(name: str) -> Format:
    """The format of that name.  Raises `ConfigError`."""
    if name not in FORMATS:
        raise ConfigError(f"quantization: no format {name!r}; there are {', '.join(FORMATS)}")
    return FORMATS[name]


def values_layout(weight: Any, platform: str) -> Layout | None:
    """In which order of axes the values of a `Quantized` weight, abstract or not, are to lie in
    memory on a platform ("gpu", "tpu" or "cpu"), for all operations; None: in XLA's usual one.

    What multiplies then moves nothing; from any other order it copies the values first, in each
    call.  The logical shape stays `[…, D, F]`: the layout is part of an array's format, which
    `jax.device_put`, `jax.jit` and `jax.ShapeDtypeStruct` take in place of a sharding:

        jax.device_put(weight.values, Format(values_layout(weight, "gpu"), sharding))
    """
    if platform != "gpu" or not format_of(weight.format).as_stored:
        return None
    *outer, depth, width = range(len(weight.shape))
    return Layout((*outer, width, depth))


def quantize(weight: Array, name: str) -> Quantized:
    """A weight `[…, D, F]` in the named format.

    Raises `ShapeError` if D is no multiple of the block's rows, `ConfigError` for unknown formats.
    """
    form = format_of(name)
    *outer, depth, width = weight.shape
    rows = form.rows or depth
    if depth % rows:
        raise ShapeError(f"{name} scales blocks of {rows} inputs, but the weight has {depth}")
    weight = weight.astype(jnp.float32)
    # The last blocks along F may be narrower.
    padded = [(0, 0)] * (weight.ndim - 1) + [(0, -width % form.columns)]
    blocks = jnp.pad(weight, padded).reshape(*outer, depth // rows, rows, -1, form.columns)
    peak = jnp.max(jnp.abs(blocks), axis=(-3, -1))
    if form.scales == "float8_e8m0fnu":
        # The peak's power of two over that of the largest number, 6 = 1.5 · 2².
        exponent = jnp.frexp(peak)[1] - 1 - 2
        scales = jnp.ldexp(jnp.float32(1), jnp.clip(exponent, -126, 127))
    else:
        scales = jnp.maximum(peak, SMALLEST) / LARGEST[form.values]
    tensor_scale = None
    if form.tensor_scale:
        tensor_scale = jnp.max(scales, axis=(-2, -1), keepdims=True) / LARGEST[form.scales]
        # Below the smallest number that e4m3 holds the scale would be zero.
        scales = jnp.maximum(scales / tensor_scale, 2.0**-9)
    stored = Quantized(weight, _bits(scales.astype(form.scales)), tensor_scale, name)
    scaled = weight / spread_scales(stored, jnp.float32)
    return dataclasses.replace(stored, values=_bits(cast(scaled, form.values)))


def cast(values: Array, dtype: Any) -> Array:
    """Numbers in another dtype: the nearest, ties to even, the largest for what lies beyond."""
    dtype = jnp.dtype(dtype)
    values = jnp.clip(values, -LARGEST[dtype.name], LARGEST[dtype.name])
    return (jnp.round(values) if dtype.name.startswith("int") else values).astype(dtype)


def _bits(numbers: Array) -> Array:
    stored = STORED.get(numbers.dtype.name)
    return numbers if stored is None else lax.bitcast_convert_type(numbers, stored)


def read_values(values: Array, name: str, dtype: Any = jnp.float32) -> Array:
    """Stored values of the named format as numbers; all are exact in bfloat16 and wider.

    The magnitudes of float4, 0, ½, 1, 1½, 2, 3, 4 and 6, are three straight lines over the three
    lower bits, each above the others where it holds.
    """
    numbers = values.astype(dtype)
    if FORMATS[name].values != "float4_e2m1fn":
        return numbers
    bits = jnp.where(numbers < 0, numbers + 8, numbers)
    magnitude = jnp.maximum(jnp.maximum(bits * 0.5, bits - 2), bits * 2 - 8)
    return jnp.where(numbers < 0, -magnitude, magnitude)


def read_scales(scales: Array, name: str) -> Array:
    """Stored scales of the named format as float32 numbers; those of mxfp4 are biased exponents."""
    if FORMATS[name].scales != "float8_e8m0fnu":
        return scales.astype(jnp.float32)
    return lax.bitcast_convert_type(scales.astype(jnp.int32) << 23, jnp.float32)


def spread_scales(weight: Quantized, dtype: Any) -> Array:
    """The scale of every value, `[…, D, F]` (`[…, 1, F]` if all D share one)."""
    scales = read_scales(weight.scales, weight.format)
    if weight.tensor_scale is not None:
        scales *= weight.tensor_scale
    scales = scales.astype(dtype)
    if weight.columns > 1:
        scales = jnp.repeat(scales, weight.columns, axis=-1)[..., : weight.shape[-1]]
    return scales if scales.shape[-2] == 1 else jnp.repeat(scales, weight.rows, axis=-2)


def dequantize(weight: Quantized, dtype: Any) -> Array:
    """The weight `[…, D, F]` that the numbers stand for, rounded to `dtype`."""
    numbers = read_values(weight.values, weight.format)
    return (numbers * spread_scales(weight, jnp.float32)).astype(dtype)


def quantize_activations(x_TD: Array, name: str) -> tuple[Array, Array]:
    """Activations in the format's dtype, and their scales: float32 `[T, 1]`, or `[T, D / rows]`.

    Padding tokens may hold anything, and a NaN changes no other token.  In int8 it may leave no
    trace in its own: on CPU, XLA's maximum passes over it.
    """
    form = format_of(name)
    assert form.activations is not None, name
    tokens, depth = x_TD.shape
    groups = depth // form.rows if form.rows else 1
    x = x_TD.astype(jnp.float32).reshape(tokens, groups, -1)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1), SMALLEST) / LARGEST[form.activations]
    return cast(x / scale[..., None], form.activations).reshape(x_TD.shape), scale


def bytes_of(name: str, shape: tuple[int, ...]) -> int:
    """Bytes that a weight `[…, D, F]` takes, scales included."""
    form = format_of(name)
    *outer, depth, width = shape
    bits = 4 if STORED.get(form.values, form.values) == "int4" else 8
    scales = -(-depth // (form.rows or depth)) * -(-width // form.columns)
    each = depth * width * bits // 8 + scales * jnp.dtype(form.scales).itemsize
    return math.prod(outer) * (each + 4 * form.tensor_scale)
