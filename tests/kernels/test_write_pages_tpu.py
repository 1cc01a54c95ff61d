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


def bits(array) -> np.ndarray:
    """What is stored outside of the dump page; any NaN is as good as another."""
    array = np.asarray(array)[1:]
    raw = array.view(f"uint{8 * array.dtype.itemsize}")
    return np.where(np.isnan(array.astype(np.float32)), np.iinfo(raw.dtype).max, raw)


def compare(case: cases.Case, num_cores: int = 1) -> None:
    batch = Batch.of(case, scale=1.0)
    arguments = batch.before, batch.k_new, batch.v_new, batch.rows
    interpret = parameters(num_cores)
    write = partial(write_pages, vmem_bytes=2**24, num_cores=num_cores, interpret=interpret)
    got, want = run(write, *arguments), jax.jit(reference)(*arguments)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(bits(one), bits(other))


@pytest.mark.parametrize("name", cases.SMALL)
def test_writes_what_the_reference_writes(name, kernel_ran):
    kernel_ran("write_pages", "mosaic_tpu", cases.SMALL[name].stored, "interpreted")
    compare(cases.SMALL[name])


def test_two_cores_share_the_pages():
    compare(cases.Case(cases.ROWS["mixed"], K=1, G=1, H=64, S=32), num_cores=2)


def test_scales_of_a_run_that_crosses_registers():
    """From token 120 on 20 tokens go to one page: their scales lie in two registers."""
    compare(cases.Case(((120, 120), (20, 25)), K=1, G=1, H=64, S=128, stored="int8"))


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
    # `run` reads what is printed; from jax 0.12 on the interpreter itself raises.
    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError), match="RACE DETECTED"):
        run(kernel, np.zeros((8, 128), np.float32))
