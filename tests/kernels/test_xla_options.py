"""What XLA is told of the programs of a step."""

from jaxinfer.kernels.xla_options import VENDORS_FROM, compiler_options

MODE = "xla_gpu_command_buffer_scheduling_mode"


def test_only_few_tokens_run_side_by_side_and_only_where_they_may():
    few, many = VENDORS_FROM - 1, VENDORS_FROM
    assert (compiler_options("gpu", few) or {})[MODE] == "CONCURRENT"
    assert MODE not in (compiler_options("gpu", few, side_by_side=False) or {})
    for side_by_side in (False, True):
        options = compiler_options("gpu", many, side_by_side=side_by_side) or {}
        assert MODE not in options
        assert options["xla_gpu_enable_triton_gemm"] is False


def test_other_platforms_are_told_nothing():
    assert compiler_options("cpu", 2) is compiler_options("tpu", 2) is None
