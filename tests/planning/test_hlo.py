"""The compiler's estimates are summed over the loops of a program's text."""

from __future__ import annotations

import pytest

from jaxft.planning.hlo import read_program

TEXT = """\
HloModule jit_step

%fused.1 (p.0: bf16[8,16]) -> bf16[8,128] {
  %p.0 = bf16[8,16]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[8,128]{1,0} all-gather(%p.0), dimensions={1}
}

%body.1 (p.1: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p.1 = (s32[], bf16[8,16]{1,0}) parameter(0)
  %fusion.1 = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%p.1), calls=%fused.1, backend_config={"estimated_cycles":"100"}
  ROOT %tuple.1 = (s32[], bf16[8,16]{1,0}) tuple(%p.1)
}

%condition.1 (p.2: (s32[], bf16[8,16])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(32)
  ROOT %lt.1 = pred[] compare(%p.2, %constant.1), direction=LT
}

ENTRY %main.1 (p.3: bf16[8,16]) -> bf16[8,16] {
  %while.1 = (s32[], bf16[8,16]{1,0}) while(%p.3), condition=%condition.1, body=%body.1
  %all-reduce.1 = f32[4]{0} all-reduce(%p.3), to_apply=%sum.1
  ROOT %fusion.2 = bf16[8,16]{1,0} fusion(%p.3), kind=kLoop, calls=%other, backend_config={"estimated_cycles":"7"}
}
"""


def test_a_loop_counts_as_often_as_its_condition_says():
    program = read_program(TEXT)
    assert program.cycles == 32 * 100 + 7
    assert program.exchanged["all-gather"] == 32 * 8 * 128 * 2
    assert program.exchanged["all-reduce"] == 16
    assert program.exposed == sum(program.exchanged.values())


def test_of_a_reduce_scatter_its_operand_counts():
    text = TEXT.replace(
        "ROOT %all-gather.1 = bf16[8,128]{1,0} all-gather(",
        "ROOT %rs.1 = bf16[2,16]{1,0} reduce-scatter(",
    )
    assert read_program(text).exchanged["reduce-scatter"] == 32 * 8 * 16 * 2


def test_a_known_trip_count_goes_before_the_condition():
    text = TEXT.replace(
        "body=%body.1", 'body=%body.1, backend_config={"known_trip_count":{"n":"3"}}'
    )
    assert read_program(text).cycles == 3 * 100 + 7


WINDOWS = """\
%body.1 (p.1: (bf16[8,16], u32[])) -> (bf16[8,16], u32[]) {
  %p.1 = (bf16[8,16]{1,0}, u32[]{:T(128)}) parameter(0)
  %two.1 = u32[]{:T(128)} constant(2)
  %x.1 = bf16[8,16]{1,0} get-tuple-element(%p.1), index=0
  %i.1 = u32[]{:T(128)} get-tuple-element(%p.1), index=1
  %i.2 = u32[]{:T(128)} add(%i.1, %two.1), metadata={op_name="a/dot_general"}
  %fusion.1 = bf16[8,16]{1,0:T(8,128)(2,1)} fusion(%x.1), calls=%f, backend_config={"estimated_cycles":"100"}
  ROOT %tuple.1 = (bf16[8,16]{1,0}, u32[]{:T(128)}) tuple(%fusion.1, /*index=1*/%i.2), metadata={}
}

%condition.1 (p.2: (bf16[8,16], u32[])) -> pred[] {
  %constant.1 = u32[]{:T(128)} constant(7)
  %p.2 = (bf16[8,16]{1,0}, u32[]{:T(128)}) parameter(0)
  %i.3 = u32[]{:T(128)} get-tuple-element(%p.2), index=1, metadata={op_name="b"}
  ROOT %lt.1 = pred[] compare(%i.3, %constant.1), direction=LT
}

ENTRY %main.1 (p.3: (bf16[8,16], u32[])) -> (bf16[8,16], u32[]) {
  ROOT %while.1 = (bf16[8,16]{1,0}, u32[]) while(%p.3), condition=%condition.1, body=%body.1
}
"""


@pytest.mark.parametrize(("step", "runs"), [(1, 7), (2, 4), (7, 1)])
def test_a_loop_counts_in_the_steps_that_its_body_takes(step: int, runs: int):
    """A product that is cut into windows counts in u32, two windows at a time."""
    text = WINDOWS.replace("constant(2)", f"constant({step})")
    assert read_program(text).cycles == runs * 100


PRODUCTS = """\
%narrow.1 (p.0: bf16[32,16], p.1: bf16[16,64]) -> bf16[32,64] {
  %p.0 = bf16[32,16]{1,0} parameter(0)
  %p.1 = bf16[16,64]{1,0} parameter(1)
  ROOT %convolution.1 = bf16[32,64]{1,0} convolution(%p.0, %p.1), dim_labels=bf_io->bf
}

%both.1 (p.2: bf16[1,32,48], p.3: bf16[1,48,64]) -> bf16[32,64] {
  %p.2 = bf16[1,32,48]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p.3 = bf16[1,48,64]{2,1,0:T(8,128)(2,1)} parameter(1)
  %fusion.1 = bf16[32,64]{1,0} fusion(%p.2, %p.3), calls=%narrow.1
  %convolution.2 = bf16[1,32,64]{2,1,0} convolution(%p.2, %p.3), window={size=1}, dim_labels=0bf_io0->0bf
  %convolution.3 = bf16[1,32,64]{2,1,0} convolution(%p.2, %p.3), window={size=8 pad=7_7}, dim_labels=0bf_io0->0bf
  ROOT %add.1 = bf16[32,64]{1,0} add(%fusion.1, %convolution.2)
}

ENTRY %main.1 (p.4: bf16[1,32,48], p.5: bf16[1,48,64]) -> bf16[32,64] {
  ROOT %fusion.2 = bf16[32,64]{1,0} fusion(%p.4, %p.5), calls=%both.1, backend_config={"estimated_cycles":"100"}
}
"""


@pytest.mark.parametrize(
    ("flops_per_cycle", "cycles"), [(1024, 2 * 32 * 64 * (16 + 48) // 1024), (10**4, 100)]
)
def test_products_that_are_fused_take_as_long_as_at_the_peak(flops_per_cycle: int, cycles: int):
    """The compiler's estimate is of one of them. What a sliding window contracts is not told: it does not count."""
    assert read_program(PRODUCTS, flops_per_cycle=flops_per_cycle).cycles == cycles


def test_the_largest_number_is_no_estimate():
    """It stands where a product is fused with a collective."""
    assert read_program(TEXT.replace('"100"', f'"{2**63 - 1}"')).cycles == 7


def test_a_collective_that_other_work_runs_beside_counts_once():
    """It stands in each fusion that works meanwhile, and in the one that ends it."""
    beside = TEXT.replace(
        "all-gather(%p.0)", 'all-gather(%p.0), x={"async_collective_fusion_config":{}}'
    )
    assert read_program(beside).exchanged["all-gather"] == 0
    end = '  %c.1 = bf16[8,128]{1,0} custom-call(%p.0), custom_call_target="AsyncCollectiveDone"\n  ROOT %all'
    program = read_program(beside.replace("  ROOT %all", end))
    assert program.exchanged["all-gather"] == 32 * 8 * 128 * 2
    assert program.exposed == program.exchanged["all-reduce"] == 16


def test_what_another_core_gathers_is_not_exposed():
    """v6e's SparseCores: a start names the computation, an end waits for it."""
    text = TEXT.replace(
        "  %all-reduce.1 =",
        "  %g.1 = ((bf16[8,16], token[]), bf16[8,128]) call-start(%p.3), to_apply=%fused.1\n"
        "  %g.2 = bf16[8,128]{1,0} call-done(%g.1)\n  %all-reduce.1 =",
    )
    before, program = read_program(TEXT), read_program(text)
    assert program.exchanged["all-gather"] - before.exchanged["all-gather"] == 8 * 128 * 2
    assert program.exposed == before.exposed


def test_of_several_results_all_count_and_of_a_start_what_comes():
    several = TEXT.replace("f32[4]{0} all-reduce(%p.3)", "(f32[4]{0}, bf16[6]{0}) all-reduce(%p.3)")
    assert read_program(several).exchanged["all-reduce"] == 16 + 12
    start = TEXT.replace(
        "f32[4]{0} all-reduce(%p.3)",
        "(bf16[2]{0}, bf16[8]{0}, u32[]{:S(2)}) all-gather-start(%p.3)",
    )
    program = read_program(start)
    assert program.exchanged["all-gather"] - program.exposed == 16


def test_a_custom_call_costs_what_the_caller_says():
    line = '  %k.1 = f32[8]{0} custom-call(%p.0), custom_call_target="tpu_custom_call"\n  ROOT %tuple.1'
    text = TEXT.replace("  ROOT %tuple.1", line)
    assert read_program(text).cycles == 32 * 100 + 7
    program = read_program(text, lambda instruction: 11 * instruction.startswith("k.1 = f32[8]"))
    assert program.cycles == 32 * (100 + 11) + 7


def test_of_a_conditional_the_dearest_branch_counts():
    branch = """\
%branch.{0} (p.5: bf16[8,16]) -> bf16[8,16] {{
  ROOT %fusion.{0} = bf16[8,16]{{1,0}} fusion(%p.5), calls=%other, backend_config={{"estimated_cycles":"{0}"}}
}}

"""
    line = "  %c.1 = bf16[8,16]{1,0} conditional(%i, %p.3, %p.3), branch_computations={%branch.20, %branch.30}\n"
    text = TEXT.replace("ENTRY", branch.format(20) + branch.format(30) + "ENTRY")
    text = text.replace("  %all-reduce.1", line + "  %all-reduce.1")
    assert read_program(text).cycles == 32 * 100 + 7 + 30
