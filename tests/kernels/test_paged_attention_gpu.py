"""The GPU kernels of attention, in the interpreter, against a float64 softmax written per token."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.kernels import cases
from tests.kernels.ragged import Batch

if jax.__version_info__ < (0, 11):
    pytest.skip("the GPU interpreter is public from JAX 0.11 on", allow_module_level=True)

from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxinfer.kernels import paged_attention_gpu as attention
from jaxinfer.kernels import paged_attention_gpu_units as units

SCALE = 0.2
# Queries, weights and results are bfloat16: 2^-9 each of values of a few.
CLOSE = 2e-2
HOPPER = attention.Gpu(capability=(9, 0), multiprocessors=2, shared_bytes=232_448)
BLACKWELL = replace(HOPPER, capability=(10, 0))


class Interpreted(units.Wgmma):
    """wgmma takes weights from registers, which the interpreter does not know."""

    def scores(self, q_ref, k_ref):
        return jnp.dot(q_ref[...], k_ref[...].T, preferred_element_type=jnp.float32)

    def weigh(self, acc, weights, v_ref):
        return acc + jnp.dot(weights, v_ref[...], preferred_element_type=jnp.float32)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setitem(units.UNITS, 9, Interpreted)
    # A part holds few slots, or no row here would have two.
    monkeypatch.setattr(attention, "SHORTEST_PART", 64)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(uninitialized_memory="nan")):
        yield


def refusal(case: cases.Case, gpu: attention.Gpu) -> str | None:
    q_TKGH, pool, _ = cases.abstract(case)
    return attention.why_not(gpu, q_TKGH, pool)


def check(case: cases.Case, gpu: attention.Gpu) -> None:
    batch = Batch.of(case, SCALE)

    def attend(q, pool, rows, sinks):
        return attention.paged_attention(
            q, pool, rows, gpu=gpu, scale=SCALE, window=case.window, soft_cap=case.soft_cap,
            sinks_KG=sinks,
        )  # fmt: skip

    # Most of the time goes into compiling the interpreter's loops; they need not be good code.
    quick = jax.jit(attend, compiler_options={"xla_backend_optimization_level": 0})
    out = np.asarray(quick(batch.q, batch.after, batch.rows, batch.sinks), np.float64)
    np.testing.assert_allclose(out[: case.num_tokens], batch.want, rtol=CLOSE, atol=CLOSE)
    assert np.isfinite(out).all(), "padding must come out finite"


@pytest.mark.parametrize("name", [n for n, c in cases.SMALL.items() if not refusal(c, HOPPER)])
def test_hopper_matches_a_plain_softmax(name):
    check(cases.SMALL[name], HOPPER)


@pytest.mark.parametrize(
    "name", ["mixed-2x8x64-page32-bfloat16-window5-cap-sinks", "chunk-1x4x80-page32-float8_e4m3fn"]
)
def test_blackwell_matches_a_plain_softmax(name):
    check(cases.SMALL[name], BLACKWELL)
