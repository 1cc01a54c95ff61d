"""The TPU kernels over pages, compiled for chips that are not here.

Writing and attending are one donated program, as in a layer: the pool must be updated in place, and
nothing of its size may be copied on the way.  All cases are in one program: a process for each
would take longer than compiling does.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.layout import Format, Layout
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from jaxinfer.aot import compile_for
from jaxinfer.configs import load_chip
from jaxinfer.kernels import cases
from jaxinfer.kernels.paged_attention_tpu import paged_attention
from jaxinfer.kernels.tpu import CHIPS, padded_bytes
from jaxinfer.kernels.write_pages_tpu import write_pages

pytestmark = pytest.mark.compile

# Every format with rows of 128 lanes; shorter and longer rows, and sinks, in bfloat16.  Steps that
# decode and steps of prompts have all kernels that mixed ones have.
NAMES = [
    name
    for name in cases.REAL
    if re.match("(llama-3.1-8b|llama-3.2-1b|gemma|gpt).*(64 x 1k|prefill)", name)
]


def layers(pools, others, *, vmem_bytes, num_cores):
    """Of each case, what attention returns and the written pool."""
    hardware, found = {"vmem_bytes": vmem_bytes, "num_cores": num_cores}, {}
    for name, (q, new, rows, sinks) in others.items():
        case = cases.REAL[name]
        pool = write_pages(pools[name], new, new, rows, **hardware)
        options = {"window": case.window, "soft_cap": case.soft_cap, "sinks_KG": sinks}
        found[name] = paged_attention(q, pool, rows, scale=0.1, **options, **hardware), pool
    return found


def abstract(case):
    """Queries, keys or values, rows and sinks of a case, and its pool."""
    q, pool, rows = cases.abstract(case)
    new = jax.ShapeDtypeStruct((case.num_tokens, case.K, case.H), q.dtype)
    sinks = jax.ShapeDtypeStruct((case.K, case.G), jnp.float32) if case.sinks else None
    return (q, new, rows, sinks), pool


@pytest.mark.parametrize("chip", CHIPS)
def test_pools_are_written_in_place(chip, kernel_ran):
    place = NamedSharding(AbstractMesh((1,), ("device",)), PartitionSpec())
    others, pools = {}, {}
    for name in NAMES:
        for op in ("paged_attention", "write_pages"):
            kernel_ran(op, "mosaic_tpu", cases.REAL[name].stored, chip)
        others[name], pools[name] = abstract(cases.REAL[name])
    formats = jax.tree.map(lambda leaf: Format(Layout(tuple(range(leaf.ndim))), place), pools)
    pools = jax.tree.map(
        lambda leaf, how: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=how), pools, formats
    )
    facts = load_chip(chip).tpu
    report = compile_for(
        f"{chip.removeprefix('tpu-')}:1",
        partial(layers, vmem_bytes=facts.vmem_bytes, num_cores=facts.cores),
        pools,
        others,
        donate_argnums=0,
        out_shardings={name: (place, formats[name]) for name in NAMES},
    )
    leaves = jax.tree.leaves(pools)
    assert sum(report.kernels.values()) == sum(2 if "decode" in name else 3 for name in NAMES)
    assert len(report.aliased) == report.donated == len(leaves)
    assert report.memory.aliased == sum(padded_bytes(leaf.shape, leaf.dtype) for leaf in leaves)
    # In any order of their axes; by size alone queries could be taken for a smaller pool.
    sides = {",".join(map(str, sorted(leaf.shape))) for leaf in leaves}
    copied = [re.findall(r"\d+", one.shape.partition("[")[2]) for one in report.copies]
    assert not sides & {",".join(sorted(shape, key=int)) for shape in copied}
