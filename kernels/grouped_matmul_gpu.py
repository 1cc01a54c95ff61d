"""Grouped products on NVIDIA GPUs (Pallas, Mosaic GPU): see `grouped_matmul` for the contract.

Thread blocks take (block of F, visit) pairs in turn, as many as there are: their number is data, so
experts without tokens cost nothing.  A block of a weight comes into shared memory as it is stored,
becomes bfloat16 there, and goes through wgmma; where a scale belongs to some of D, it multiplies
their partial sums, so the numbers in the product are exact.  Several thread blocks share an SM:
while one converts, another multiplies.

All activations are multiplied as bfloat16, which holds int8 and fp8 exactly; int8 × int8 is
therefore summed in float32, with a relative error of at most 2⁻²⁴ a summand.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxinfer.errors import ShapeError
from jaxinfer.kernels import blocks as tuned
from jaxinfer.kernels.grouped_matmul import finish, visits
from jaxinfer.kernels.quantized import Quantized, read_scales, read_values
from jaxinfer.kernels.quantized_matmul import activations
from jaxinfer.kernels.stored import Stored, stored
from jaxinfer.shapes import dims

ACC = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage] (exported from JAX 0.11 on)
# Of D in a block: a row of activations is then as long as the widest swizzle.
DEPTH = 64
# Of F in a block, best first; one of them must divide F.
WIDTHS = (128, 192, 96, 64)


@dataclass(frozen=True)
class Blocks:
    """How the work is cut: tokens of a tile, width (along F) of a weight's block, blocks of D in
    flight, and thread blocks that share an SM."""

    tokens: int
    width: int
    stages: int
    per_sm: int


def block_sizes(x_TD: Any, weight: Any, *, shared_bytes: int) -> Blocks:
    """Block sizes for arrays of these shapes and dtypes, on a chip with these many bytes of shared
    memory to an SM.  Raises `ShapeError` if the shape does not divide.
    """
    (num_tokens, D), (E, _, F) = x_TD.shape, weight.shape
    if D % DEPTH:
        raise ShapeError(f"weight {weight.shape}: D must be a multiple of {DEPTH}")
    width = next((width for width in WIDTHS if F % width == 0), None)
    if width is None:
        raise ShapeError(f"weight {weight.shape}: F must be a multiple of 64")
    # 64 is the least that wgmma multiplies.
    tokens = 128 if num_tokens >= 96 * E and width <= 128 else 64
    stage, fixed = _shared_bytes(tokens, width, jax.eval_shape(stored, weight))
    for per_sm in (3, 2, 1):
        stages = min((shared_bytes // per_sm - fixed) // stage, 6, D // DEPTH)
        if stages >= min(3, D // DEPTH):
            return Blocks(tokens, width, stages, per_sm)
    raise ShapeError(f"weight {weight.shape}: no block of it fits {shared_bytes} bytes")


def _shared_bytes(tokens: int, width: int, form: Stored) -> tuple[int, int]:
    """Shared memory of a thread block: for each stage, and once."""
    stage = DEPTH * (2 * tokens + width * form.bits // 8) + (4 * width if form.grouped else 0)
    return stage, 2 * width * (tokens + (DEPTH if form.bits < 16 else 0)) + 2048


def check_blocks(blocks: Blocks, weight: Any, *, shared_bytes: int) -> None:
    """Raise `ShapeError` unless blocks are for weights of such a shape on such a chip."""
    _, D, F = weight.shape
    stage, fixed = _shared_bytes(blocks.tokens, blocks.width, jax.eval_shape(stored, weight))
    needed = blocks.per_sm * (fixed + blocks.stages * stage)
    sums = blocks.per_sm * blocks.tokens * blocks.width
    tuned.require(
        {
            "tokens must be 64 or 128": blocks.tokens in (64, 128),
            f"width must be one of {WIDTHS} that divides F = {F}": blocks.width in WIDTHS
            and F % blocks.width == 0,
            f"stages must be from 1 to {D // DEPTH}": 1 <= blocks.stages <= D // DEPTH,
            "per_sm must be at least 1": blocks.per_sm >= 1,
            f"{needed} bytes do not fit {shared_bytes}": needed <= shared_bytes,
            f"{sums} sums are more than half of an SM's registers": sums <= 2**15,
        },
        blocks,
    )


def refusal(x_TD: Any, weight: Any, compute_capability: tuple[int, int]) -> str | None:
    """Why the kernel is not for these arrays on such a chip; None if it is.

    To be asked before lowering: for chips that it does not know, Mosaic GPU ends the process.
    """
    _, D, F = weight.shape
    if compute_capability != (9, 0):
        return f"it is written for compute capability 9.0, not {compute_capability}"
    if x_TD.dtype != jnp.bfloat16:
        return f"it multiplies bfloat16 activations, not {x_TD.dtype}"
    if not isinstance(weight, Quantized) and weight.dtype != jnp.bfloat16:
        return f"it multiplies bfloat16 or quantised weights, not {weight.dtype}"
    if D % DEPTH or all(F % width for width in WIDTHS):
        return f"D = {D} is no multiple of {DEPTH} or F = {F} of none of {WIDTHS}"
    return None


def grouped_matmul(
    x_TD: Array,
    weight: Array | Quantized,
    group_sizes_E: Array,
    *,
    num_sms: int,
    shared_bytes: int,
    blocks: Blocks | None = None,
    chip: str | None = None,
    interpret: Any = False,
) -> Array:
    """`grouped_matmul.grouped_matmul` as a kernel for bfloat16 activations.

    num_sms, shared_bytes: of the chip, the latter to an SM.  blocks: by default as tuned for the
    chip (the name of its sheet), else `block_sizes`.
    """
    sizes = dims(x_TD=x_TD, weight_EDF=weight, group_sizes_E=group_sizes_E)
    blocks = blocks or tuned.choose(
        "grouped_matmul",
        chip,
        tuned.product_key(x_TD, weight),
        Blocks,
        lambda blocks: check_blocks(blocks, weight, shared_bytes=shared_bytes),
        lambda: block_sizes(x_TD, weight, shared_bytes=shared_bytes),
    )
    x, scale_T1 = activations(x_TD, weight) if isinstance(weight, Quantized) else (x_TD, None)
    form = stored(weight)
    plan = visits(group_sizes_E, sizes["T"], blocks.tokens)
    dtype = x_TD.dtype if scale_T1 is None else jnp.float32
    scratch = {"out_smem": plgpu.SMEM((blocks.tokens, blocks.width), dtype)}
    if form.bits < 16:
        scratch["wide_smem"] = plgpu.SMEM((DEPTH, blocks.width), jnp.bfloat16)
    run = plgpu.kernel(
        partial(_body, form=form, blocks=blocks, num_blocks=num_sms * blocks.per_sm),
        out_type=jax.ShapeDtypeStruct((sizes["T"], sizes["F"]), dtype),
        grid=(num_sms * blocks.per_sm,),
        grid_names=("block",),
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
    scales = form.tensor_scale[:, None] if form.scales is None else form.scales
    out_TF = run(plan, form.tensor_scale, x.astype(jnp.bfloat16), form.values, scales)
    return finish(out_TF, scale_T1, group_sizes_E).astype(x_TD.dtype)


def _body(
    plan,
    tensor_scale,
    x,
    values,
    scales,
    out,
    out_smem,
    wide_smem=None,
    *,
    form: Stored,
    blocks: Blocks,
    num_blocks: int,
):
    """One thread block's share of the pairs; all refs but the last two are in global memory."""
    num_visits = plan.count[...]
    num_pairs = num_visits * (values.shape[2] // blocks.width)
    first = lax.axis_index("block")

    @pl.loop(0, lax.div(num_pairs - first + num_blocks - 1, num_blocks))
    def _(turn):
        pair = first + turn * num_blocks
        # Neighbours share a block of F: the visits of one expert then share its weight in L2.
        visit, column = lax.rem(pair, num_visits), lax.div(pair, num_visits) * blocks.width
        expert = plan.expert[visit]
        columns = pl.ds(column, blocks.width)
        sums = _sums(
            x.at[pl.ds(plan.tile[visit] * blocks.tokens, blocks.tokens)],
            values.at[expert, :, columns],
            scales.at[expert, :, columns] if form.grouped else None,
            wide_smem, form, blocks,
        )  # fmt: skip
        if form.scales is not None and not form.grouped:
            row = _load(scales.at[expert, 0, columns])
            sums *= lax.broadcast_in_dim(row, sums.shape, (1,))
        out_smem[...] = (sums * tensor_scale[expert]).astype(out_smem.dtype)
        plgpu.commit_smem()
        _store(out_smem, out.at[:, columns], plan, visit, blocks.tokens)


def _sums(x, values, scales, wide_smem, form: Stored, blocks: Blocks) -> Array:
    """A tile of tokens times a block of F of one expert's weight: float32 in registers."""
    part = min(form.rows, DEPTH) if form.grouped else DEPTH
    shape = (blocks.tokens, blocks.width)

    def widen(values_smem):
        if wide_smem is None:
            return values_smem
        numbers = values_smem[...]
        if form.format:
            # Hopper converts fp8 to float32 only.
            fp8 = numbers.dtype == jnp.float8_e4m3fn
            numbers = read_values(numbers, form.format, jnp.float32 if fp8 else jnp.bfloat16)
        wide_smem[...] = numbers.astype(jnp.bfloat16)
        plgpu.commit_smem()
        return wide_smem

    def add_parts(_, x_smem, values_smem, scales_smem, total):
        # Read before `widen` commits: only then may the next copy overwrite them.
        rows = [_load(scales_smem.at[i]) for i in range(DEPTH // part)]
        weight = widen(values_smem)
        for index, row in enumerate(rows):
            span = pl.ds(index * part, part)

            def multiply(sums, span=span):
                plgpu.wgmma(sums, x_smem.at[:, span], weight.at[span])
                return sums[...]

            sums = pl.run_scoped(multiply, ACC(shape))
            total += sums * lax.broadcast_in_dim(read_scales(row, form.format), shape, (1,))
        return total

    specs = [
        plgpu.BlockSpec((blocks.tokens, DEPTH), lambda k: (0, k), delay_release=1),
        plgpu.BlockSpec((DEPTH, blocks.width), lambda k: (k, 0), delay_release=1),
    ]
    steps, stages = (x.shape[1] // DEPTH,), blocks.stages
    if form.grouped:
        specs.append(
            plgpu.BlockSpec(
                (DEPTH // part, blocks.width), lambda k: (k * DEPTH // max(form.rows, DEPTH), 0)
            )
        )
        return plgpu.emit_pipeline(
            add_parts, grid=steps, in_specs=specs, max_concurrent_steps=stages,
            init_carry=jnp.zeros(shape, jnp.float32),
        )(x, values, scales)  # pyright: ignore[reportCallIssue]  # fmt: skip

    def add_all(sums):
        def add(_, x_smem, values_smem):
            plgpu.wgmma(sums, x_smem, widen(values_smem))
            # What was copied stays for one more step; what was converted, for none.
            plgpu.wgmma_wait(0 if wide_smem is not None else 1)

        pipeline = plgpu.emit_pipeline(add, grid=steps, in_specs=specs, max_concurrent_steps=stages)
        pipeline(x, values)
        return sums[...]

    return pl.run_scoped(add_all, ACC(shape))


def _load(row) -> Array:
    """A row of scales; its few numbers need no fast way into registers."""
    return plgpu.load(row, optimized=False)  # pyright: ignore[reportCallIssue] (JAX 0.11)


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
