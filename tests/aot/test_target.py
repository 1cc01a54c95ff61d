"""Targets, what they need, and the process that compiles for them."""

import functools
import os

import jax
import jax.numpy as jnp
import pytest

from jaxinfer import configs
from jaxinfer.aot import Workload, compile_for, isolate, target
from jaxinfer.aot.__main__ import main, table
from jaxinfer.aot.compile import _refusal, warnings_in
from jaxinfer.aot.engine import (
    Bound,
    Estimate,
    _about,
    _bound,
    _decode_step,
    _prefill_step,
    _say,
    abstract_engine,
)
from jaxinfer.errors import CompileError, ConfigError, InsufficientMemoryError, ToolchainError


@pytest.mark.parametrize(
    ("text", "chip", "place", "devices"),
    [
        ("h200:8", "h200", "", 8),
        ("l4", "l4", "", 1),
        ("v6e:1", "tpu-v6e", "2x2", 1),
        ("v5e:2x4", "tpu-v5e", "2x4", None),
        ("tpu-v5p:2x2x2", "tpu-v5p", "2x2x2", None),
        ("tpu7x:2x2x1", "tpu7x", "2x2x1", None),
    ],
)
def test_targets_are_read(text, chip, place, devices):
    found = target.parse(text)
    assert (found.chip.name, found.slice, found.devices) == (chip, place, devices)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h300:1", "there is no chip 'h300'; there are: a100, b200"),
        ("h200:2x4", "'2x4' must be a number"),
        ("h200:0", "'0' must be a number"),
        ("v6e:many", "'many' must be a number of devices or a slice such as 2x2"),
    ],
)
def test_targets_that_are_none(text, message):
    with pytest.raises(ConfigError, match=message):
        target.parse(text)


def test_memory_is_that_of_one_device():
    chip = configs.load_chip("tpu7x")
    assert target.parse("tpu7x:1").memory_bytes == chip.memory_bytes // 2
    assert target.parse("h200:1").memory_bytes == 151_397_597_184


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("h200", ("core_count: 132", "major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES")),
        ("l4", ("core_count: 58", "major: 8 minor: 9 feature_extension: NONE")),
        ("b200", ("memory_bandwidth: 8000000000000", "major: 10 minor: 0")),
    ],
)
def test_gpus_are_described(name, lines):
    proto = target.gpu_proto(configs.load_chip(name))
    assert proto.count("{") == proto.count("}")
    assert 'platform_name: "CUDA"' in proto
    assert 'runtime_version: "13.' in proto
    for line in lines:
        assert line in proto


@pytest.mark.parametrize(
    ("text", "name", "wrong", "extra"),
    [
        ("v6e:1", "libtpu", "0.0.1", "aot-tpu"),
        ("h200:1", "jax-cuda13-plugin", "0.1.0", "aot-gpu"),
        ("h200:1", "nvidia-nvvm", None, "aot-gpu"),
    ],
)
def test_what_is_missing_or_of_another_release_is_named(monkeypatch, text, name, wrong, extra):
    def version(asked):
        if asked != name:
            return target._libtpu_of_jax() if asked == "libtpu" else jax.__version__
        if wrong is None:
            raise target.metadata.PackageNotFoundError(asked)
        return wrong

    monkeypatch.setattr(target.metadata, "version", version)
    with pytest.raises(ToolchainError, match=rf"{name}.*pip install 'jaxinfer\[{extra}\]'"):
        target.devices(target.parse(text))


def test_jax_says_which_libtpu_it_wants():
    assert target._libtpu_of_jax().startswith("0.0.")


def environment_of_the_child(*names):
    return [os.environ.get(name) for name in names]


def fails(error):
    raise error


def dies():
    os.write(2, b"no such instruction\n")
    os.abort()


def test_a_job_is_done_elsewhere():
    found, _ = isolate.run(environment_of_the_child, "JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES")
    assert found == ["cpu", ""]
    assert isolate.run(os.getpid)[0] != os.getpid()
    assert isolate.run(functools.partial(divmod, 7), 2)[0] == (3, 1)


def test_what_goes_wrong_elsewhere_is_told():
    with pytest.raises(ConfigError, match="a field"):
        isolate.run(fails, ConfigError("a field"))
    with pytest.raises(CompileError, match="ZeroDivisionError: nothing"):
        isolate.run(fails, ZeroDivisionError("nothing"))
    with pytest.raises(CompileError, match=r"ended the process.*\n.*no such instruction"):
        isolate.run(dies)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("Ran out of memory on HBM, the total memory required", InsufficientMemoryError),
        ("Ran out of memory in memory space hbm. Used 18G of 15G hbm.", InsufficientMemoryError),
        ("Ran out of memory in memory space vmem.\nProgram hbm requirement 3G", CompileError),
    ],
)
def test_a_program_too_large_is_told_from_a_kernel_too_large(message, kind):
    error = _refusal(target.parse("v6e:1"), "decode", f"RESOURCE_EXHAUSTED: {message}")
    assert type(error) is kind
    assert "decode for v6e:1" in str(error)


def test_functions_without_a_name_are_refused():
    with pytest.raises(ConfigError, match="move it to the top level"):
        compile_for("v6e:1", lambda x: x, jnp.ones(3))


def test_a_workload_is_checked():
    with pytest.raises(ConfigError, match="batch must be a whole number above 0, got 0"):
        Workload(model="demo", batch=0)
    with pytest.raises(ConfigError, match="dtype must be one of auto, float32"):
        Workload(model="demo", dtype="int3")
    with pytest.raises(ConfigError, match=r"kv_cache_dtype must be .*int4, got 'int3'"):
        Workload(model="demo", kv_cache_dtype="int3")


def test_bounds_are_the_slower_of_two():
    bound = Bound(64, hbm_bytes=8, flops=9, byte_seconds=0.5, flop_seconds=0.25)
    assert (bound.seconds, bound.tokens_per_second) == (0.5, 128)
    assert Bound(64, 8, 9, 0.5, None).seconds == 0.5


def bound(kind, where, **workload):
    workload = Workload(**workload)
    step, weights, _ = abstract_engine(jax.devices(), workload)
    return _bound(target.parse(where).chip, step, weights, kind(workload))


def test_the_bound_of_a_decode_step():
    """Llama 3.1 8B in bfloat16 on one H200 reads 15.0 GB a token: 320 tokens/s."""
    alone = bound(_decode_step, "h200:1", model="llama-3.1-8b", batch=1, context=1)
    assert alone.tokens_per_second == pytest.approx(320, rel=0.005)
    # Keys and values: 32 layers, 8 heads, 128 wide, 2 bytes, twice.
    many = bound(_decode_step, "h200:1", model="llama-3.1-8b", batch=64, context=1024)
    kept = 64 * 1024 * 2 * 32 * 8 * 128 * 2
    assert many.hbm_bytes == pytest.approx(alone.hbm_bytes + kept, rel=1e-3)
    split = bound(
        _decode_step, "h200:2", model="llama-3.1-8b", batch=64, context=1024, tensor_parallel_size=2
    )
    assert split.hbm_bytes == pytest.approx(many.hbm_bytes / 2, rel=1e-2)
    assert split.flops == many.flops / 2


def test_a_quantised_cache_is_counted_with_its_scales():
    alone, many = (
        bound(
            _decode_step,
            "h200:1",
            model="llama-3.1-8b",
            batch=rows,
            context=tokens,
            kv_cache_dtype="int4",
        )
        for rows, tokens in ((1, 1), (64, 1024))
    )
    kept = 64 * 1024 * 2 * 32 * 8 * (128 // 2 + 4)
    assert many.hbm_bytes == pytest.approx(alone.hbm_bytes + kept, rel=1e-3)


def test_the_bound_of_a_prefill_step():
    """Two operations a weight, the head's for one position, and 4 N H a pair of positions."""
    step = bound(_prefill_step, "h100:1", model="llama-3.1-8b", context=4096, prefill=2048)
    layers, head = 32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336), 128256 * 4096
    pairs = 32 * 2048 * 2049 // 2
    wanted = 2 * layers * 2048 + 2 * head + 4 * 4096 * pairs
    assert step.flops == pytest.approx(wanted, rel=1e-3)  # norms count as weights
    assert step.seconds == step.flops / 989.4e12


def test_a_window_bounds_what_is_read():
    wide = bound(_decode_step, "h100:1", model="mistral-7b-v0.1", batch=8, context=4096)
    twice = bound(_decode_step, "h100:1", model="mistral-7b-v0.1", batch=8, context=8192)
    assert wide.hbm_bytes == pytest.approx(twice.hbm_bytes, rel=1e-3)  # its window is 4096


def test_the_table_says_whether_it_fits():
    def estimate(needed):
        bound = Bound(64, 8, 9, 0.5, 0.25)
        return Estimate(
            "h200:1", Workload(model="demo"), 1, {}, {}, 10, 20, needed, 100, bound, None, None
        )

    assert "it fits" in table(estimate(100))
    assert "it does not fit" in table(estimate(101))
    assert not estimate(None).fits


def test_the_command_refuses_what_it_cannot_do(capsys):
    assert main(["--model", "demo", "--target", "h300:1"]) == 2
    assert "there is no chip 'h300'" in capsys.readouterr().err
    assert main(["--model", "demo", "--target", "h200:1", "--batch", "0"]) == 2


SPILLED = "ptxas warning : Registers are spilled to local memory in function 'kernel'"


def test_what_the_assembler_always_says_is_no_warning():
    said = """
ptxas info    : Compiling entry function 'kernel' for 'sm_90a'
ptxas info    : Function properties for kernel
    264 bytes stack frame, 460 bytes spill stores, 372 bytes spill loads
ptxas info    : Used 255 registers, used 2 barriers, 264 bytes cumulative stack size, 1 bytes smem
"""
    assert warnings_in(said) == ()
    assert warnings_in(f"{said}\n{SPILLED}, 460 bytes spill stores\n")[0].startswith(SPILLED)


def compile_two_programs():
    """Writes past Python's streams, as compilers do: of one program on the first, of the other on
    the second."""
    for number, name in enumerate(("decode", "prefill"), 1):
        _say(name)
        os.write(number, f"{SPILLED} of {name}\n".encode())
    _say("head")


def test_warnings_stand_with_their_program():
    _, said = isolate.run(compile_two_programs, timeout=120)
    for name in ("decode", "prefill"):
        assert warnings_in(_about(name, said)) == (f"{SPILLED} of {name}",)
    assert warnings_in(_about("head", said)) == ()
