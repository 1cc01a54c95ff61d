"""The TPU kernel that writes pages, in the interpreter, against the reference, to the bit."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxinfer.kernels import cases
from jaxinfer.kernels.write_pages import write_pages as reference
from jaxinfer.kernels.write_pages_tpu import write_pages
from tests.kernels.ragged import Batch
from tests.kernels.tpu_interpreter import parameters, run


REFERENCE = jax.jit(reference)


def bits(array) -> np.ndarray:
    """What is stored outside of the dump page, so that NaN equals NaN."""
    array = np.asarray(array)[1:]
    return array.view(f"uint{8 * array.dtype.itemsize}")


@pytest.mark.parametrize("name", cases.SMALL)
def test_writes_what_the_reference_writes(name):
    batch, num_cores = Batch.of(cases.SMALL[name], 1.0), 1 + len(name) % 2
    write = partial(
        write_pages, vmem_bytes=16 * 2**20, num_cores=num_cores, interpret=parameters(num_cores)
    )
    arguments = batch.before, batch.k_new, batch.v_new, batch.rows
    for got, want in zip(
        jax.tree.leaves(run(write, *arguments)), jax.tree.leaves(REFERENCE(*arguments)), strict=True
    ):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(bits(got), bits(want))


def test_scales_of_a_run_that_crosses_registers():
    """From token 120 on 20 tokens go to one page: their scales lie in two registers."""
    case = cases.Case(((120, 120), (20, 25)), K=1, G=1, H=64, S=128, stored="int8")
    batch = Batch.of(case, 1.0)
    arguments = batch.before, batch.k_new, batch.v_new, batch.rows
    write = partial(write_pages, vmem_bytes=16 * 2**20, interpret=parameters())
    for got, want in zip(
        jax.tree.leaves(run(write, *arguments)), jax.tree.leaves(REFERENCE(*arguments)), strict=True
    ):
        np.testing.assert_array_equal(bits(got), bits(want))


def _overwrites(x_hbm, out_hbm, buffer, sem):
    """Takes new contents into a buffer whose old ones are still being copied out."""
    out = pltpu.make_async_copy(buffer, out_hbm, sem)
    out.start()
    pltpu.sync_copy(x_hbm, buffer)
    out.wait()


def test_a_race_does_not_go_unnoticed():
    kernel = pl.pallas_call(
        _overwrites,
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA],
        interpret=parameters(),
    )
    with pytest.raises(AssertionError, match="RACE DETECTED"):
        run(kernel, np.zeros((8, 128), np.float32))
