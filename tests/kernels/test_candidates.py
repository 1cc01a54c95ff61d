"""What a sweep tries: the heuristic's choice first, nothing that does not fit, each once."""

from dataclasses import replace

import jax
import pytest

from jaxinfer.configs import chips, load_chip
from jaxinfer.errors import ConfigError, ShapeError
from jaxinfer.kernels import candidates, cases, choice, workloads
from jaxinfer.kernels.gpu import Gpu
from jaxinfer.kernels.tuning import backend_of
from tests.marks import NEEDS_MOSAIC_GPU

CHIPS = [
    name for name in chips()
    if load_chip(name).tpu or jax.__version_info__ >= choice.GPU_NEEDS_JAX
]  # fmt: skip


def swept(chip):
    for op in candidates.OPS:
        known = cases.REAL if op == "paged_attention" else cases.REAL_PRODUCTS
        for name, case in known.items():
            if op.endswith("matmul") and case.single != (op == "quantized_matmul"):
                continue
            try:
                workloads.implementation(op, case, backend_of(chip), chip)
            except ConfigError:
                continue
            for sweep in candidates.sweeps(op, name, case, chip):
                yield sweep, case


@pytest.mark.parametrize("name", CHIPS)
def test_every_sweep_begins_with_the_heuristic_and_fits(name):
    chip, count = load_chip(name), 0
    for sweep, case in swept(chip):
        count += 1
        assert len(set(sweep.choices)) == len(sweep.choices) <= 20
        if isinstance(case, cases.Product):
            x, weight = _stacked(case)
            if chip.tpu:
                from jaxinfer.kernels import grouped_matmul_tpu as module

                facts = {"vmem_bytes": chip.tpu.vmem_bytes}
            else:
                from jaxinfer.kernels import grouped_matmul_gpu as module

                facts = {"gpu": Gpu.of(chip)}
            assert sweep.choices[0] == module.block_sizes(x, weight, **facts)
            for blocks in sweep.choices:
                module.check_blocks(blocks, weight, **facts)
        else:
            assert sweep.argument == sweep.key["part"]
            single = sweep.argument == "single"
            q_TKGH, pool, rows = cases.abstract(case)
            if chip.tpu:
                from jaxinfer.kernels import paged_attention_tpu as module

                vmem, cores = chip.tpu.vmem_bytes, chip.tpu.cores
                first = module.block_sizes(
                    q_TKGH, pool, rows, single=single, vmem_bytes=vmem * 3 // 4, num_cores=cores
                )
                for blocks in sweep.choices:
                    module.check_blocks(
                        blocks, q_TKGH, pool, single=single, vmem_bytes=vmem, num_cores=cores
                    )
            else:
                from jaxinfer.kernels import paged_attention_gpu as module
                from jaxinfer.kernels.paged_attention_gpu_work import Problem

                gpu = Gpu.of(chip)
                problem = Problem(case.K, case.G, case.H, case.S, case.stored, 1.0, None, None)
                first = module.choose_tiling(gpu, problem, split=single)
                for blocks in sweep.choices:
                    module.check_tiling(blocks, gpu, problem, split=single)
            assert sweep.choices[0] == first
    assert bool(count) == (name not in ("a100", "l4")), "these have neither wgmma nor tcgen05"


def _stacked(case):
    return cases.abstract_product(replace(case, single=False))[:2]


def test_a_mixed_batch_has_a_sweep_for_each_kind_of_rows():
    case = cases.REAL["llama-3.1-8b, mixed 32 x 1k + 1024"]
    found = candidates.sweeps("paged_attention", "mixed", case, load_chip("tpu-v6e"))
    assert [sweep.argument for sweep in found] == ["single", "tiles"]
    assert all(blocks.queries == 1 for blocks in found[0].choices)
    assert len({blocks.queries for blocks in found[1].choices}) > 1
    assert len({blocks.pages for blocks in found[0].choices}) > 1


@NEEDS_MOSAIC_GPU
@pytest.mark.parametrize("case", ["llama-3.1-8b, decode 64 x 1k", "gpt-oss-20b, decode 64 x 1k"])
def test_decode_attention_on_hopper_varies_all_that_may_vary(case):
    found = candidates.sweeps("paged_attention", case, cases.REAL[case], load_chip("h100"))
    for name in ("groups", "block", "stages"):
        assert len({getattr(tiling, name) for tiling in found[0].choices}) > 1, name


@NEEDS_MOSAIC_GPU
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"split": False}, "split must be True"),
        ({"rows": 128}, "rows must be 8"),
        ({"block": 96}, "block must be 64 or 128"),
        ({"groups": 3}, "groups 1 or 2"),
        ({"stages": 3}, "equally many of each"),
        ({"stages": 40}, "bytes do not fit 232448"),
    ],
)
def test_tilings_that_attention_on_gpu_cannot_take(changes, words):
    from jaxinfer.kernels.paged_attention_gpu import check_tiling, choose_tiling
    from jaxinfer.kernels.paged_attention_gpu_work import Problem

    gpu = Gpu.of(load_chip("h100"))
    problem = Problem(8, 4, 128, 64, "bfloat16", 1.0, None, None)
    tiling = choose_tiling(gpu, problem, split=True)
    check_tiling(tiling, gpu, problem, split=True)
    with pytest.raises(ShapeError, match=words):
        check_tiling(replace(tiling, **changes), gpu, problem, split=True)


@NEEDS_MOSAIC_GPU
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": 32}, "tokens must be one of"),
        ({"depth": 32}, "depth must be 64 or 128"),
        ({"width": 100}, "width must be one of"),
        ({"stages": 0}, "stages must be from 1 to 32"),
        ({"per_sm": 9}, "bytes do not fit 232448"),
        ({"tokens": 128, "per_sm": 3, "stages": 1}, "more than a multiprocessor holds"),
    ],
)
def test_blocks_that_products_on_gpu_cannot_take(changes, words):
    from jaxinfer.kernels.grouped_matmul_gpu import block_sizes, check_blocks

    x, weight = _stacked(cases.REAL_PRODUCTS["qwen3-30b-a3b, decode 64, w4a16"])
    facts = {"gpu": Gpu.of(load_chip("h100"))}
    blocks = block_sizes(x, weight, **facts)
    check_blocks(blocks, weight, **facts)
    with pytest.raises(ShapeError, match=words):
        check_blocks(replace(blocks, **changes), weight, **facts)


CASE = cases.REAL["llama-3.1-8b, decode 64 x 1k"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"queries": 2}, "queries must be 1"),
        ({"heads": 3}, "heads must divide K = 8"),
        ({"depth": 1}, "depth must be at least 2"),
        ({"pages": 0}, "all must be at least 1"),
        ({"pages": 4096}, "bytes do not fit"),
    ],
)
def test_blocks_that_attention_on_tpu_cannot_take(changes, words):
    from jaxinfer.kernels.paged_attention_tpu import block_sizes, check_blocks

    q_TKGH, pool, rows = cases.abstract(CASE)
    blocks = block_sizes(q_TKGH, pool, rows, single=True, vmem_bytes=2**25)
    check_blocks(blocks, q_TKGH, pool, single=True, vmem_bytes=2**25)
    with pytest.raises(ShapeError, match=words):
        check_blocks(replace(blocks, **changes), q_TKGH, pool, single=True, vmem_bytes=2**25)
