"""What the machine offers: memory, and a place for compiled programs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax

# Old programs are dropped, least recently used first, when the cache outgrows this many bytes.
COMPILE_CACHE_BYTES = 4 * 2**30


def free_bytes(device: Any) -> int:
    """Bytes that can still be allocated on a device; on CPU, of the machine's memory."""
    if device.platform == "cpu":
        return _free_host_bytes()
    stats = device.memory_stats() or {}
    return int(stats.get("bytes_limit", 0)) - int(stats.get("bytes_in_use", 0))


def _free_host_bytes() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def enable_compile_cache() -> None:
    """Keep compiled programs between processes, in the user's cache folder.

    Every setting that the user has made (by `jax.config` or environment) is left as it is.
    """
    if jax.config.values.get("jax_compilation_cache_dir") is not None:
        return
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    jax.config.update("jax_compilation_cache_dir", str(Path(home) / "jaxinfer" / "programs"))
    # JAX's default keeps only what took a second to compile: most of our programs take less.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_compilation_cache_max_size", COMPILE_CACHE_BYTES)
