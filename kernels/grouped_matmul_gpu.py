"""Grouped products on NVIDIA GPUs (Pallas, Mosaic GPU): see `grouped_matmul` for the contract.

Thread blocks take (block of F, visit) pairs in turn, as many as there are: their number is data, so
experts without tokens cost nothing.  A block of a weight comes into shared memory as it is stored.
Several thread blocks share an SM: while one converts, another multiplies.  What is multiplied:

* bfloat16 weights, as they are.
* fp8 and int8 (one scale for all D): fp8 with fp8, int8 with int8.  Their values are taken with D
  innermost in memory, as `quantized.values_layout` says: of 8-bit numbers wgmma takes no others.
  If they lie otherwise they are copied first.
* All others: converted to bfloat16 in shared memory, times their scale if it belongs to some of D.
  With the scales of nvfp4 and mxfp4 that is exact; with those of w4a16 and fp8_block it is rounded,
  as the reference does.  Blackwell's block-scaled products of fp4 ask for both operands in that
  format and D innermost, and are not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxinfer.errors import ShapeError
from jaxinfer.kernels import blocks as tuned
from jaxinfer.kernels.gpu import Gpu, load, row_layout
from jaxinfer.kernels.grouped_matmul import finish, visits
from jaxinfer.kernels.grouped_matmul_gpu_units import UNITS
from jaxinfer.kernels.quantized import Quantized, format_of, read_scales, read_values
from jaxinfer.kernels.quantized_matmul import activations
from jaxinfer.kernels.stored import Stored, stored
from jaxinfer.shapes import dims

# Of D in a block: a row of 16-bit numbers is then as long as the widest swizzle.
DEPTH = 64
# Of F in a block, best first for few tokens; one of them must divide F.
WIDTHS = (128, 192, 64, 256)
# Bytes beside the blocks: barriers, and what alignment takes.
REST = 2048


@dataclass(frozen=True)
class Blocks:
    """How the work is cut: tokens of a tile, width (along F) of a weight's block, blocks of D in
    flight, thread blocks that share an SM, and depth (along D) of a weight's block."""

    tokens: int
    width: int
    stages: int
    per_sm: int
    depth: int = DEPTH


def multiplied(weight: Any) -> Any:
    """The dtype of the numbers that the matrix unit multiplies."""
    return jnp.dtype(weight.values.dtype if _as_stored(weight) else jnp.bfloat16)


def _as_stored(weight: Any) -> bool:
    """Whether the weight's values are multiplied as they are stored, and lie with D innermost."""
    return isinstance(weight, Quantized) and format_of(weight.format).as_stored


def block_sizes(x_TD: Any, weight: Any, gpu: Gpu) -> Blocks:
    """Block sizes for arrays of these shapes and dtypes.  Raises `ShapeError` if the shape does not
    divide, or nothing fits.

    Large tiles read everything less often; small ones multiply fewer rows of other experts, and
    narrow blocks share the work of few tokens among more SMs.
    """
    (num_tokens, D), (E, _, F) = x_TD.shape, weight.shape
    if D % DEPTH or F % 64:
        raise ShapeError(f"weight {weight.shape}: D must be a multiple of {DEPTH}, F of 64")
    unit, form = UNITS[gpu.capability[0]], jax.eval_shape(stored, weight)
    operand = multiplied(weight)
    depth = 2 * DEPTH if operand.itemsize == 1 and D % (2 * DEPTH) == 0 else DEPTH
    steps = D // depth
    cuts = [(tokens, width) for tokens in unit.TOKENS for width in WIDTHS if F % width == 0]
    if num_tokens >= 96 * E:
        cuts.sort(key=lambda cut: (cut[0] * cut[1], cut[0]), reverse=True)
    for tokens, width in cuts:
        stage, fixed = _shared_bytes(tokens, width, depth, form, operand)
        for per_sm in (3, 2, 1):
            stages = min((gpu.shared_bytes // per_sm - fixed) // stage, 6, steps)
            if stages >= min(3, steps) and unit.holds(tokens, width, per_sm, operand):
                return Blocks(tokens, width, stages, per_sm, depth)
    raise ShapeError(f"weight {weight.shape}: no block of it fits {gpu.shared_bytes} bytes")


def _shared_bytes(
    tokens: int, width: int, depth: int, form: Stored, operand: Any
) -> tuple[int, int]:
    """Shared memory of a thread block: for each stage, and once."""
    out_bytes = 4 if operand.itemsize == 1 else 2
    stage = depth * (tokens * operand.itemsize + width * form.bits // 8)
    fixed = tokens * width * out_bytes + REST
    if form.values.dtype != operand:
        fixed += depth * width * operand.itemsize
    if form.grouped:
        stage += -(-depth // form.rows) * width * form.scales.dtype.itemsize
    return stage, fixed


def check_blocks(blocks: Blocks, weight: Any, gpu: Gpu) -> None:
    """Raise `ShapeError` unless blocks are for weights of such a shape on such a chip."""
    _, D, F = weight.shape
    unit, form = UNITS[gpu.capability[0]], jax.eval_shape(stored, weight)
    operand = multiplied(weight)
    whole = blocks.depth in (DEPTH, 2 * DEPTH) and D % blocks.depth == 0
    tokens, width, per_sm = blocks.tokens, blocks.width, blocks.per_sm
    stage, fixed = _shared_bytes(tokens, width, blocks.depth, form, operand)
    needed = per_sm * (fixed + blocks.stages * stage)
    tuned.require(
        {
            f"tokens must be one of {unit.TOKENS}": tokens in unit.TOKENS,
            f"width must be one of {WIDTHS} that divides F = {F}": width in WIDTHS
            and F % width == 0,
            f"depth must be {DEPTH} or {2 * DEPTH} and divide D = {D}": whole,
            f"stages must be from 1 to {D // DEPTH}": 1 <= blocks.stages <= D // blocks.depth,
            "per_sm must be at least 1": per_sm >= 1,
            f"{needed} bytes do not fit {gpu.shared_bytes}": needed <= gpu.shared_bytes,
            "the sums are more than a multiprocessor holds": unit.holds(
                tokens, width, per_sm, operand
            ),
        },
        blocks,
    )


def refusal(x_TD: Any, weight: Any, gpu: Gpu) -> str | None:
    """Why the kernel is not for these arrays on such a chip; None if it is."""
    _, D, F = weight.shape
    if gpu.refusal:
        return gpu.refusal
    if x_TD.dtype != jnp.bfloat16:
        return f"it multiplies bfloat16 activations, not {x_TD.dtype}"
    if not isinstance(weight, Quantized) and weight.dtype != jnp.bfloat16:
        return f"it multiplies bfloat16 or quantised weights, not {weight.dtype}"
    if D % DEPTH or F % 64:
        return f"D = {D} is no multiple of {DEPTH} or F = {F} of 64"
    return None


def grouped_matmul(
    x_TD: Array,
    weight: Array | Quantized,
    group_sizes_E: Array,
    *,
    gpu: Gpu,
    blocks: Blocks | None = None,
    chip: str | None = None,
    interpret: Any = False,
) -> Array:
    """`grouped_matmul.grouped_matmul` as a kernel, for arguments that `refusal` passes.

    blocks: by default as tuned for the chip (the name of its sheet), else `block_sizes`.

    Raises `ShapeError` if no block fits.
    """
    sizes = dims(x_TD=x_TD, weight_EDF=weight, group_sizes_E=group_sizes_E)
    T, F = sizes["T"], sizes["F"]
    operand, depth_minor = multiplied(weight), _as_stored(weight)
    form = stored(weight)
    blocks = blocks or tuned.choose(
        "grouped_matmul",
        chip,
        tuned.product_key(x_TD, weight),
        Blocks,
        lambda blocks: check_blocks(blocks, weight, gpu),
        lambda: block_sizes(x_TD, weight, gpu),
    )
    x, scale_T1 = activations(x_TD, weight) if isinstance(weight, Quantized) else (x_TD, None)
    dtype = x_TD.dtype if scale_T1 is None else jnp.float32
    unit = UNITS[gpu.capability[0]]
    shape = (blocks.tokens, blocks.width)
    sums_dtype = jnp.int32 if operand == jnp.int8 else jnp.float32
    scratch = {"out_smem": plgpu.SMEM(shape, dtype), **unit.scratch(shape, sums_dtype)}
    if form.values.dtype != operand:
        scratch["wide_smem"] = plgpu.SMEM((blocks.depth, blocks.width), operand)
    num_blocks = gpu.multiprocessors * blocks.per_sm
    more = -T % 8  # copies take rows by eight

    def body(plan, tensor_scale, x, values, scales, out, **refs):
        multiply = _Multiply(form, blocks, unit, operand, sums_dtype, depth_minor, refs)
        _each_pair(multiply, plan, tensor_scale, x, values, scales, out, num_blocks)

    run = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((T + more, F), dtype),
        grid=(num_blocks,),
        grid_names=("block",),
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
    scales = form.tensor_scale[:, None] if form.scales is None else form.scales
    values = form.values.swapaxes(1, 2) if depth_minor else form.values
    plan = visits(group_sizes_E, T, blocks.tokens)
    x = jnp.pad(x.astype(operand), [(0, more), (0, 0)])
    out_TF = run(plan, form.tensor_scale, x, values, scales)[:T]
    return finish(out_TF, scale_T1, group_sizes_E).astype(x_TD.dtype)


def _each_pair(multiply: _Multiply, plan, tensor_scale, x, values, scales, out, num_blocks: int):
    """One thread block's share of the pairs; all refs are in global memory."""
    form, blocks, out_smem = multiply.form, multiply.blocks, multiply.refs["out_smem"]
    num_visits = plan.count[...]
    num_pairs = num_visits * (out.shape[1] // blocks.width)
    first = lax.axis_index("block")

    @pl.loop(0, lax.div(num_pairs - first + num_blocks - 1, num_blocks))
    def _(turn):
        pair = first + turn * num_blocks
        # Neighbours share a block of F: the visits of one expert then share its weight in L2.
        visit, column = lax.rem(pair, num_visits), lax.div(pair, num_visits) * blocks.width
        expert = plan.expert[visit]
        columns = pl.ds(column, blocks.width)
        where = (expert, columns) if multiply.depth_minor else (expert, slice(None), columns)
        pieces = multiply.sums(
            x.at[pl.ds(plan.tile[visit] * blocks.tokens, blocks.tokens)],
            values.at[where],
            scales.at[expert, :, columns] if form.grouped else None,
        )
        for begin, sums in pieces:
            sums = sums.astype(jnp.float32)
            if form.scales is not None and not form.grouped:
                row = load(
                    scales.at[expert, 0, pl.ds(column + begin, sums.shape[1])], optimized=False
                )
                sums *= lax.broadcast_in_dim(row, sums.shape, (1,))
            piece = out_smem.at[:, pl.ds(begin, sums.shape[1])]
            piece[...] = (sums * tensor_scale[expert]).astype(out_smem.dtype)
        plgpu.commit_smem()
        _store(out_smem, out.at[:, columns], plan, visit, blocks.tokens)


@dataclass(frozen=True)
class _Multiply:
    """A tile of tokens times a block of F of one expert's weight, in one thread block."""

    form: Stored
    blocks: Blocks
    unit: Any
    operand: Any
    sums_dtype: Any
    depth_minor: bool
    refs: dict[str, Any]

    def sums(self, x, values, scales) -> Iterator[tuple[int, Array]]:
        """Pieces of the product, as the unit gives them; refs are in global memory."""
        form, blocks = self.form, self.blocks
        tokens, width, depth = blocks.tokens, blocks.width, blocks.depth
        # What was copied stays for one more step; what was converted, for none.
        lag = int("wide_smem" not in self.refs)
        steps = x.shape[1] // depth
        block, at = ((width, depth), lambda k: (0, k)) if self.depth_minor else (
            (depth, width), lambda k: (k, 0)
        )  # fmt: skip
        specs = [
            plgpu.BlockSpec((tokens, depth), lambda k: (0, k), delay_release=lag),
            plgpu.BlockSpec(block, at, delay_release=lag),
        ]
        arrays = [x, values]
        if scales is not None:
            rows = -(-depth // form.rows)
            specs.append(
                plgpu.BlockSpec((rows, width), lambda k: (k * depth // form.rows // rows, 0))
            )
            arrays.append(scales)

        def pipeline(multiply, carry=None):
            def step(index, x_smem, values_smem, *rest):
                if self.depth_minor:
                    values_smem = values_smem.transpose((1, 0))
                elif not lag:
                    values_smem = self._convert(values_smem, rest[0] if form.grouped else None)
                return multiply(index[0], x_smem, values_smem, *rest[len(specs) - 2 :])

            return plgpu.emit_pipeline(
                step, grid=(steps,), in_specs=specs, init_carry=carry,
                max_concurrent_steps=max(blocks.stages, lag + 1),
            )(*arrays)  # fmt: skip

        return self.unit.sums(
            pipeline, (tokens, width), self.sums_dtype,
            operand=self.operand, lag=lag, steps=steps, refs=self.refs,
        )  # fmt: skip

    def _convert(self, values_smem, scales_smem):
        """A block of stored values as numbers to multiply, times their scales if form.grouped."""
        name, depth, width = self.form.format, self.blocks.depth, self.blocks.width
        wide_smem, layout = self.refs["wide_smem"], row_layout(width)
        # Few at once: beside them registers hold the sums.
        rows = min(self.form.rows, 32)
        for begin in range(0, depth, rows):
            part = pl.ds(begin, rows)
            numbers = load(values_smem.at[part], layout)
            if numbers.dtype == jnp.float8_e4m3fn:
                numbers = numbers.astype(jnp.float32)  # Hopper knows no other way
            else:
                numbers = read_values(numbers, name, self.operand)
            if scales_smem is not None:
                of_part = scales_smem.at[begin // self.form.rows]
                scale = load(of_part, layout.reduce(0), optimized=False)
                scale = read_scales(scale, name).astype(numbers.dtype)
                numbers *= lax.broadcast_in_dim(scale, numbers.shape, (1,))
            wide_smem[part] = numbers.astype(self.operand)
        plgpu.commit_smem()
        return wide_smem


def _store(out_smem, out, plan, visit: Array, tokens: int):
    """Write the visit's rows of the tile, and no others: those are another expert's."""
    start = plan.tile[visit] * tokens
    begin, count = plan.begin[visit], plan.end[visit] - plan.begin[visit]
    # A copy has a fixed size, so there is one for each bit of the count.
    for bit in reversed(range(tokens.bit_length())):
        size = 1 << bit

        @pl.when((count & size) != 0)
        def _(size=size):
            row = begin + (count & -(2 * size))
            plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(row - start, size)], out.at[pl.ds(row, size)])

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
