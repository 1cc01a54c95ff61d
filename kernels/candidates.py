"""Which blocks a sweep tries for a case: pure functions of shapes, dtypes and the chip's facts.

The heuristic's choice comes first, then what differs from it in one or two fields and still fits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax

from jaxinfer.configs import Chip
from jaxinfer.errors import ShapeError
from jaxinfer.kernels import cases
from jaxinfer.kernels.blocks import Key, pages_key, product_key
from jaxinfer.kernels.quantized import format_of
from jaxinfer.kernels.tpu import LANES

OPS = ("paged_attention", "quantized_matmul", "grouped_matmul")


@dataclass(frozen=True)
class Sweep:
    """What is to be tried for one key.

    op, cases: what is timed, by its names in kernels/cases.py.
    looked_up_as: the operation whose entries the kernel looks through.
    argument: of the implementation, that takes the blocks.  choices: the heuristic's first.
    """

    op: str
    cases: tuple[str, ...]
    looked_up_as: str
    key: Key
    argument: str
    choices: tuple[Any, ...]


def sweeps(op: str, name: str, case: Any, chip: Chip) -> list[Sweep]:
    """The sweeps of a case on a chip: one, or two if it has rows of one token and longer ones."""
    if isinstance(case, cases.Product):
        if case.single and case.format and format_of(case.format).as_stored:
            return []  # its blocks, where it has any, are the same for all
        x_TD, weight, _ = cases.abstract_product(replace(case, single=False))
        found = _products(x_TD, weight, chip)
        return [Sweep(op, (name,), "grouped_matmul", product_key(x_TD, weight), "blocks", found)]
    q_TKGH, pool, rows = cases.abstract(case)
    parts = []
    if any(queries == 1 for queries, _ in case.lens) or case.row_per_token:
        parts.append("single")
    if any(queries > 1 for queries, _ in case.lens) and not case.row_per_token:
        parts.append("tiles")
    return [
        Sweep(
            op, (name,), op, pages_key(part, q_TKGH, pool, case.window), part,
            _attention(q_TKGH, pool, rows, case, chip, single=part == "single"),
        )
        for part in parts
    ]  # fmt: skip


def _fitting(first: Any, others: Iterable[Any], check: Callable[[Any], None]) -> tuple[Any, ...]:
    """The first and those of the others that pass the check, each once."""
    found = [first]
    for blocks in others:
        try:
            check(blocks)
        except ShapeError:
            continue
        found.append(blocks)
    return tuple(dict.fromkeys(found))


def _attention(q_TKGH, pool, rows, case: cases.Case, chip: Chip, *, single: bool) -> tuple:
    if chip.gpu is not None:
        return _attention_gpu(case, chip, single)
    from jaxinfer.kernels.paged_attention_tpu import block_sizes, check_blocks

    assert chip.tpu is not None
    facts = {"single": single, "num_cores": chip.tpu.cores}
    vmem_bytes = chip.tpu.vmem_bytes
    first = block_sizes(q_TKGH, pool, rows, vmem_bytes=vmem_bytes * 3 // 4, **facts)
    others = [
        replace(
            first, queries=int(first.queries * queries), pages=int(first.pages * pages), depth=depth
        )
        for queries, pages, depth in itertools.product(
            (1,) if single else (1, 0.5, 2), (1, 0.5, 2), (2, 3, 4, 6) if single else (2,)
        )
    ]
    # Pages are copied by lines of lanes.
    others = [blocks for blocks in others if blocks.pages * case.S % LANES == 0]
    return _fitting(
        first, others,
        lambda blocks: check_blocks(blocks, q_TKGH, pool, vmem_bytes=vmem_bytes * 7 // 8, **facts),
    )  # fmt: skip


def _attention_gpu(case: cases.Case, chip: Chip, single: bool) -> tuple:
    from jaxinfer.kernels.gpu import Gpu
    from jaxinfer.kernels.paged_attention_gpu import check_tiling, choose_tiling
    from jaxinfer.kernels.paged_attention_gpu_work import Problem

    gpu = Gpu.of(chip)
    problem = Problem(
        case.K, case.G, case.H, case.S, case.stored, case.H**-0.5, case.window, case.soft_cap
    )
    first = choose_tiling(gpu, problem, split=single)
    shapes = [
        (groups, block)
        for groups, block in itertools.product((2, 1), (64, 128))
        # Blackwell's tensor memory holds no more than what the heuristic takes of it.
        if gpu.capability[0] == 9 or (groups, block) == (first.groups, first.block)
    ]
    found: tuple[Any, ...] = (first,)
    for groups, block in shapes:
        rings = [
            replace(first, groups=groups, block=block, stages=stages) for stages in (6, 4, 3, 2)
        ]
        fitting = _fitting(
            first, rings, lambda tiling: check_tiling(tiling, gpu, problem, split=single)
        )
        found += fitting[1:3]  # the longest rings
    return tuple(dict.fromkeys(found))


def _products(x_TD: Any, weight: Any, chip: Chip) -> tuple:
    if chip.gpu is not None:
        from jaxinfer.kernels import grouped_matmul_gpu as gpu
        from jaxinfer.kernels.gpu import Gpu
        from jaxinfer.kernels.grouped_matmul_gpu_units import UNITS

        facts = Gpu.of(chip)
        first = gpu.block_sizes(x_TD, weight, facts)
        unit = UNITS[facts.capability[0]]
        # Large tiles are for experts with many tokens.
        many = x_TD.shape[0] >= 32 * weight.shape[0]
        tokens = unit.TOKENS if many else unit.TOKENS[:1]
        others = [
            gpu.Blocks(tile, width, stages, per_sm, first.depth)
            for tile, width, per_sm, stages in itertools.product(
                tokens, gpu.WIDTHS, (3, 2, 1), (6, 4, 3)
            )
        ]
        # Of those that differ in the stages alone, the most that fit are enough.
        fitting = _fitting(first, others, lambda b: gpu.check_blocks(b, weight, facts))
        most: dict[tuple, Any] = {}
        for blocks in fitting:
            most.setdefault((blocks.tokens, blocks.width, blocks.per_sm), blocks)
        return tuple(most.values())
    from jaxinfer.kernels import grouped_matmul_tpu as tpu
    from jaxinfer.kernels.stored import stored

    assert chip.tpu is not None
    first = tpu.block_sizes(x_TD, weight, vmem_bytes=chip.tpu.vmem_bytes)
    depths = tpu.block_depths(weight.shape[1], jax.eval_shape(stored, weight))
    near = depths.index(first.depth)
    others = [replace(first, tokens=tokens) for tokens in (first.tokens // 2, first.tokens * 2)]
    others += [replace(first, depth=depth) for depth in depths[max(near - 1, 0) : near + 2]]
    others += [replace(first, width=width) for width in (2048, 1024, 512, 256)]
    others = [b for b in others if b.depth * b.width <= tpu.MOST_NUMBERS]
    return _fitting(
        first, others,
        lambda b: tpu.check_blocks(b, weight, vmem_bytes=chip.tpu.vmem_bytes),
    )  # fmt: skip
