"""The TPU kernels compiled for chips that are not here; needs libtpu (extra `tpu`).

Writing and attending are one donated program, as in a layer: the pool must be updated in place, and
nothing of its size may be copied on the way.
"""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from jaxinfer.configs import load_chip
from jaxinfer.kernels import cases
from jaxinfer.kernels.paged_attention_tpu import paged_attention
from jaxinfer.kernels.tpu import padded_bytes, row_major
from jaxinfer.kernels.write_pages_tpu import write_pages

pytestmark = pytest.mark.compile

ROOT = Path(__file__).parents[2]
# With the slice whose first device they are compiled for.
CHIPS = {
    "tpu-v5e": "v5e:2x4", "tpu-v6e": "v6e:2x4", "tpu-v5p": "v5p:2x2x2", "tpu7x": "tpu7x:2x2x1",
}  # fmt: skip
# Every format with rows of 128 lanes; shorter and longer rows, and sinks, in bfloat16.
NAMES = [
    name
    for name in cases.REAL
    if "4 x 32k" not in name and re.match("llama-3.1-8b|llama-3.2-1b|gemma|gpt", name)
]
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing is opened but the compiler
}


def layer(q, k, v, pool, rows, sinks, *, vmem_bytes, num_cores, window, soft_cap):
    hardware = {"vmem_bytes": vmem_bytes, "num_cores": num_cores}
    pool = write_pages(pool, k, v, rows, **hardware)
    options = {"scale": 0.1, "window": window, "soft_cap": soft_cap, "sinks_KG": sinks}
    return paged_attention(q, pool, rows, **options, **hardware), pool


def compile_case(case: cases.Case, chip: str) -> dict:
    tpu = load_chip(chip).tpu
    device = topologies.get_topology_desc(CHIPS[chip], platform="tpu").devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    q, pool, rows = cases.abstract(case)
    new = jax.ShapeDtypeStruct((case.num_tokens, case.K, case.H), q.dtype)
    sinks = jax.ShapeDtypeStruct((case.K, case.G), jnp.float32) if case.sinks else None

    def placed(tree, how=lambda _: sharding):
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=how(a)), tree)

    function = partial(
        layer, vmem_bytes=tpu.vmem_bytes, num_cores=tpu.cores, window=case.window,
        soft_cap=case.soft_cap,
    )  # fmt: skip
    formats = jax.tree.map(lambda a: row_major(a, sharding), pool)
    jitted = jax.jit(function, donate_argnums=3, out_shardings=(sharding, formats))
    arguments = placed((q, new, new)), placed(pool, lambda a: row_major(a, sharding))
    compiled = jitted.lower(*arguments[0], arguments[1], *placed((rows, sinks))).compile()
    of_pool = [f"[{','.join(map(str, leaf.shape))}]" for leaf in jax.tree.leaves(pool)]
    copies = [
        line.strip()
        for line in compiled.as_text().splitlines()
        if re.search(r" (copy|copy-start|transpose|fusion)\(", line)
        and any(shape in line.partition("=")[2].partition("(")[0] for shape in of_pool)
    ]
    return {
        "aliased": compiled.memory_analysis().alias_size_in_bytes,
        "pool": sum(padded_bytes(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(pool)),
        "copies": copies,
    }


@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_in_place(chip, kernel_ran):
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed")
    environment = {**os.environ, **ENVIRONMENT}
    command = [sys.executable, "-m", "tests.compile.test_kernels_tpu", chip]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False
    )
    assert not done.returncode, done.stderr
    reports = json.loads(done.stdout)
    assert set(reports) == set(NAMES)
    for name, report in reports.items():
        for op in ("paged_attention", "write_pages"):
            kernel_ran(op, "mosaic_tpu", cases.REAL[name].stored, chip)
        assert report["copies"] == [], name
        assert report["aliased"] == report["pool"], name


if __name__ == "__main__":
    print(json.dumps({name: compile_case(cases.REAL[name], sys.argv[1]) for name in NAMES}))
