"""Compares the kernel of grouped products with float64 on the GPU at hand, case by case:

    python -m tests.kernels.grouped_on_gpu                # all formats, some minutes
    python -m tests.kernels.grouped_on_gpu bfloat16 fp8   # these

Prints a line for each case; the exit code counts those that failed.
"""

from __future__ import annotations

import sys
from functools import partial

import jax
import jax.numpy as jnp

from jaxinfer.configs import find_chip
from jaxinfer.kernels import cases
from jaxinfer.kernels.cases import Product
from jaxinfer.kernels.gpu import Gpu
from jaxinfer.kernels.grouped_matmul_gpu import Blocks, block_sizes, grouped_matmul
from jaxinfer.kernels.quantized import FORMATS, quantize
from tests.kernels.groups import check

# Few tokens for each expert, and so many that large tiles are chosen.
GROUPS = [*cases.GROUPS.values(), (300, 0, 1, 90, 512), (0, 700)]
D, F = 512, 384


def failures(gpu: Gpu, names: tuple[str | None, ...]) -> int:
    """How many combinations of groups and format come out wrong; prints all."""
    wrong = 0
    for name in names:
        for groups in GROUPS:
            x = jax.ShapeDtypeStruct((sum(groups) + 5, D), jnp.bfloat16)
            weight = jax.ShapeDtypeStruct((len(groups), D, F), jnp.bfloat16)
            if name is not None:
                weight = jax.eval_shape(partial(quantize, name=name), weight)
            wrong += not _good(gpu, name, groups, block_sizes(x, weight, gpu))
    return wrong


def _good(gpu: Gpu, name: str | None, groups: tuple[int, ...], blocks: Blocks) -> bool:
    try:
        check(jax.jit(partial(grouped_matmul, gpu=gpu, blocks=blocks)), Product(groups, D, F, name))
        said = "good"
    except AssertionError as error:
        said = f"WRONG: {error}"
    print(name, groups, blocks, said, flush=True)
    return said == "good"


if __name__ == "__main__":
    chip = find_chip(jax.devices()[0].device_kind)
    if chip is None or chip.gpu is None:
        sys.exit(f"no sheet in configs/hardware is of a {jax.devices()[0].device_kind}")
    asked = tuple(None if name == "bfloat16" else name for name in sys.argv[1:])
    sys.exit(min(failures(Gpu.of(chip), asked or (None, *FORMATS)), 100))
