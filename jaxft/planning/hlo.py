"""What the compiler wrote into the program: cycles it estimates, and bytes that devices exchange.

The text of a compiled program names, for each instruction of a computation, the cycles that the TPU compiler's
own cost model gives it. A loop's body runs as often as the constant in its condition says.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable

HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+ = .*)$")
OPCODE = re.compile(r"(?:^|\s)([a-z][a-z0-9\-]*)\(")
# Nineteen digits are the largest number there is: the compiler has no estimate for a product fused with a collective.
CYCLES = re.compile(r'"estimated_cycles":"(\d{1,18})"')
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
CALLED = re.compile(r"(?:calls|to_apply|body|called_computations)=\{?%?([\w.\-]+)")
COMPUTATION = re.compile(r"[\w.\-]+")
PRODUCT = re.compile(r" convolution\([^)]*\)(?:, window=\{size=([\dx]+))?")
CONDITION = re.compile(r"condition=%?([\w.\-]+)")
CONSTANT = re.compile(r"[su]32\[\]\S* constant\((\d+)\)")
OPERANDS = re.compile(r"%([\w.\-]+)[,)]")
INDEX = re.compile(r"index=(\d+)$")
ARRAY = re.compile(r"\b(pred|[sufb]\w*?\d+\w*)\[([\d,]*)\]")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# An asynchronous collective stands in every fusion that works while it is under way, and ends in one of them.
UNDER_WAY, ENDS = "async_collective_fusion_config", "AsyncCollectiveDone"
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Program:
    """What one device does in one run of a program.

    Attributes:
        cycles: the estimate for all instructions, one after the other.
        exchanged: bytes of each kind of collective's result; of a reduce-scatter's operand, which is what moves.
        exposed: of these, the bytes that come while nothing else runs.
    """

    cycles: int
    exchanged: dict[str, int]
    exposed: int


def read_program(
    text: str,
    kernel: Callable[[str], int] = lambda instruction: 0,
    flops_per_cycle: float = math.inf,
) -> Program:
    """Sums over a compiled program's text, loops times their length; of a conditional the dearest branch.

    Args:
        text: of the program.
        kernel: cycles of a custom call, of which the compiler has no estimate, by its instruction.
        flops_per_cycle: at the peak. Of products fused with each other the compiler estimates one; they all take as
            long as at the peak, at least.
    """
    computations, entry = _computations(text)

    @functools.cache
    def flops(name: str) -> float:
        lines = computations.get(name, [])
        made = _made(lines)
        return sum(_flops(line, made) + sum(map(flops, CALLED.findall(line))) for line in lines)

    @functools.cache
    def cost(name: str) -> tuple[int, tuple[int, ...]]:
        cycles, exchanged = 0, [0] * (len(COLLECTIVES) + 1)  # the last is what is exposed
        lines = computations.get(name, [])
        ends = any(ENDS in line for line in lines)
        for line in lines:
            opcode = OPCODE.search(line)
            kind = opcode[1] if opcode else ""
            estimate = CYCLES.search(line)
            if estimate:
                products = sum(map(flops, CALLED.findall(line)))
                cycles += max(int(estimate[1]), round(products / flops_per_cycle))
            if kind == "custom-call" and not estimate:
                cycles += kernel(line)
            base = kind.removesuffix("-start")
            if opcode and base in COLLECTIVES and (ends or UNDER_WAY not in line):
                start = kind != base
                if base == "reduce-scatter" and not start:
                    made = _made(lines)
                    size = sum(_bytes(made.get(name, ""), False) for name in _operands(line))
                else:
                    size = _bytes(line.partition(" = ")[2], start)
                exchanged[COLLECTIVES.index(base)] += size
                exchanged[-1] += 0 if ends or start else size
            trips = _trips(line, computations) if kind == "while" else 1
            branches = BRANCHES.search(line)
            if branches:
                inner_cycles, inner_bytes = max(map(cost, COMPUTATION.findall(branches[1])))
                cycles += inner_cycles
                exchanged = [a + b for a, b in zip(exchanged, inner_bytes, strict=True)]
            for called in CALLED.findall(line):
                inner_cycles, inner_bytes = cost(called)
                if kind == "call-start":  # on another core, to be waited for later
                    inner_bytes = (*inner_bytes[:-1], 0)
                # A fusion's own estimate covers what is fused; what it sends is inside.
                cycles += trips * (0 if estimate else inner_cycles)
                exchanged = [a + trips * b for a, b in zip(exchanged, inner_bytes, strict=True)]
        return cycles, tuple(exchanged)

    cycles, exchanged = cost(entry)
    return Program(cycles, dict(zip(COLLECTIVES, exchanged[:-1], strict=True)), exchanged[-1])


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The instructions of each computation, and the name of the first to run."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", list[str]()
    for line in text.splitlines():
        header = HEADER.match(line)
        if header:
            lines = computations.setdefault(header[1], [])
            entry = header[1] if line.startswith("ENTRY") else entry
        elif instruction := INSTRUCTION.match(line):
            lines.append(instruction[1])
    return computations, entry


def _trips(line: str, computations: dict[str, list[str]]) -> int:
    """How often a loop runs: as is known, or from zero to the constant that its condition compares with."""
    known = TRIPS.search(line)
    if known:
        return int(known[1])
    condition, body = CONDITION.search(line), CALLED.search(line)
    tests = computations.get(condition[1], []) if condition else []
    limit = max((int(n) for text in tests for n in CONSTANT.findall(text)), default=1)
    counters = [int(found[1]) for text in tests if (found := INDEX.search(text.split(", meta")[0]))]
    if body is None or len(counters) != 1:
        return limit
    return -(-limit // _step(computations.get(body[1], []), counters[0]))


def _step(body: list[str], counter: int) -> int:
    """What a loop's body adds to that part of its tuple: a product cut into windows does two at a time."""
    made = _made(body)

    def added(name: str) -> int:
        made_by = made.get(name, "")
        constant = CONSTANT.search(made_by)
        if constant:
            return int(constant[1])
        adds = " add(" in made_by or " copy(" in made_by
        return sum(map(added, _operands(made_by))) if adds else 0

    root = _operands(body[-1]) if body else []
    return max(added(root[counter]), 1) if counter < len(root) else 1


def _made(lines: list[str]) -> dict[str, str]:
    """What stands behind each instruction's name."""
    return dict(line.split(" = ", 1) for line in lines)


def _operands(instruction: str) -> list[str]:
    """Names of what an instruction takes."""
    opcode = OPCODE.search(instruction)
    given = instruction[opcode.end() :].partition("), ")[0] + ")" if opcode else ""
    return OPERANDS.findall(given)


def _flops(instruction: str, made: dict[str, str]) -> float:
    """Of a product of two matrices, from what its sizes have in common; of anything else 0."""
    found = PRODUCT.search(instruction)
    if found is None or set(found[1] or "1") - set(
        "1x"
    ):  # a window slides: what is contracted is not told
        return 0.0
    arrays = [
        instruction.partition(" = ")[2],
        *(made.get(name, "") for name in _operands(instruction)),
    ]
    sizes = [
        math.prod(map(int, one[2].split(",")))
        for a in arrays
        if (one := ARRAY.search(a)) and one[2]
    ]
    return 2 * math.sqrt(math.prod(sizes)) if len(sizes) == 3 else 0.0


def _bytes(instruction: str, start: bool) -> int:
    """Bytes of what an instruction makes; a collective's asynchronous start gives its result and what is sent."""
    opcode = OPCODE.search(instruction)
    sizes = [
        math.prod(int(n) for n in shape.split(",") if n) * _width(dtype)
        for dtype, shape in ARRAY.findall(instruction[: opcode.start()] if opcode else "")
    ]
    return int(max(sizes, default=0) if start else sum(sizes))


def _width(dtype: str) -> float:
    """Bytes of an element: s4 is half a byte, pred is one."""
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) / 8 if bits else 1
