"""The whole step, compiled for chips that are not here: what it copies, exchanges and reuses."""

import json
from pathlib import Path

import pytest

from jaxinfer.aot import Workload, compile_engine
from jaxinfer.aot.hlo import parse as parse_hlo
from jaxinfer.aot.target import parse
from tests.marks import NEEDS_MOSAIC_GPU

pytestmark = pytest.mark.compile

LAYERS, ROWS, CONTEXT, PAGE, PREFILL = 2, 16, 256, 32, 128
# Two layers and few words, but heads and widths of tiles that the chips like.
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 4096,
    "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": LAYERS,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072, "hidden_act": "silu", "rope_theta": 10000.0,
    "torch_dtype": "bfloat16", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Each with the devices that a layer is split over.
TPUS = {"v5e:2x2": 4, "v6e:1": 1, "v6e:2x4": 4, "v5p:2x2x1": 2, "tpu7x:2x2x1": 4}
GPUS = {"a100:1": 1, "l4:1": 1, "h100:2": 2, "h200:4": 4, "b200:2": 2}


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.mark.parametrize(("target", "devices"), [*TPUS.items(), *GPUS.items()])
def test_a_step_of_the_reference(model, target, devices):
    found = compile_engine(
        target,
        Workload(
            model=str(model), batch=ROWS, context=CONTEXT, prefill=PREFILL, page_size=PAGE,
            tensor_parallel_size=devices, attention_backend="reference",
        ),
    )  # fmt: skip
    assert found.fits
    assert not found.refused
    pool = (ROWS * CONTEXT // PAGE + 1) * PAGE * 4 * 128 * 2 // devices
    assert 2 * LAYERS * pool <= found.kv_cache < 1.5 * 2 * LAYERS * pool
    for name, program in found.programs.items():
        assert program.f64 == 0
        assert program.host_callbacks == ()
        assert len(program.aliased) == program.donated
        is_head = name == "head"
        assert program.donated == (1 if is_head else 2 * LAYERS + 6)  # pools and what is beside
        # Exchanged: two sums a layer and one to embed; of the head, the logits.
        reduced, gathered = (0, 1) if is_head else (2 * LAYERS + 1, 0)
        assert program.collective("all-reduce") == (reduced if devices > 1 else 0)
        assert program.collective("all-gather") == (gathered if devices > 1 else 0)
        others = {one.kind for one in program.collectives} - {"all-reduce", "all-gather"}
        assert others == set()
        assert [one for one in program.copies if one.bytes >= pool] == []


# Kernels of a decode step and of one with prompts too: of each layer, those that write and attend.
TPU_KERNELS, GPU_KERNELS = (2, 3), (2, 3)


@pytest.mark.parametrize(
    ("target", "head_dim", "kernels"),
    [
        ("v6e:1", 128, TPU_KERNELS),
        ("v6e:1", 64, TPU_KERNELS),  # XLA would lay these pages out otherwise, and copy them
        ("tpu7x:1", 128, TPU_KERNELS),
        pytest.param("h200:1", 128, GPU_KERNELS, marks=NEEDS_MOSAIC_GPU),
        pytest.param("b200:1", 128, GPU_KERNELS, marks=NEEDS_MOSAIC_GPU),
    ],
)
def test_a_step_with_the_chips_own_kernels(model, tmp_path, target, head_dim, kernels, kernel_ran):
    chip = parse(target).chip
    kernel_ran("paged_attention", f"mosaic_{'gpu' if chip.gpu else 'tpu'}", "bfloat16", chip.name)
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "head_dim": head_dim}))
    found = compile_engine(
        target,
        Workload(model=str(tmp_path), batch=ROWS, context=1024, prefill=PREFILL, page_size=128),
    )
    pool = (ROWS * 1024 // 128 + 1) * 128 * 4 * head_dim * 2
    for name, count in zip(("decode", "prefill"), kernels, strict=True):
        program = found.programs[name]
        assert sum(program.kernels.values()) == count * LAYERS
        assert len(program.aliased) == program.donated == 2 * LAYERS + 6
        assert [one for one in program.copies if one.bytes >= pool] == []


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
@pytest.mark.parametrize("target", [pytest.param("h200:1", marks=NEEDS_MOSAIC_GPU)])
def test_one_kernel_reads_what_comes_from_the_host_and_comes_before_all_others(
    model, tmp_path, monkeypatch, target, kv_cache_dtype
):
    """XLA updates each node of a CUDA graph that reads what has moved, and of a graph that begins
    with several kernels all but one may start late."""
    flags = f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text --xla_dump_hlo_pass_re=^$"
    monkeypatch.setenv("XLA_FLAGS", flags)
    compile_engine(
        target,
        Workload(
            model=str(model), batch=ROWS, context=1024, page_size=128, kv_cache_dtype=kv_cache_dtype
        ),
    )
    (dumped,) = tmp_path.glob(f"*backbone_{ROWS}.*gpu_after_optimizations.txt")
    entry = parse_hlo(dumped.read_text()).entry
    views = {"bitcast", "tuple", "get-tuple-element"}

    def readers(name):
        for one in entry.users[name]:
            yield from readers(one.name) if one.opcode in views else [one.name]

    def needs_another(one):
        return any(
            other.opcode not in views | {"parameter", "constant"} or needs_another(other)
            for other in (entry.instructions[name] for name in one.operands)
        )

    kernels = [
        one for one in entry.instructions.values()
        if one.opcode not in views | {"parameter", "constant"}
    ]  # fmt: skip
    assert len(kernels) > 10 * LAYERS
    (joined,) = [one for one in entry.parameters if one.label == "joined"]
    assert [one.name for one in kernels if not needs_another(one)] == list(readers(joined.name))
    assert len(list(readers(joined.name))) == 1


@pytest.mark.parametrize("target", ["v5e:1", "h100:1"])
def test_a_model_that_does_not_fit_is_told_so(model, target):
    found = compile_engine(target, Workload(model=str(model), batch=256, context=131072))
    assert not found.fits
    assert found.kv_cache > found.available
