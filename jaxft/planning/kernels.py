"""The cycles of kernels, of which the TPU compiler gives no estimate: of attention, from its schedule of them.

`experiments/attention_tpu.py` reads the schedules, and says how; `experiments/attention_tpu.md` is what it found.
"""

from __future__ import annotations

import math
import re

from jaxft.kernels.splash import block_of

# Of a chip, by head_dim: cycles of a block of scores that is computed, of a row of blocks besides, and of a step of the
# grid besides, which hidden blocks are too. Of the forward kernel; of the one for all gradients, which takes a block of
# keys; and of the two that take all keys, one for the queries' gradient, one for the others'.
CYCLES = {
    "v4": {
        64: ((7339, 2093, 489), (12539, 1083, 776), (19118, 1239, 1130)),
        128: ((7228, 2055, 489), (12664, 1067, 778), (18631, 1205, 1108)),
        256: ((3103, 1216, 490), (5276, 803, 669), (8123, 1205, 1102)),
    },
    "v5e": {
        64: ((5548, 1783, 273), (11490, 1358, 501), (16382, 1560, 867)),
        128: ((5593, 1763, 273), (11473, 1094, 666), (16150, 1365, 582)),
        256: ((2701, 1112, 318), (5534, 877, 427), (8283, 1333, 663)),
    },
    "v5p": {
        64: ((2877, 876, 287), (5733, 663, 408), (8295, 787, 455)),
        128: ((2886, 886, 124), (5769, 549, 354), (8251, 659, 489)),
        256: ((1338, 557, 124), (2850, 433, 297), (4282, 659, 487)),
    },
    "v6e": {
        64: ((3873, 842, 177), (6741, 872, 273), (10135, 795, 589)),
        128: ((3827, 819, 327), (6662, 574, 228), (10012, 688, 589)),
        256: ((1108, 511, 350), (1854, 448, 244), (2776, 678, 712)),
    },
}
KERNEL = re.compile(r"splash_mha_(fwd|dq|dkv)_[\w.]* = (.*) custom-call\(")
SHAPE = re.compile(r"\w\[([\d,]+)\]")
FORWARD, ONE, TWO = range(3)
MANY = 2**20  # tokens, which the largest blocks divide


def kernel_cycles(kind: str, instruction: str) -> int:
    """Cycles of one run of the attention kernel that an instruction of a compiled program calls; of others 0.

    Counted is causal attention; under a window, of which the text says nothing, fewer blocks are computed. Of a block
    of keys, of which it does not say which one, half of the queries' blocks count.

    Args:
        kind: of the chip, as `v5e`.
        instruction: its line, `NAME = RESULT custom-call(...)`. Of the two for the gradients, that for the queries
            counts for both.
    """
    found = KERNEL.match(instruction)
    if found is None:
        return 0
    shapes = [tuple(map(int, shape.split(","))) for shape in SHAPE.findall(found[2])]
    # Behind scratch come the output and the log-sum-exp; the gradient of the queries; or that, with an axis for its
    # parts, where there is one, those of the keys and of the values.
    which, operand = {"fwd": (FORWARD, -2), "dq": (TWO, -1), "dkv": (ONE, -3)}[found[1]]
    if which == ONE and len(shapes[operand]) <= len(shapes[-1]):
        return 0
    *stack, length, head_dim = shapes[operand]
    known = CYCLES[kind]
    size = min((size for size in known if size >= head_dim), default=max(known))
    computed, row, step = known[size][which]
    rows = length / block_of(MANY, head_dim)
    # Of a block of keys, or, on average, of one of the queries'.
    each = computed * (rows + 1) / 2 + row + step * rows
    return round(math.prod(stack) * each * (1 if which == ONE else rows))
