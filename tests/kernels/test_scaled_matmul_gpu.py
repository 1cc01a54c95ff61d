"""Scaled products of 8-bit numbers, interpreted: values and races, on memory full of NaN."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.errors import ShapeError
from jaxinfer.kernels import quantized_matmul as products
from jaxinfer.kernels import workloads
from jaxinfer.kernels.quantized import quantize, quantize_activations

if jax.__version_info__ < (0, 11):
    pytest.skip("JAX has an interpreter for GPU kernels from 0.11 on", allow_module_level=True)

from jaxinfer.kernels import scaled_matmul_gpu
from jaxinfer.kernels.gpu import Gpu
from jaxinfer.kernels.quantized_matmul_gpu import quantized_matmul
from jaxinfer.kernels.scaled_matmul_gpu import Blocks, block_sizes, refusal, scaled_matmul
from tests.kernels.gpu_interpreter import interpreting, parameters, races_found

# So few multiprocessors that each has several tiles.
HOPPER = Gpu((9, 0), 4, 232_448)
WATCHED = parameters(detect_races=True)


def arguments(T, D, F, name):
    rng = np.random.default_rng(T)
    x = jnp.asarray(rng.normal(size=(T, D)) * rng.uniform(0.1, 9, (T, 1)), jnp.bfloat16)
    return x, quantize(jnp.asarray(rng.normal(size=(D, F)) * rng.uniform(0.1, 9, F)), name)


@pytest.mark.parametrize(
    ("T", "D", "F", "name", "blocks"),
    [
        (384, 512, 512, "fp8", Blocks(stages=3, cluster=1, group=2)),
        # Tiles that end beyond the last token or column, and one that begins there.
        (264, 384, 320, "int8", Blocks(stages=2)),
        (520, 384, 192, "fp8", Blocks(256, 128, stages=2, group=1)),
    ],
)
def test_matches_float64(T, D, F, name, blocks):
    x_TD, weight = arguments(T, D, F, name)
    x, scale_T1 = quantize_activations(x_TD, name)
    found = scaled_matmul(
        x, scale_T1, weight.values, weight.scales, gpu=HOPPER, blocks=blocks, interpret=WATCHED
    )
    assert not races_found()
    assert (found.shape, found.dtype) == ((T, F), jnp.bfloat16)
    x, values = np.float64(x), np.float64(weight.values)
    want = (x @ values) * np.float64(scale_T1) * np.float64(weight.scales)
    rounding = 2**-8 * np.abs(want) + 1e-5 * np.abs(x) @ np.abs(values) * scale_T1 * weight.scales
    assert (np.abs(np.float64(found) - want) <= rounding).all()


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_many_tokens_take_it(name, monkeypatch, kernel_ran):
    kernel_ran("quantized_matmul", "mosaic_gpu", name, "interpreted")
    monkeypatch.setattr(scaled_matmul_gpu, "BUSY", 1 / 2)
    x_TD, weight = arguments(136, 384, 128, name)
    with interpreting(WATCHED):
        text = str(jax.make_jaxpr(lambda *args: quantized_matmul(*args, gpu=HOPPER))(x_TD, weight))
        found = quantized_matmul(x_TD, weight, gpu=HOPPER)
    assert "dot_general" not in text
    assert workloads.difference(found, products.quantized_matmul(x_TD, weight)) < 0.01


def test_what_it_is_not_for():
    def refused(T=4096, D=4096, F=6144, dtype="int8", gpu=HOPPER):
        x_TD = jax.ShapeDtypeStruct((T, D), jnp.bfloat16)
        return refusal(x_TD, jax.ShapeDtypeStruct((D, F), dtype), gpu)

    assert refused() is None
    assert "multiple of 8" in refused(T=4097)
    assert "none" in refused(T=0)
    h200 = replace(HOPPER, multiprocessors=132)
    assert refused(T=1024, F=4096, gpu=h200) is None
    assert "192 tiles" in refused(T=1024, gpu=h200)
    assert "64 tiles" in refused(T=512, F=4096, gpu=h200)
    assert "D = 4000" in refused(D=4000)
    assert "D = 256" in refused(D=256)
    assert "F = 96" in refused(F=96)
    assert "not int4" in refused(dtype="int4")
    assert "(10, 0)" in refused(gpu=replace(HOPPER, capability=(10, 0)))


def test_blocks_must_fit():
    x, weight = arguments(8, 512, 64, "int8")
    x, scale_T1 = quantize_activations(x, "int8")
    assert block_sizes(512).stages == 3
    for blocks, why in (
        (Blocks(stages=4), "stages"),
        (Blocks(64, stages=2), "tokens"),
        (Blocks(512, 64, stages=2), "tokens"),
        (Blocks(width=512, stages=2), "width"),
        (Blocks(256, 256, stages=2), "sums"),
        (Blocks(width=192, stages=2), "pieces"),
        (Blocks(stages=3, cluster=3), "cluster"),
    ):
        with pytest.raises(ShapeError, match=why):
            scaled_matmul(x, scale_T1, weight.values, weight.scales, gpu=HOPPER, blocks=blocks)
