"""Targets: chips that need not be here, and how to reach the compilers for them.

A target is written "CHIP:N" (N devices, the first of a host) or, for TPU, "CHIP:SLICE": "h200:8",
"v6e:1", "v5e:2x4", "tpu7x:2x2x1".  The chips are those of configs/hardware.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from jaxinfer.configs import Chip, chips, load_chip
from jaxinfer.errors import ConfigError, ToolchainError

# For the process that compiles: no accelerator that happens to be there may be touched or asked.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # seconds of compilation are a result
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing is opened but the compiler
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "MOSAIC_GPU_DUMP_PTXAS": "1",  # or nothing tells which kernels spill registers
}
# Beside the plugin: what XLA uses of CUDA where no toolkit is installed.
GPU_DISTRIBUTIONS = ("absl-py", "nvidia-nvvm", "nvidia-cuda-nvcc", "nvidia-cuda-runtime")


@dataclass(frozen=True)
class Target:
    """chip: its sheet.  slice: of TPUs, such as "2x4".  devices: how many of them are used (jax's
    devices: a TPU7x chip is two); None: all of the slice."""

    text: str
    chip: Chip
    slice: str
    devices: int | None

    @property
    def platform(self) -> str:
        return "tpu" if self.chip.tpu else "cuda"

    @property
    def memory_bytes(self) -> int:
        """What one device can hold; of a GPU, what XLA sees of it."""
        gpu = self.chip.gpu
        return gpu.visible_bytes if gpu else self.chip.memory_bytes // self.chip.devices_per_chip


def parse(text: str) -> Target:
    """Read a target; raises `ConfigError` if there is no such chip or slice."""
    name, _, place = text.partition(":")
    stem = name if name in chips() else f"tpu-{name}"
    if stem not in chips():
        known = ", ".join(one.removeprefix("tpu-") for one in chips())
        raise ConfigError(f"target {text!r}: there is no chip {name!r}; there are: {known}")
    chip = load_chip(stem)
    if re.fullmatch(r"[1-9]\d*", place or "1"):
        return Target(text, chip, chip.tpu.host if chip.tpu else "", int(place or 1))
    if chip.tpu and re.fullmatch(r"\d+(x\d+)+", place):
        return Target(text, chip, place, None)
    wanted = f"a number of devices or a slice such as {chip.tpu.host}" if chip.tpu else "a number"
    raise ConfigError(f"target {text!r}: {place!r} must be {wanted}")


def devices(target: Target) -> list[Any]:
    """The target's devices, to shard over and to compile for; nothing can run on them.

    Only in a process with `ENVIRONMENT`.  Raises `ToolchainError` with the pip command for what is
    missing, `ConfigError` if there is no such slice.
    """
    from jax.experimental import topologies

    _check_toolchain(target)
    try:
        if target.chip.tpu:
            name = f"{target.chip.tpu.topology}:{target.slice}"
            topology = topologies.get_topology_desc(name, platform="tpu")
        else:
            topology = topologies.get_topology_desc(
                target.chip.name, platform="cuda", topology=f"1x1x{target.devices}",
                target_config=gpu_proto(target.chip),
            )  # fmt: skip
    except Exception as error:  # jaxlib has no type for it
        raise ConfigError(f"target {target.text!r}: {error}") from error
    found = list(topology.devices)
    if target.devices and target.devices > len(found):
        raise ConfigError(
            f"target {target.text!r}: a host has {len(found)} devices; for more name a slice, such "
            f"as {target.text.partition(':')[0]}:{target.slice}"
        )
    return found[: target.devices]


def _check_toolchain(target: Target) -> None:
    """Raise `ToolchainError` unless the compiler is installed that the jax here was made with."""
    import jax

    if target.chip.tpu:
        extra, wanted = "aot-tpu", {"libtpu": _libtpu_of_jax()}
    else:
        extra = "aot-gpu"
        wanted = {"jax-cuda13-plugin": jax.__version__, **dict.fromkeys(GPU_DISTRIBUTIONS, "")}
    for name, version in wanted.items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            found = ""
        if not found or not f"{found}.".startswith(f"{version}." if version else ""):
            raise ToolchainError(
                f"target {target.text!r} needs {name} {version}".rstrip()
                + (f" beside jax {jax.__version__}, not {found}" if found else "")
                + f": pip install 'jaxinfer[{extra}]'"
            )


def _libtpu_of_jax() -> str:
    """The release of libtpu that the installed jax names in its extra `tpu`: "0.0.42"."""
    for line in metadata.requires("jax") or ():
        if found := re.match(r"libtpu==([\d.]+?)(\.\*)?(\s|;)", line):
            return found[1]
    return ""


def gpu_proto(chip: Chip) -> str:
    """XLA's description of a GPU (`stream_executor.GpuTargetConfigProto`) as text."""
    gpu = chip.gpu
    if gpu is None:
        raise ConfigError(f"configs/hardware/{chip.name}.yaml: gpu is missing")
    found = re.fullmatch(r"(\d+)\.(\d)(a?)", gpu.compute_capability)
    if not found:
        raise ConfigError(
            f"configs/hardware/{chip.name}.yaml: gpu.compute_capability must be such as '8.9' or "
            f"'9.0a', got {gpu.compute_capability!r}"
        )
    feature = "ACCELERATED_FEATURES" if found[3] else "NONE"
    # Without a version of CUDA, XLA believes that cuBLASLt has no products of fp8.
    return f"""
platform_name: "CUDA"
device_description_str: "{chip.device_kinds[0]}"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
gpu_device_info {{
  name: "{chip.device_kinds[0]}"
  device_vendor: "NVIDIA Corporation"
  runtime_version: "13.0.0"
  cuda_compute_capability {{ major: {found[1]} minor: {found[2]} feature_extension: {feature} }}
  core_count: {gpu.sm_count}
  fpus_per_core: {gpu.fpus_per_sm}
  clock_rate_ghz: {gpu.clock_ghz}
  memory_bandwidth: {int(chip.bytes_per_second)}
  device_memory_size: {gpu.visible_bytes}
  l2_cache_size: {gpu.l2_bytes}
  shared_memory_per_core: {gpu.shared_memory_per_sm}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {gpu.shared_memory_per_block}
  threads_per_core_limit: {gpu.threads_per_sm}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
}}
"""
