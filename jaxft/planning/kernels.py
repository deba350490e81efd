"""The cycles of kernels, of which the TPU compiler gives no estimate: of attention, from its schedule of them.

`experiments/attention_tpu.py` reads the schedules, and says how; `experiments/attention_tpu.md` is what it found.
"""

from __future__ import annotations

import math
import re

BLOCK = 512  # rows and columns of the scores that are computed at once
# Of a chip, by head_dim: cycles of a block that is computed, of a row of blocks beside, and of a step of the grid
# beside, which hidden blocks are too; forward, then backward (two kernels, for the queries and for keys and values).
CYCLES = {
    "v4": {
        64: ((1788, 1050, 487), (4862, 684, 1073)),
        128: ((1776, 1031, 484), (4831, 652, 1075)),
        256: ((3103, 1216, 490), (8123, 1205, 1121)),
    },
    "v5e": {
        64: ((1504, 942, 158), (4350, 881, 566)),
        128: ((1496, 911, 325), (4156, 787, 408)),
        256: ((2701, 1102, 326), (8283, 1369, 459)),
    },
    "v5p": {
        64: ((739, 469, 123), (2186, 429, 435)),
        128: ((722, 440, 286), (2101, 368, 435)),
        256: ((1338, 535, 291), (4282, 674, 361)),
    },
    "v6e": {
        64: ((1047, 449, 180), (2708, 503, 303)),
        128: ((1041, 421, 359), (2677, 449, 303)),
        256: ((1108, 511, 359), (2783, 698, 542)),
    },
}
KERNEL = re.compile(r"splash_mha_(fwd|dq)_[\w.]* = (.*) custom-call\(")
SHAPE = re.compile(r"\w\[([\d,]+)\]")


def kernel_cycles(kind: str, instruction: str) -> int:
    """Cycles of one run of the attention kernel that an instruction of a compiled program calls; of others 0.

    Counted is causal attention; under a window, of which the text says nothing, fewer blocks are computed.

    Args:
        kind: of the chip, as `v5e`.
        instruction: its line, `NAME = RESULT custom-call(...)`. The kernel for the gradients of keys and values
            counts with that for the queries' gradient, which ends a result, as the output and the log-sum-exp do.
    """
    found = KERNEL.match(instruction)
    if found is None:
        return 0
    backward = found[1] == "dq"
    shape = SHAPE.findall(found[2])[-1 if backward else -2]
    *stack, length, head_dim = map(int, shape.split(","))
    known = CYCLES[kind]
    size = min((size for size in known if size >= head_dim), default=max(known))
    computed, row, step = known[size][backward]
    blocks = length / BLOCK
    each = computed * blocks * (blocks + 1) / 2 + row * blocks + step * blocks**2
    return round(math.prod(stack) * each)
