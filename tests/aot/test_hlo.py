"""Reading HLO: hand-made texts whose answers can be counted by hand, and XLA's own for the CPU."""

import jax
import jax.numpy as jnp
import pytest

from jaxinfer.aot.hlo import parse, trip_count
from jaxinfer.aot.report import read
from jaxinfer.aot.traffic import traffic

TPU_LOOP = """\
HloModule jit_f, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (carry: (s32[], f32[64,128], f32[8,128])) -> (s32[], f32[64,128], f32[8,128]) {
  %carry = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %x = f32[64,128]{1,0:T(8,128)} get-tuple-element(%carry), index=1
  %kept = f32[8,128]{1,0:T(8,128)} get-tuple-element(%carry), index=2
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %twice = f32[64,128]{1,0:T(8,128)} add(%x, %x), metadata={op_name="jit(f)/a (b)"}
  %ar = f32[64,128]{1,0:T(8,128)} all-reduce(%twice), replica_groups={{0,1}}, to_apply=%add
  ROOT %out = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}, /*index=2*/f32[8,128]{1,0:T(8,128)}) tuple(%next, %ar, %kept)
}

%condition (carry.1: (s32[], f32[64,128], f32[8,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(10)
  %carry.1 = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%j, %limit), direction=LT
}

ENTRY %main (p0: f32[8,128], p1: f32[64,128]) -> (f32[8,128], f32[64,128]) {
  %p0 = f32[8,128]{1,0:T(8,128)} parameter(0), metadata={op_name="state[\\'pool\\']"}
  %p1 = f32[64,128]{1,0:T(8,128)} parameter(1), metadata={op_name="x"}
  %zero = s32[]{:T(128)} constant(START)
  %begin = s32[]{:T(128)} copy(%zero)
  %tuple = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}) tuple(%begin, %p1, %p0)
  %loop = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}) while(%tuple), condition=%condition, body=%body
  %r0 = f32[8,128]{1,0:T(8,128)} get-tuple-element(%loop), index=2
  %r1 = f32[64,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
  ROOT %result = (f32[8,128]{1,0:T(8,128)}, f32[64,128]{1,0:T(8,128)}) tuple(%r0, %r1)
}
"""  # noqa: E501
# A padded scalar, 512 B; the array, 32 KiB.
SCALAR, ARRAY = 512, 64 * 128 * 4


def entry(body: str, more: str = "") -> str:
    return f"HloModule m\n\n{more}\nENTRY %main (p: f32[1]) -> f32[1] {{\n{body}}}\n"


@pytest.mark.parametrize(("start", "turns"), [(0, 10), (4, 6), (12, 0)])
def test_a_counted_loop_turns_as_often_as_its_constants_say(start, turns):
    text = TPU_LOOP.replace("START", str(start))
    module = parse(text)
    assert trip_count(module, module.entry, module.entry.instructions["loop"]) == turns
    # The body: the counter's add (two operands, a result), the array's, the all-reduce.
    body = 3 * SCALAR + 3 * ARRAY + 2 * ARRAY
    condition = 2 * SCALAR + 512
    found = traffic(module)
    assert (found.bytes, found.unknown_loops) == (2 * SCALAR + turns * (body + condition), 0)


def test_the_report_names_collectives_and_aliases():
    found = read(TPU_LOOP.replace("START", "0"))
    (all_reduce,) = found["collectives"]
    assert (all_reduce.kind, all_reduce.shape, all_reduce.count) == (
        "all-reduce", "f32[64,128]", 10,
    )  # fmt: skip
    assert found["aliased"] == ("state['pool']",)
    assert found["arguments"] == (("state['pool']", 8 * 128 * 4), ("x", ARRAY))
    assert found["copies"] == ()  # of a scalar only
    assert found["largest"] == {"s32": SCALAR, "f32": ARRAY, "pred": 512}


def test_a_loop_over_data_counts_as_often_as_told():
    text = TPU_LOOP.replace("START", "0").replace(
        "%limit = s32[]{:T(128)} constant(10)",
        "%limit = s32[]{:T(128)} get-tuple-element(%carry.1), index=0",
    )
    once, thrice = (traffic(parse(text), trips) for trips in (1, 3))
    assert once.unknown_loops == thrice.unknown_loops == 1
    assert (thrice.bytes - 2 * SCALAR) == 3 * (once.bytes - 2 * SCALAR)


def test_what_the_compiler_says_of_a_loop_goes_first():
    text = TPU_LOOP.replace("START", "0").replace(
        "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}'
    )
    module = parse(text)
    assert trip_count(module, module.entry, module.entry.instructions["loop"]) == 7


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("bf16[8,512]{1,0:T(8,128)(2,1)}", 8 * 512 * 2),
        ("bf16[3,100]{1,0:T(8,128)(2,1)}", 8 * 128 * 2),
        ("bf16[3,100]{0,1:T(8,128)(2,1)}", 104 * 128 * 2),  # the first axis is the last in memory
        ("bf16[2,4,3,100]{3,2,1,0:T(8,128)(2,1)}", 2 * 4 * 8 * 128 * 2),
        ("f32[100]{0:T(128)}", 128 * 4),
        ("s4[16,64]{1,0:E(4)}", 16 * 64 // 2),
        ("s4[16,64]{1,0}", 16 * 64),
        ("f8e4m3fn[16,64]{1,0}", 16 * 64),
        ("pred[7]{0}", 7),
        ("f32[]", 4),
        ("token[]", 0),
        ("(f32[2]{0}, (bf16[4]{0}, u32[]{:S(2)}))", 16),
    ],
)
def test_sizes_count_padding_and_packing(text, size):
    module = parse(entry(f"  ROOT %p = {text} parameter(0)\n"))
    assert module.entry.root.bytes == size


def test_a_prefetch_to_the_chip_is_read_once():
    found = traffic(
        parse(
            entry("""\
  %w = f32[64,128]{1,0:T(8,128)} parameter(0)
  %x = f32[64,128]{1,0:T(8,128)} parameter(1)
  %start = (f32[64,128]{1,0:T(8,128)S(1)}, f32[64,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%w)
  %done = f32[64,128]{1,0:T(8,128)S(1)} copy-done(%start)
  ROOT %sum = f32[64,128]{1,0:T(8,128)} add(%done, %x)
""")
        )
    )
    assert found.bytes == 3 * ARRAY  # w on its way to the chip, x, and the sum


def test_a_slice_on_its_way_to_the_chip_reads_what_it_returns():
    found = traffic(
        parse(
            entry("""\
  %w = f32[64,128]{1,0:T(8,128)} parameter(0)
  %start = ((f32[64,128]{1,0:T(8,128)}), f32[16,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%w), slice={[0:16], [0:128]}
  %done = f32[16,128]{1,0:T(8,128)S(1)} slice-done(%start)
  ROOT %sum = f32[16,128]{1,0:T(8,128)S(1)} sine(%done)
""")  # noqa: E501
        )
    )
    assert found.bytes == ARRAY // 4


def test_what_another_core_gathers_is_what_is_returned():
    found = traffic(
        parse(
            entry(
                """\
  %table = bf16[50000,64]{1,0} parameter(0)
  %ids = s32[4]{0} parameter(1)
  %s = ((bf16[50000,64]{1,0}, s32[4]{0}), bf16[4,64]{1,0}, u32[]{:S(8)}) call-start(%table, %ids), to_apply=%elsewhere
  %u = ((bf16[50000,64]{1,0}, s32[4]{0}), bf16[4,64]{1,0}, u32[]{:S(8)}) call-update(%s)
  ROOT %rows = bf16[4,64]{1,0} call-done(%u)
""",  # noqa: E501
                """\
%elsewhere (a: bf16[50000,64], b: s32[4]) -> bf16[4,64] {
  %a = bf16[50000,64]{1,0} parameter(0)
  %b = s32[4]{0} parameter(1)
  ROOT %c = bf16[4,64]{1,0} gather(%a, %b), offset_dims={1}
}, execution_thread="sparsecore"
""",
            )
        )
    )
    assert found.bytes == 2 * (4 * 64 * 2) + 4 * 4


IN_PLACE = """\
%inside (pool: f32[1000,128], row: f32[2,128], at: s32[]) -> f32[1000,128] {
  %pool = f32[1000,128]{1,0} parameter(0)
  %row = f32[2,128]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %new = f32[1000,128]{1,0} dynamic-update-slice(%pool, %row, %at, %zero)
}
"""


def test_an_update_in_place_costs_what_it_changes():
    found = traffic(
        parse(
            entry(
                """\
  %p = f32[1000,128]{1,0} parameter(0)
  %r = f32[2,128]{1,0} parameter(1)
  %at = s32[] parameter(2)
  ROOT %f = f32[1000,128]{1,0} fusion(%p, %r, %at), kind=kLoop, calls=%inside
""",
                IN_PLACE,
            )
        )
    )
    assert found.bytes == 2 * (2 * 128 * 4) + 4


def test_a_gather_reads_what_it_returns():
    found = traffic(
        parse(
            entry("""\
  %table = bf16[50000,64]{1,0} parameter(0)
  %ids = s32[4]{0} parameter(1)
  ROOT %rows = bf16[4,64]{1,0} gather(%table, %ids), offset_dims={1}
""")
        )
    )
    assert found.bytes == 2 * (4 * 64 * 2) + 4 * 4


def test_a_conditional_costs_its_cheapest_branch():
    found = traffic(
        parse(
            entry(
                """\
  %p = f32[64,128]{1,0} parameter(0)
  %n = s32[] parameter(1)
  ROOT %c = f32[64,128]{1,0} conditional(%n, %p, %p), branch_computations={%dear, %cheap}
""",
                """\
%dear (a: f32[64,128]) -> f32[64,128] {
  %a = f32[64,128]{1,0} parameter(0)
  ROOT %s = f32[64,128]{1,0} sine(%a)
}

%cheap (b: f32[64,128]) -> f32[64,128] {
  ROOT %b = f32[64,128]{1,0} parameter(0)
}
""",
            )
        )
    )
    assert found.bytes == 0


@pytest.mark.parametrize(
    ("attributes", "size"),
    [
        ("", 3 * ARRAY),
        (", output_to_operand_aliasing={{}: (0, {})}", 2 * ARRAY),
        (', backend_config={"cost_estimate":{"flops":"5","bytes_accessed":"77"}}', 77),
    ],
)
def test_a_kernel_costs_what_it_says_or_its_arrays_once(attributes, size):
    text = entry(f"""\
  %p = f32[64,128]{{1,0}} parameter(0)
  %q = f32[64,128]{{1,0}} parameter(1)
  ROOT %k = f32[64,128]{{1,0}} custom-call(%p, %q), custom_call_target="tpu_custom_call"{attributes}
""")
    assert traffic(parse(text)).bytes == size
    found = read(text)
    assert found["kernels"] == {"tpu_custom_call": 1}
    assert found["kernel_bytes"] == found["hbm_bytes"] == size


def test_copies_are_found_in_fusions_and_between_memories():
    found = read(
        entry(
            """\
  %p = bf16[64,32]{1,0} parameter(0)
  %moved = bf16[64,32]{1,0} fusion(%p), kind=kInput, calls=%transposed
  %c = bf16[64,32]{1,0} copy(%moved)
  %on = bf16[64,32]{1,0:S(1)} copy(%c)
  ROOT %s = bf16[64,32]{1,0} sine(%on)
""",
            """\
%transposed (a: bf16[64,32]) -> bf16[64,32] {
  %a = bf16[64,32]{1,0} parameter(0)
  %b = bf16[32,64]{0,1} bitcast(%a)
  ROOT %t = bf16[64,32]{1,0} transpose(%b), dimensions={1,0}
}
""",
        )
    )
    (copies,) = found["copies"]
    assert (copies.count, copies.shape, copies.bytes) == (2, "bf16[64,32]", 64 * 32 * 2)


def test_asynchronous_collectives_count_once():
    found = read(
        entry("""\
  %p = bf16[4,8]{1,0} parameter(0)
  %start = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%p), dimensions={0}
  ROOT %done = bf16[16,8]{1,0} all-gather-done(%start)
""")
    )
    (gather,) = found["collectives"]
    assert (gather.kind, gather.shape, gather.count) == ("all-gather", "bf16[16,8]", 1)
    assert found["hbm_bytes"] == (4 + 16) * 8 * 2


def test_callbacks_and_doubles_are_seen():
    def function(x):
        jax.debug.callback(print, x)
        return x.astype(jnp.float64).sum()

    with jax.enable_x64(True):
        text = jax.jit(function).lower(jnp.ones(4, jnp.float32)).compile().as_text()
    found = read(text)
    assert found["host_callbacks"]
    assert found["f64"] > 0


def test_a_program_of_the_cpu():
    """XLA's own text: a donated pool that is written in place, a matrix product, a loop."""

    def function(pool_PD, x_TD, w_DF):
        pool_PD = pool_PD.at[3].set(x_TD[0])
        y_TF = x_TD @ w_DF
        return pool_PD, jax.lax.fori_loop(0, 5, lambda i, y: jnp.sin(y) + i, y_TF)

    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4096, 64), (16, 64), (64, 256))
    ]
    compiled = jax.jit(function, donate_argnums=0).lower(*shapes).compile()
    found = read(compiled.as_text())
    assert found["aliased"] == ("pool_PD",)
    assert found["products"] == ("f32 x f32 -> f32",)
    assert found["unknown_loops"] == 0
    pool, product = 4096 * 64 * 4, 16 * 256 * 4
    least = (16 * 64 + 64 * 256) * 4 + product + 5 * 2 * product
    assert least <= found["hbm_bytes"] < least + 10 * product < pool
    assert [one for one in found["copies"] if one.bytes >= pool] == []
