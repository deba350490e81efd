"""Where a step's time goes on a TPU, by the compiler's estimate: LoRA for 8B on a slice, operation by operation.

    python experiments/pods/parts.py [--record] [--slice v6e-256] [--rows 1] [--remat none]

An operation of the compiled program is counted where its product says: a product with the adapters' rank, or twice or
three times that, among its sizes is an adapter's, any other in the loop over layers a frozen kernel's, with what an
adapter adds while it is written, and what stands in another loop is the loss'. What has no product is the rest: norms,
gates, rotations, layouts, and what is kept and read again. Needs the extra `tpu`, and no TPU.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import re
from pathlib import Path
from typing import Any

import scale

PRODUCT = re.compile(r"^([\w.\-]+) = (\S+) convolution\((.*?)\)")
SIZES = re.compile(r"\[([\d,]*)\]")
RANK, SMALL = 16, 128
# The a's that read one input stand together: of gate and up, of q, k and v.
ADAPTERS = {RANK, 2 * RANK, 3 * RANK}
PARTS = ("frozen kernels", "attention's kernel", "adapters", "loss", "the rest")
ALONE = "exchanged while nothing else runs"


def compiled(slice_name: str, rows: int, remat: str) -> tuple[str, Any, Any]:
    """(the program's text, its plan, the slice)."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    from jaxft.configuration import load_config
    from jaxft.planning.topology import tpu_devices

    planning: Any = importlib.import_module("jaxft.planning.plan")
    target, mesh = tpu_devices(scale.SLICES[slice_name]), scale.mesh_of(f"8b/lora/{slice_name}")
    settings = mesh | {
        "model": scale.folder_of("8b"), "dtype": "bfloat16", "param_dtype": "bfloat16", "steps": 1000,
        "data.max_length": scale.LENGTH, "batch_size": rows * len(target.devices), "remat": remat,
    }  # fmt: skip
    config = load_config(str(scale.HERE.parents[1] / "configs" / "sft.py:lora"), settings)
    texts: list[str] = []
    read = planning.read_program
    planning.read_program = lambda text, *others: (texts.append(text), read(text, *others))[1]
    with jax.numpy_dtype_promotion("standard"):
        made = planning.plan(config, target)
    return texts[-1], made, target


def parts_of(text: str, kind: str, layers: int) -> dict[str, int]:
    """Cycles of a device by what they are spent on."""
    from jaxft.planning.hlo import CALLED, CYCLES, OPCODE, _computations, _trips
    from jaxft.planning.kernels import kernel_cycles

    computations, entry = _computations(text)
    found: collections.Counter[str] = collections.Counter()

    def sizes_of_products(name: str) -> list[set[int]]:
        lines = computations.get(name, [])
        shapes = {line.split(" = ")[0]: line.split(" = ")[1].split(" ")[0] for line in lines}
        sizes = []
        for line in lines:
            product = PRODUCT.match(line)
            if product:
                names = re.findall(r"%([\w.\-]+)", product[3])
                shaped = [product[2], *(shapes.get(operand, "") for operand in names)]
                sizes.append(
                    {
                        int(n)
                        for one in shaped
                        for s in SIZES.findall(one)[:1]
                        for n in s.split(",")
                        if n
                    }
                    - {1}
                )
            for called in CALLED.findall(line):
                sizes += sizes_of_products(called)
        return sizes

    def part(line: str, runs: int) -> str:
        products = [size for name in CALLED.findall(line) for size in sizes_of_products(name)]
        if runs not in (1, layers):
            return "loss"
        if any(min(sizes) > SMALL for sizes in products):
            return "frozen kernels"
        return "adapters" if any(ADAPTERS & sizes for sizes in products) else "the rest"

    def walk(name: str, runs: int) -> None:
        for line in computations.get(name, []):
            opcode, estimate = OPCODE.search(line), CYCLES.search(line)
            if estimate:
                found[part(line, runs)] += runs * int(estimate[1])
                continue
            if opcode and opcode[1] == "custom-call":
                found["attention's kernel"] += runs * kernel_cycles(kind, line)
            for called in CALLED.findall(line):
                walk(called, runs * (_trips(line, computations) if "while(" in line else 1))

    walk(entry, 1)
    return {name: found[name] for name in PARTS}


def main() -> None:
    """Compiles, prints, and with --record writes parts.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slice", default="v6e-256", choices=scale.SLICES)
    parser.add_argument("--rows", type=int, default=1, help="of 2,048 tokens, for each device")
    parser.add_argument("--remat", default="none")
    parser.add_argument("--record", action="store_true", help="write the table beside this script")
    flags = parser.parse_args()
    text, made, target = compiled(flags.slice, flags.rows, flags.remat)
    layers = scale.SHAPES["8b"][2]
    parts = parts_of(text, flags.slice.split("-")[0], layers)
    total = round(made.seconds_per_step * target.chip.clock)
    parts[ALONE] = total - sum(parts.values())
    half = 2 * made.mfu * total
    hidden, intermediate, _, _ = scale.SHAPES["8b"]
    kernels = layers * hidden * (2 * hidden + 2 * 1024 + 3 * intermediate)
    ideal = 4 * kernels * flags.rows * scale.LENGTH / target.chip.flops * target.chip.clock
    lines = [
        "# Where a step's time goes, by the compiler",
        "",
        f"Made by `experiments/pods/parts.py`: LoRA of rank {RANK} on all projections of 8B, {flags.slice},"
        f" {flags.rows} x {scale.LENGTH} tokens a device, `remat={flags.remat}`; millions of cycles of a device.",
        "",
        "| part | cycles | of the step |",
        "| --- | ---: | ---: |",
        *(f"| {name} | {count / 1e6:.0f} | {count / total:.0%} |" for name, count in parts.items()),
        f"| all | {total / 1e6:.0f} | |",
        "",
        f"The MFU is {made.mfu:.0%}; at 50 % the step would take {half / 1e6:.0f}. The products with frozen kernels, at"
        f" the peak, take {ideal / 1e6:.0f}: they run at {ideal / parts['frozen kernels']:.0%} of it. Beside them,"
        f" attention's kernel and the loss, 50 % leaves"
        f" {(half - sum(parts[name] for name in PARTS[:2]) - parts['loss']) / 1e6:.0f}"
        " for the adapters, the rest and the exchange.",
    ]
    print("\n".join(lines))
    if flags.record:
        Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
