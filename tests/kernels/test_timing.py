"""The timer with a clock of its own, and what is known of the device."""

from dataclasses import replace

import pytest

from jaxinfer.configs import load_chip
from jaxinfer.kernels import timing


class Device:
    """A call takes `host` to dispatch and `device` to run; the first one compiles."""

    def __init__(self, host, device, compiling=5.0):
        self.now, self.free, self.calls = 0.0, 0.0, []
        self.host, self.device, self.compiling = host, device, compiling

    def call(self, number):
        self.now += self.host + (0 if self.calls else self.compiling)
        self.calls.append(number)
        self.free = max(self.free, self.now) + self.device
        return self.free

    def seconds(self, **options):
        def block(until):
            self.now = max(self.now, until)

        return timing.seconds_per_call(self.call, block=block, clock=lambda: self.now, **options)


def test_the_hosts_time_is_hidden_and_compiling_left_out():
    device = Device(host=1e-5, device=1e-4)
    assert device.seconds() == pytest.approx(1e-4, rel=0.01)
    assert device.calls == list(range(len(device.calls))), "arrays take turns by the number"


def test_where_the_host_is_slower_it_is_what_is_seen():
    assert Device(host=1e-4, device=1e-5).seconds() == pytest.approx(1e-4, rel=0.01)


def test_the_time_for_all_rounds_is_kept_to():
    quick = Device(host=0, device=1e-6)
    quick.seconds()
    assert len(quick.calls) == 2 + timing.ROUNDS * timing.MOST_CALLS
    slow = Device(host=0, device=10.0)
    assert slow.seconds() == pytest.approx(10.0)
    assert len(slow.calls) == 2 + 3
    usual = Device(host=0, device=1e-3, compiling=0)
    usual.seconds(seconds=0.5)
    assert usual.now == pytest.approx(0.5, rel=0.02)


def test_copies_are_more_than_a_cache_holds():
    h100 = load_chip("h100")
    assert timing.copies_needed(10**9, h100) == 1
    assert timing.copies_needed(h100.gpu.l2_bytes, h100) == timing.CACHE_TIMES
    assert timing.copies_needed(1, None) == timing.MOST_COPIES


def test_the_floor_is_the_larger_of_two():
    limits = timing.Ceilings(1e9, 1, 1e12, "bfloat16", 1, 1e-6)
    assert limits.floor(10**9, 10**9) == 1.0
    assert limits.floor(10**6, 2 * 10**12) == 2.0
    assert replace(limits, bytes_per_second=1e6).floor(10**6, 0) == 1.0


def test_ceilings_of_the_cpu_are_of_this_world():
    limits = timing.ceilings("cpu", copy_bytes=2**20, matrix=64)
    assert 1e7 < limits.bytes_per_second < 1e13
    assert 1e6 < limits.flops_per_second < 1e14
    assert limits.dtype == "float32"


def test_versions_and_the_driver(tmp_path):
    assert timing.versions()["jax"]
    proc = tmp_path / "version"
    proc.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release\n"
    )
    assert timing.driver(proc) == "570.124.06"
    proc.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Tue Jun  6\n")
    assert timing.driver(proc) == "535.54.03"
