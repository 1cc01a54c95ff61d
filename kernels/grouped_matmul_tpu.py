"""Grouped products on TPU (Pallas, Mosaic): see `grouped_matmul` for the contract.

The grid is (blocks of F, visits, blocks of D).  The number of visits is data, so experts without
tokens cost nothing.  A block of a weight is read once for each visit, in the dtype that it is
stored in, and becomes bfloat16 in fast memory.  The visits of one tile follow each other and find
its output still there, to add their own tokens' rows to.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxinfer.errors import ShapeError
from jaxinfer.kernels import blocks as tuned
from jaxinfer.kernels.grouped_matmul import Visits, finish, visits
from jaxinfer.kernels.quantized import Quantized
from jaxinfer.kernels.quantized_matmul import activations
from jaxinfer.kernels.stored import Stored, stored
from jaxinfer.shapes import dims

LANES = 128
# Rows that a register of 32-bit numbers has; of narrower ones it has as many more.
SUBLANES = 8
# Numbers in a block of a weight: conversions are unrolled, larger ones compile for half a minute.
MOST_NUMBERS = 2**21


@dataclass(frozen=True)
class Blocks:
    """How the work is cut: tokens of a tile, depth (along D) and width (along F) of a weight's
    block."""

    tokens: int
    depth: int
    width: int


def block_sizes(x_TD: Any, weight: Any, *, vmem_bytes: int) -> Blocks:
    """Block sizes for arrays of these shapes and dtypes, on a chip with these many bytes of vector
    memory.  Raises `ShapeError` if nothing fits.

    A tile has about twice the tokens that an expert gets on average: fewer read the weight more
    often, more multiply rows that are another expert's.
    """
    (num_tokens, D), (E, _, F) = x_TD.shape, weight.shape
    tokens = max(32, min(512, 1 << (num_tokens // E).bit_length()))
    form = jax.eval_shape(stored, weight)
    for width in (1024, 512, 256, 128):
        width = min(width, F)
        for depth in block_depths(D, form):
            blocks = Blocks(tokens, depth, width)
            quick = depth * width <= MOST_NUMBERS or width <= LANES
            if quick and vmem_needed(blocks, form) <= vmem_bytes:
                return blocks
    raise ShapeError(f"weight {weight.shape}: no block of it fits {vmem_bytes} bytes")


def block_depths(D: int, form: Stored) -> list[int]:
    """Block depths that memory tiles allow, largest first."""
    unit = LANES
    if form.scales is not None and form.grouped:
        unit = form.rows * SUBLANES * 4 // form.scales.dtype.itemsize
    return [D, *(depth for depth in range(D // unit * unit, 0, -unit) if D % depth == 0)]


def check_blocks(blocks: Blocks, weight: Any, *, vmem_bytes: int) -> None:
    """Raise `ShapeError` unless blocks are for weights of such a shape on such a chip."""
    _, D, F = weight.shape
    form = jax.eval_shape(stored, weight)
    needed = vmem_needed(blocks, form)
    tuned.require(
        {
            f"tokens must be a multiple of {SUBLANES}": blocks.tokens > 0
            and blocks.tokens % SUBLANES == 0,
            f"depth must be one of {block_depths(D, form)}": blocks.depth in block_depths(D, form),
            f"width must be F = {F} or a multiple of {LANES}": blocks.width == F
            or (0 < blocks.width < F and blocks.width % LANES == 0),
            f"{needed} bytes do not fit {vmem_bytes}": needed <= vmem_bytes,
        },
        blocks,
    )


def vmem_needed(blocks: Blocks, form: Stored) -> int:
    """Bytes of fast memory: blocks coming and going in pairs, the sums, and a block in bfloat16."""
    weight = blocks.depth * blocks.width
    scale_rows = blocks.depth // form.rows if form.grouped else SUBLANES
    arriving = blocks.tokens * blocks.depth * 2 + weight * form.bits // 8
    arriving += scale_rows * blocks.width * 4
    wide = weight * 6 if form.bits < 16 else 0  # in bfloat16, and halfway there in float32
    return 2 * arriving + 3 * blocks.tokens * blocks.width * 4 + wide


def grouped_matmul(
    x_TD: Array,
    weight: Array | Quantized,
    group_sizes_E: Array,
    *,
    vmem_bytes: int,
    blocks: Blocks | None = None,
    chip: str | None = None,
    fp8_products: bool = False,
    interpret: Any = False,
) -> Array:
    """`grouped_matmul.grouped_matmul` as a kernel.

    vmem_bytes: of the chip.  fp8_products: whether it multiplies fp8 (TPU7x); if not, bfloat16,
    which holds the same numbers, is multiplied.  blocks: by default as tuned for the chip (the name
    of its sheet), else `block_sizes`.
    """
    sizes = dims(x_TD=x_TD, weight_EDF=weight, group_sizes_E=group_sizes_E)
    blocks = blocks or tuned.choose(
        "grouped_matmul",
        chip,
        tuned.product_key(x_TD, weight),
        Blocks,
        lambda blocks: check_blocks(blocks, weight, vmem_bytes=vmem_bytes),
        lambda: block_sizes(x_TD, weight, vmem_bytes=vmem_bytes),
    )
    x, scale_T1 = activations(x_TD, weight) if isinstance(weight, Quantized) else (x_TD, None)
    if x.dtype == jnp.float8_e4m3fn and not fp8_products:
        x = x.astype(jnp.bfloat16)
    plan = visits(group_sizes_E, sizes["T"], blocks.tokens)
    x = jnp.pad(x, [(0, -sizes["T"] % blocks.tokens), (0, 0)])
    dtype = x_TD.dtype if scale_T1 is None else jnp.float32
    out_TF = _call(x, stored(weight), plan, blocks, dtype, vmem_bytes, interpret)
    return finish(out_TF[: sizes["T"]], scale_T1, group_sizes_E).astype(x_TD.dtype)


def _call(
    x: Array,
    form: Stored,
    plan: Visits,
    blocks: Blocks,
    dtype: Any,
    vmem_bytes: int,
    interpret: Any,
) -> Array:
    """The kernel on whole tiles; rows of no group come out as they were in memory."""
    (num_tokens, D), F = x.shape, form.values.shape[2]
    steps = D // blocks.depth
    scale_rows = blocks.depth // form.rows if form.grouped else 1

    # Index maps get the place in the grid, then the arrays of the plan.
    def at_x(f, v, d, expert, tile, *_):
        return tile[v], d

    def at_weight(f, v, d, expert, *_):
        return expert[v], d, f

    def at_scales(f, v, d, expert, *_):
        return expert[v], d if form.grouped else 0, f

    def at_out(f, v, d, expert, tile, *_):
        return tile[v], f

    body = partial(_body, form=form, steps=steps)
    operands = [x, form.values]
    in_specs = [
        pl.BlockSpec((blocks.tokens, blocks.depth), at_x),
        pl.BlockSpec((None, blocks.depth, blocks.width), at_weight),
    ]
    if form.scales is not None:
        operands.append(form.scales)
        in_specs.append(pl.BlockSpec((None, scale_rows, blocks.width), at_scales))
    whole = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    read = min(form.values.shape[0], plan.expert.shape[0]) * D * F * form.bits // 8
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((num_tokens, F), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(pl.cdiv(F, blocks.width), plan.count, steps),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((blocks.tokens, blocks.width), at_out),
            scratch_shapes=[pltpu.VMEM((blocks.tokens, blocks.width), whole)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=vmem_bytes,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_tokens * D * F,
            bytes_accessed=read + x.nbytes + num_tokens * F * jnp.dtype(dtype).itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name="grouped_matmul",
    )(plan.expert, plan.tile, plan.begin, plan.end, form.tensor_scale, *operands)


def _body(expert, tile, begin, end, tensor_scale, x, values, *rest, form: Stored, steps: int):
    """One block of a weight with one tile.  rest: the scales, if any, the output, the sums."""
    *scales, out, sums = rest
    visit, step = pl.program_id(1), pl.program_id(2)

    @pl.when(step == 0)
    def _():
        sums[...] = jnp.zeros_like(sums)

    weight = form.widen(values[...], scales[0][...] if form.grouped else None, x.dtype)
    sums[...] += jnp.dot(x[...], weight, preferred_element_type=sums.dtype)

    @pl.when(step == steps - 1)
    def _():
        product = sums[...].astype(jnp.float32)
        if scales and not form.grouped:
            product *= scales[0][...]
        product *= tensor_scale[expert[visit]]
        rows, width = product.shape
        position = tile[visit] * rows + lax.broadcasted_iota(jnp.int32, (rows, width), 0)
        mine = (position >= begin[visit]) & (position < end[visit])
        # Selected, not multiplied: what others have not written yet may be NaN.
        out[...] = jnp.where(mine, product.astype(out.dtype), out[...])
