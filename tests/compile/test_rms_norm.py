"""A sum and its norm, compiled for GPUs that are not here."""

from functools import partial

import jax
import pytest

from jaxinfer.aot import compile_for
from jaxinfer.aot.target import parse
from tests.marks import NEEDS_MOSAIC_GPU

pytestmark = [pytest.mark.compile, NEEDS_MOSAIC_GPU]


@pytest.mark.parametrize("target", ["h100:1", "h200:1", "b200:1"])
@pytest.mark.parametrize(("T", "D"), [(2, 4096), (63, 12288)])
def test_numbers_of_a_token_stay_in_registers(T, D, target, kernel_ran):
    from jaxinfer.kernels.rms_norm_gpu import add_rms_norm, refusal

    kernel_ran("add_rms_norm", "mosaic_gpu", "bfloat16", parse(target).chip.name)
    x_TD, scale_D = (jax.ShapeDtypeStruct(shape, "bfloat16") for shape in ((T, D), (D,)))
    assert refusal(x_TD) is None
    report = compile_for(target, partial(add_rms_norm, eps=1e-5, offset=1.0), x_TD, x_TD, scale_D)
    assert sum(report.kernels.values()) == 1
    assert not report.warnings
