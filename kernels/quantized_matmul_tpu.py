"""Products with weights whose scales belong to some of D, on TPU: see `quantized_matmul`.

To XLA such a weight is an array to write out in bfloat16 first.  Here a block becomes bfloat16 in
fast memory, in the kernel of grouped products, all tokens being one group.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxinfer.kernels.grouped_matmul_tpu import Blocks, grouped_matmul
from jaxinfer.kernels.quantized import Quantized, stacked


def quantized_matmul(
    x_TD: Array,
    weight: Quantized,
    *,
    vmem_bytes: int,
    blocks: Blocks | None = None,
    chip: str | None = None,
    interpret: Any = False,
) -> Array:
    """`quantized_matmul.quantized_matmul` as a kernel; the arguments are `grouped_matmul_tpu`'s."""
    return grouped_matmul(
        x_TD,
        stacked(weight),
        jnp.full(1, len(x_TD), jnp.int32),
        vmem_bytes=vmem_bytes,
        blocks=blocks,
        chip=chip,
        interpret=interpret,
    )
