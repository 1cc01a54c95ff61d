"""What a case must move and compute, by hand or by enumeration; its arrays; who can run it."""

import jax
import numpy as np
import pytest

from jaxinfer.configs import load_chip
from jaxinfer.errors import ConfigError
from jaxinfer.kernels import cases, workloads
from jaxinfer.kernels.cases import Case, Product
from tests.kernels.ragged import Batch

MIXED = Case(((1, 9), (1, 130), (5, 5), (40, 60)), K=2, G=3, H=64, S=16, window=7)


def test_attention_moves_what_its_rows_see():
    slots, pairs = set(), 0
    for row, (queries, length) in enumerate(MIXED.lens):
        for position in range(length - queries, length):
            seen = range(max(0, position - MIXED.window + 1), position + 1)
            slots |= {(row, slot) for slot in seen}
            pairs += len(seen)
    num_bytes, flops = workloads.work("paged_attention", MIXED)
    vectors = 2 * MIXED.num_tokens * 2 * 3 * 64 * 2
    assert num_bytes == vectors + len(slots) * 2 * 2 * 64 * 2
    assert flops == 4 * pairs * 2 * 3 * 64


@pytest.mark.parametrize(("stored", "slot"), [("float32", 256), ("int8", 68), ("uint8", 36)])
def test_a_slot_has_its_numbers_and_its_scale(stored, slot):
    case = Case(((1, 16),), K=2, G=1, H=64, S=16, stored=stored)
    itemsize = 4 if stored == "float32" else 2
    vectors = 2 * 2 * 64 * itemsize
    assert workloads.work("paged_attention", case)[0] == vectors + 16 * 2 * 2 * slot
    assert workloads.work("write_pages", case) == (2 * 2 * 64 * itemsize + 2 * 2 * slot, 0)


def test_products_read_the_weights_of_groups_with_tokens():
    case = Product((0, 3, 5, 0), D=256, F=128, format="w4a16")
    num_bytes, flops = workloads.work("grouped_matmul", case)
    weight = 256 * 128 // 2 + 2 * 128 * 2  # two scales of bfloat16 along D
    assert num_bytes == 2 * weight + 8 * (256 + 128) * 2
    assert flops == 2 * 8 * 256 * 128
    plain = Product((8,), D=256, F=128)
    assert workloads.work("grouped_matmul", plain)[0] == 256 * 128 * 2 + 8 * (256 + 128) * 2


@pytest.mark.parametrize(
    "name", [n for n, c in cases.SMALL.items() if n.startswith(("mixed", "tokens", "nothing"))][::3]
)
def test_rows_are_those_that_the_tests_of_kernels_have(name):
    """But for padding, and for which pages they lie on."""
    case = cases.SMALL[name]
    found, want = workloads.rows_of(case), Batch.of(case, scale=1.0, padding=0).rows
    for part in ("positions_T", "rows_T", "num_tokens", "num_single"):
        np.testing.assert_array_equal(getattr(found, part), getattr(want, part), err_msg=part)
    rows = int(found.num_rows)
    for part in ("query_starts_B", "query_lens_B", "kv_lens_B"):
        np.testing.assert_array_equal(getattr(found, part), getattr(want, part)[:rows])
    used = [
        tuple(table[: -(-length // case.S)])
        for table, length in zip(found.page_table_BM, found.kv_lens_B, strict=True)
    ]
    pages = [page for table in set(used) for page in table]
    if not case.row_per_token:
        assert len(pages) == len(set(pages)), "no page has two holders"
    assert all(0 < page < case.num_pages for page in pages)


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, names in cases.TIMED_ON_CPU.items() for name in names[:1]]
)
def test_arrays_have_the_shapes_of_their_case(op, name):
    case = workloads.case_of(op, name)
    found = jax.eval_shape(lambda: workloads.arguments(op, case))
    if isinstance(case, Product):
        want = [leaf for leaf in cases.abstract_product(case) if leaf is not None]
    else:
        q_TKGH, pool, rows = cases.abstract(case)
        new = jax.ShapeDtypeStruct((case.num_tokens, case.K, case.H), q_TKGH.dtype)
        want = [pool, new, new, rows] if op == "write_pages" else [q_TKGH, pool, rows, None]
    shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(found)]
    assert shapes == [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(want)]


@pytest.mark.parametrize(
    ("op", "case", "backend", "chip", "words"),
    [
        ("paged_attention", MIXED, "mosaic_tpu", None, "mosaic_tpu: the device is no TPU"),
        ("paged_attention", MIXED, "mosaic_gpu", "a100", "mosaic_gpu: "),
        ("quantized_matmul", Product((8,), 256, 128, "int8", single=True), "mosaic_tpu", "tpu-v6e",
         "no kernel is needed"),
        ("quantized_matmul", Product((8,), 256, 128, "w8a16", single=True), "mosaic_gpu", "h200",
         "no kernel is needed"),
        ("quantized_matmul", Product((8,), 256, 128, "int8", single=True), "mosaic_gpu", "a100",
         "mosaic_gpu: "),
        ("grouped_matmul", Product((8,), 256, 128), "mosaic_gpu", None, "no NVIDIA GPU"),
        ("grouped_matmul", Product((8,), 256, 128), "mosaic_tpu", "h100", "only"),
    ],
)  # fmt: skip
def test_who_cannot_run_a_case_says_why(op, case, backend, chip, words):
    sheet = None if chip is None else load_chip(chip)
    with pytest.raises(ConfigError, match=words):
        workloads.implementation(op, case, backend, sheet)


def test_differences_are_relative_and_nan_is_infinite():
    one, other = np.float32([1, 2, 4]), np.float32([1, 2.5, 4])
    assert workloads.difference(other, one) == pytest.approx(0.125)
    assert workloads.difference(np.float32([np.nan]), np.float32([1])) == np.inf


def test_on_tpu_pools_lie_as_the_kernels_want_them(monkeypatch):
    """With the CPU in the role of a TPU: it has that order anyway, so nothing else changes."""
    case = Case(((1, 9), (4, 20)), K=2, G=1, H=16, S=16, stored="int8")
    plain = workloads.arguments("write_pages", case)
    want = workloads.implementation("write_pages", case, "reference", None)(*plain)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    pool, *rest = workloads.arguments("write_pages", case)
    for leaf in jax.tree.leaves(pool):
        assert leaf.format.layout.major_to_minor == tuple(range(leaf.ndim))
    written = workloads.implementation("write_pages", case, "reference", None)(pool, *rest)
    assert pool.k_PKSH.is_deleted(), "it was donated"
    assert workloads.difference(written, want) == 0


@pytest.mark.parametrize(("op", "single"), [("quantized_matmul", True), ("grouped_matmul", False)])
@pytest.mark.parametrize(("name", "minor"), [("fp8", "D"), ("int8", "D"), ("w8a16", "F")])
def test_on_gpu_weights_lie_as_they_are_multiplied(op, single, name, minor, monkeypatch):
    """With the CPU in the role of a GPU: it computes the same from either order."""
    case = Product((9,), D=128, F=64, format=name, single=single)
    plain = workloads.arguments(op, case)
    run = workloads.implementation(op, case, "reference", None)
    want = run(*plain)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x, weight, *sizes = workloads.arguments(op, case)
    order = weight.values.format.layout.major_to_minor
    assert order[-1] == weight.values.ndim - (2 if minor == "D" else 1)
    assert weight.shape == plain[1].shape
    np.testing.assert_array_equal(weight.values, plain[1].values)
    compiled = jax.jit(run).lower(x, weight, *sizes).compile()
    assert compiled.input_formats[0][1].values.layout.major_to_minor == order
    assert workloads.difference(run(x, weight, *sizes), want) < 1e-2


def test_every_name_that_is_timed_or_tuned_is_a_case():
    for names in (cases.TIMED, cases.TIMED_ON_CPU, cases.TUNED):
        for op, chosen in names.items():
            assert op in workloads.OPS
            for name in chosen:
                case = workloads.case_of(op, name)
                if isinstance(case, Product):
                    assert case.single == (op == "quantized_matmul"), name
    with pytest.raises(ConfigError, match="no case 'x'"):
        workloads.case_of("write_pages", "x")


@pytest.mark.parametrize(
    ("op", "case"),
    [
        ("paged_attention", MIXED),
        ("quantized_matmul", Product((8,), 64, 32, "int8", single=True)),
        ("grouped_matmul", Product((3, 0, 5), 64, 32, None, "float32")),
    ],
)
def test_a_program_makes_eight_calls_that_differ(op, case):
    call = workloads.implementation(op, case, "reference", None)
    sets = [workloads.arguments(op, case, seed) for seed in range(3)]
    results = workloads.in_one_program(op, case, call, sets)()
    assert len(results) == workloads.CALLS
    assert workloads.difference(results[0], call(*sets[0])) < 0.01
    tokens, own, *rest = sets[1]
    rest = sets[0][2:] if op == "paged_attention" else rest
    assert workloads.difference(results[4], call(tokens * (1 - 4 / 64), own, *rest)) < 0.01
    assert len({np.asarray(result, np.float32).tobytes() for result in results}) == len(results)
