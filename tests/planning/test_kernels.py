"""The cycles of attention's kernel are those that the experiment read off its schedules."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxft.planning.kernels import CYCLES, kernel_cycles

FOUND = Path("experiments/attention_tpu.md")
CALL = ' custom-call(%x), custom_call_target="tpu_custom_call"'
SCRATCH = "f32[2,1024,128]{2,1,0:T(8,128)}"


def test_the_table_is_what_the_experiment_found():
    rows = [line.split("|")[1:-1] for line in FOUND.read_text().splitlines() if line[:3] == "| v"]
    found = {}
    for chip, head_dim, _, *figures in rows:
        parts = [int(figure.replace(",", "")) for figure in figures[:12]]
        forward, one, *two = (tuple(parts[i : i + 3]) for i in range(0, 12, 3))
        both = tuple(map(sum, zip(*two, strict=True)))
        found.setdefault(chip.strip(), {})[int(head_dim)] = (forward, one, both)
    assert found == CYCLES


@pytest.mark.parametrize("stack", ["2,32,", "64,"])
def test_counts_blocks_rows_and_steps(stack):
    """At 2,048 tokens: 3 of 4 blocks, in 2 rows; rows of one sequence come without the batch."""
    out, sums = f"bf16[{stack}2048,128]{{2,1,0:T(8,128)(2,1)}}", f"f32[{stack}2048,128]{{2,1,0}}"
    (block, row, step), _, (d_block, d_row, d_step) = CYCLES["v5e"][128]
    line = f"splash_mha_fwd_segmented_residuals.1 = ({SCRATCH}, {out}, {sums}){CALL}"
    assert kernel_cycles("v5e", line) == 64 * (3 * block + 2 * row + 4 * step)
    line = f"splash_mha_dq_segmented_no_residuals.1 = ({SCRATCH}, {out}){CALL}"
    assert kernel_cycles("v5e", line) == 64 * (3 * d_block + 2 * d_row + 4 * d_step)


@pytest.mark.parametrize(
    ("stack", "scratch", "key_stack"),
    [("2,1,32,", SCRATCH, "2,8,"), ("1,64,", "f32[1024,128]{1,0:T(8,128)}", "8,")],
)
def test_a_kernel_for_a_block_of_keys_counts_half_of_the_blocks(stack, scratch, key_stack):
    """Of the two blocks of 2,048 tokens, one is seen by both blocks of queries and one by the last."""
    keys = f"bf16[{key_stack}1024,128]{{2,1,0:T(8,128)(2,1)}}"
    line = (
        f"splash_mha_dkv_segmented_no_residuals.3 = ({scratch}, {scratch},"
        f" bf16[{stack}2048,128]{{3,2,1,0:T(8,128)(2,1)S(1)}}, {keys}, /*index=5*/{keys}){CALL}"
    )
    block, row, step = CYCLES["v5e"][128][1]
    assert 2 * kernel_cycles("v5e", line) == 64 * (3 * block + 2 * row + 4 * step)


def test_the_kernel_for_keys_and_values_counts_with_that_for_queries():
    out = "bf16[2,8,8192,128]{3,2,1,0}"
    line = f"splash_mha_dkv_segmented_no_residuals.1 = ({SCRATCH}, {SCRATCH}, {out}, {out}){CALL}"
    assert kernel_cycles("v5e", line) == 0
    assert kernel_cycles("v5e", f"custom-call.1 = {out}{CALL}") == 0


def test_a_head_counts_as_the_next_wider_that_is_known():
    def cycles(head_dim):
        out = f"bf16[2,8,2048,{head_dim}]{{3,2,1,0}}"
        return kernel_cycles("v6e", f"splash_mha_dq_segmented.1 = ({SCRATCH}, {out}){CALL}")

    assert cycles(96) == cycles(128)
    assert cycles(128) < cycles(256) == cycles(320)
