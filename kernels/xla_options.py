"""What XLA is told of the programs of a step."""

from __future__ import annotations

# A GPU is told a whole step at once, as a CUDA graph, in place of some 600 launches.  XLA's default
# leaves custom calls (our kernels) out and some copies in: many graphs, slower than none.
# A kernel that it gives a slice to without a copy would be left out as well.
GPU_OPTIONS: dict[str, str | bool] = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,WHILE",
    "xla_gpu_enable_dynamic_slice_fusion": False,
}
# From so many tokens on a GPU's products are the vendor's.  Triton's are faster when timed one by
# one, but a step of them takes up to 5 % longer on H100, for they leave the addition of the
# residual to a kernel of its own.
VENDORS_FROM = 64
MANY_TOKENS: dict[str, str | bool] = {"xla_gpu_enable_triton_gemm": False}
# Below, most kernels take no longer than their start: those that do not need each other, such as
# the ones that write keys and values, then run side by side.  Not so in a graph that begins with
# several: on H200 all but one of them may start 24 to 80 us late.
FEW_TOKENS: dict[str, str | bool] = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}


def compiler_options(
    platform: str, num_tokens: int, *, side_by_side: bool = True
) -> dict[str, str | bool] | None:
    """What XLA is to be told of a program for so many tokens; None: nothing.

    side_by_side: whether kernels of few tokens that do not need each other may run so.
    """
    if platform != "gpu":
        return None
    if num_tokens >= VENDORS_FROM:
        return GPU_OPTIONS | MANY_TOKENS
    return GPU_OPTIONS | (FEW_TOKENS if side_by_side else {})
