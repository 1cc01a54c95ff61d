"""The GPU kernels of attention, in the interpreter, against a float64 softmax written per token."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.kernels import cases
from tests.kernels.ragged import Batch

if jax.__version_info__ < (0, 11):
    pytest.skip("the GPU interpreter is public from JAX 0.11 on", allow_module_level=True)

from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxinfer.kernels import paged_attention_gpu as attention
from jaxinfer.kernels import paged_attention_gpu_compute as compute
from jaxinfer.kernels import paged_attention_gpu_units as units
from jaxinfer.kernels.paged_attention_gpu_work import Problem

SCALE = 0.2
# Queries, weights and results are bfloat16: 2^-9 each of values of a few.
CLOSE = 2e-2
# Few multiprocessors: each has several items, and a ring that goes on from one to the next.
HOPPER = attention.Gpu(capability=(9, 0), multiprocessors=1, shared_bytes=232_448)
BLACKWELL = replace(HOPPER, capability=(10, 0), multiprocessors=2)


class Interpreted(units.Wgmma):
    """wgmma takes weights from registers, which the interpreter does not know."""

    def scores(self, q_ref, k_ref):
        return jnp.dot(q_ref[...], k_ref[...].T, preferred_element_type=jnp.float32)

    def weigh(self, acc, shrink, weights, v_ref):
        weighed = jnp.dot(weights, v_ref[...], preferred_element_type=jnp.float32)
        return acc * shrink[:, None] + weighed


class InterpretedTurned(units.Turned):
    """Transposed as the kernel has it, keys in registers or not."""

    @staticmethod
    def keys(part):
        return units.exchanged(part)

    def scores(self, q_ref, *keys, meanwhile=None):
        keys = jnp.concatenate([key[...] for key in keys], axis=1)
        turned = jnp.dot(keys, q_ref[...].T, preferred_element_type=jnp.float32)
        if meanwhile is not None:
            meanwhile()
        self.scores_ref[:, : turned.shape[0]] = turned.T
        return self.scores_ref[:, : turned.shape[0]]

    def leave(self, some, ref):
        ref[...] = some.T

    def weigh(self, acc, shrink, weights, v_ref):
        self.weights_ref[...], self.shrink_ref[...] = weights, shrink
        weighed = jnp.dot(v_ref[...].T, self.weights_ref[...].T, preferred_element_type=jnp.float32)
        return acc * self.shrink_ref[...][None] + weighed


@pytest.fixture(autouse=True)
def interpreter(monkeypatch, gpu_interpreter):
    monkeypatch.setitem(units.UNITS, 9, Interpreted)
    monkeypatch.setitem(units.FOR_FEW_ROWS, 9, InterpretedTurned)
    monkeypatch.setattr(
        compute,
        "float16_of_bytes",
        lambda x, bias, _: (x.astype(jnp.int32) - bias).astype("float16"),
    )
    # A part holds few slots, or no row here would have two.
    monkeypatch.setattr(attention, "SHORTEST_PART", 64)


def check(case: cases.Case, gpu: attention.Gpu) -> None:
    batch = Batch.of(case, SCALE)

    def attend(q, pool, rows, sinks):
        return attention.paged_attention(
            q, pool, rows, gpu=gpu, scale=SCALE, window=case.window, soft_cap=case.soft_cap,
            sinks_KG=sinks,
        )  # fmt: skip

    # Most of the time goes into compiling the interpreter's loops; they need not be good code.
    quick = jax.jit(attend, compiler_options={"xla_backend_optimization_level": 0})
    out = np.asarray(quick(batch.q, batch.after, batch.rows, batch.sinks), np.float64)
    np.testing.assert_allclose(out[: case.num_tokens], batch.want, rtol=CLOSE, atol=CLOSE)
    assert np.isfinite(out).all(), "padding must come out finite"


# Every value of every column of the list that these kernels take; each costs seconds.
HERE = (
    "decode-3x4x64-page64-uint8-cap-sinks",
    "decode-2x8x96-page128-float8_e4m3fn-window40-cap-sinks",
    "tokens-2x7x80-page128-int8-window5-sinks",
    "chunk-3x1x128-page16-bfloat16-window40-cap-sinks",
    "prefill-2x7x256-page64-uint8-window5-cap-sinks",
    "mixed-2x8x64-page32-bfloat16-window5-cap-sinks",
    "mixed-2x4x256-page128-float8_e5m2-window40",
    "nothing-2x4x64-page16-bfloat16",
)


@pytest.mark.parametrize("name", HERE)
def test_hopper_matches_a_plain_softmax(name, kernel_ran):
    kernel_ran("paged_attention", "mosaic_gpu", cases.SMALL[name].stored, "interpreted")
    check(cases.SMALL[name], HOPPER)


def test_hopper_packed_keys_from_registers():
    """Both halves of int4 in the order of the queries, by warpgroups with heads of their own."""
    lens = ((1, 9), (1, 64), (1, 65), (1, 200))
    check(cases.Case(lens, K=2, G=4, H=128, S=64, stored="uint8", sinks=True), HOPPER)


@pytest.mark.parametrize(
    "name", ["chunk-1x4x80-page32-float8_e4m3fn", "tokens-1x4x96-page64-bfloat16-cap-sinks"]
)
def test_blackwell_matches_a_plain_softmax(name):
    check(cases.SMALL[name], BLACKWELL)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (12, 0)])
def test_chips_without_the_matrix_units_are_refused(capability):
    """Lowering for them would end the process."""
    q_TKGH, pool, _ = cases.abstract(cases.SMALL["decode-3x1x256-page128-bfloat16"])
    assert attention.why_not(HOPPER, q_TKGH, pool) is None
    refusal = attention.why_not(replace(HOPPER, capability=capability), q_TKGH, pool)
    assert refusal is not None
    assert str(capability) in refusal


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("decode-2x7x80-page64-float32-window40-cap-sinks", "queries are float32"),
        ("decode-2x1x80-page16-uint8-window5-cap-sinks", "40 bytes"),
        ("tokens-2x8x128-page16-float8_e5m2-window40", "page size 16"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_reason(name, reason):
    q_TKGH, pool, _ = cases.abstract(cases.SMALL[name])
    assert reason in attention.why_not(HOPPER, q_TKGH, pool)


@pytest.mark.parametrize("gpu", [HOPPER, BLACKWELL])
def test_a_ring_fits_wherever_nothing_is_refused(gpu):
    for case in (cases.SMALL | cases.REAL).values():
        q_TKGH, pool, _ = cases.abstract(case)
        if attention.why_not(gpu, q_TKGH, pool):
            continue
        problem = Problem(case.K, case.G, case.H, case.S, case.stored, SCALE, None, None)
        for split in (True, False):
            assert attention.choose_tiling(gpu, problem, split=split).stages > 1


@pytest.mark.parametrize(
    ("H", "stored", "stages"),
    [(128, "bfloat16", 6), (192, "bfloat16", 4), (256, "int8", 4), (256, "uint8", 6)],
)
def test_tiles_of_two_heads_leave_the_ring_its_room(H, stored, stages):
    """With two places, a warpgroup would wait for each of its blocks."""
    problem = Problem(8, 8, H, 64, stored, SCALE, None, None)
    tiling = attention.choose_tiling(HOPPER, problem, split=True)
    assert tiling.heads(problem) == 2
    assert tiling.stages == stages


def columns_of_threads(layout):
    """Which columns of sixteen a thread holds in row 0, in the order of its registers."""
    place = np.arange(64 * 16).reshape(64, 16)
    for tile in layout.tiling.tiles:
        lead, rest = place.shape[: -len(tile)], place.shape[-len(tile) :]
        pairs = [size for n, each in zip(rest, tile, strict=True) for size in (n // each, each)]
        order = [*range(0, 2 * len(tile), 2), *range(1, 2 * len(tile), 2)]
        axes = [*range(len(lead)), *(len(lead) + n for n in order)]
        place = place.reshape(*lead, *pairs).transpose(axes)
    lanes = np.moveaxis(place, layout.lane_dims, range(len(layout.lane_dims)))
    lanes = lanes.reshape(32, -1)
    return [[at for at in lane if at < 16] for lane in lanes if (lane < 16).any()]


def test_queries_have_the_order_of_keys_in_registers():
    """`four_as_two_and_two` moves nothing: what it is given as one layout, it calls another."""
    given, taken = (
        columns_of_threads(layout.to_mgpu()) for layout in (units.Turned.KEYS, plgpu.Layout.WGMMA)
    )
    order = np.empty(16, int)
    for ours, theirs in zip(given, taken, strict=True):
        order[theirs] = ours
    np.testing.assert_array_equal(units.exchanged(jnp.arange(16)), order)


def test_heads_for_which_there_is_no_ring_are_refused():
    reasons = {}
    for G, H, stored in itertools.product((1, 8, 40, 64), (64, 128, 256), ("bfloat16", "int8")):
        q_TKGH, pool, _ = cases.abstract(cases.Case(((1, 64),), K=1, G=G, H=H, S=64, stored=stored))
        reasons[G, H, stored] = attention.why_not(HOPPER, q_TKGH, pool)
    assert "hold no ring for 64 heads of 256" in reasons.pop((64, 256, "bfloat16"))
    assert "hold no ring for 64 heads of 256" in reasons.pop((64, 256, "int8"))
    assert "hold no ring for 40 heads of 256" in reasons.pop((40, 256, "int8"))
    assert not any(reasons.values())


@pytest.mark.parametrize(
    ("lens", "G", "window"),
    [(cases.ROWS["decode"], 1, None), (((1, 9), (40, 200), (5, 5)), 8, 70)],
)
def test_a_row_does_not_depend_on_its_company(lens, G, window):
    """The same bits alone and among others whose pages are NaN; its tiles lie elsewhere."""
    case, row = cases.Case(lens, K=1, G=G, H=64, S=32, window=window, sinks=True), 1
    batch = Batch.of(case, SCALE)
    pages = batch.rows.page_table_BM[row]
    others = ~np.isin(np.arange(batch.after.shape[0]), pages[pages > 0])[:, None, None, None]
    k_PKSH, v_PKSH = (
        np.where(others, np.nan, np.asarray(pages, np.float32)).astype(case.stored)
        for pages in (batch.after.k_PKSH, batch.after.v_PKSH)
    )
    poisoned = replace(batch.after, k_PKSH=k_PKSH, v_PKSH=v_PKSH)

    def attend(q, pool, rows):
        return attention.paged_attention(
            q, pool, rows, gpu=HOPPER, scale=SCALE, window=window, sinks_KG=batch.sinks
        )

    quick = jax.jit(attend, compiler_options={"xla_backend_optimization_level": 0})
    together = np.asarray(quick(batch.q, poisoned, batch.rows))[batch.span(row)]
    q, only = batch.alone(row)
    alone = np.asarray(quick(q, batch.after, only))[: len(together)]
    assert np.isfinite(together.astype(np.float32)).all()
    np.testing.assert_array_equal(alone, together)
