"""The attention kernel's time on TPUs, by the schedule that the TPU's compiler makes of it, beside plain attention's.

    python experiments/attention_tpu.py [--record]

Needs the package `libtpu` (extra `tpu`), and no TPU. The compiler estimates the cycles of its own operations, but not
those of a kernel. It does schedule it, instruction by instruction, and can write the schedule down: how many bundles
of instructions it issues for a block of scores that is computed, and how many for a step of the grid beside. The same
is done with a plain product, of which there is an estimate too; the kernel's bundles are scaled as that product's
estimate stands to its bundles, which is above one, because data are not always there when an instruction is. What
comes out is what `jaxft plan` counts (`jaxft/planning/kernels.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_suffix(".md")
TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")
HEAD_DIMS = (64, 128, 256)
BATCH, HEADS, KEY_HEADS = 2, 32, 8
# Tokens whose backward pass is of kernels for all three gradients, a block of keys each; and of two kernels.
SHORT, LONG = 2048, 8192
SQUARE = 4096  # of the plain product
BUNDLE = re.compile(r"^\s*0x([0-9a-f]+)\s")
STEPS = re.compile(r"scmp\.ge\.s32\.totalorder %\S+, (\d+) /\* loop exit")
PRODUCT = re.compile(r"\bvmat(mul|push|prep)")
EDGE = re.compile(r"(Start|End) region (\d+)")


def read_schedule(text: str) -> tuple[list[tuple[int, int]], list[int], int]:
    """(the regions that are run on conditions, the places of products, how often the loop runs) of a schedule."""
    begin: dict[str, int] = {}
    regions: list[tuple[int, int]] = []
    products, runs = [], 1
    for line in text.splitlines():
        number = BUNDLE.match(line)
        if number is None:
            continue
        place = int(number[1], 16)
        products += [place] * bool(PRODUCT.search(line))
        for edge, region in EDGE.findall(line):
            if edge == "Start":
                begin[region] = place
            elif region in begin:
                regions.append((begin[region], place))
        found = STEPS.search(line)
        runs = int(found[1]) - 2 if found else runs  # two for filling and emptying the pipeline
    return regions, products, runs


def size(region: tuple[int, int]) -> int:
    """Bundles of a region."""
    return region[1] - region[0] + 1


def bundles(text: str) -> tuple[int, int, int, int]:
    """(of a block that is computed, of beginning and ending a row of blocks, of a step beside, how many steps).

    Of the regions of a schedule the first is the smallest that holds the products; the next two are the largest beside
    it.
    """
    regions, products, runs = read_schedule(text)
    first, last = products[0], products[-1]
    around = sorted((r for r in regions if r[0] <= first and last <= r[1]), key=size)
    inner, body = around[0], around[-1]
    beside: list[tuple[int, int]] = []
    for region in sorted(regions, key=size, reverse=True):
        apart = all(region[1] < other[0] or region[0] > other[1] for other in (inner, *beside))
        if apart and body[0] <= region[0] and region[1] <= body[1] and len(beside) < 2:
            beside.append(region)
    edges = sum(map(size, beside))
    return size(inner), edges, size(body) - size(inner) - edges, runs


@contextlib.contextmanager
def schedules() -> Iterator[Path]:
    """The folder that this process' TPU compiler writes its schedules to, if it has not been loaded before."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
            " --xla_jf_dump_llo_pass_label_regex=final_bundles"
        )
        os.environ["JAX_PLATFORMS"] = "cpu"
        yield Path(folder)


def measure(topology: str, folder: Path) -> None:
    """Prints a line of figures for each head_dim; the compiler writes its schedules to the folder."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from jaxft.kernels.attention import _attention, _Masks
    from jaxft.kernels.splash import block_of
    from jaxft.planning.hlo import read_program
    from jaxft.planning.topology import tpu_devices

    target = tpu_devices(topology)
    place = NamedSharding(Mesh(np.array(target.devices[:1]), ("x",)), PartitionSpec())

    def compiled(function: Any, *shapes: tuple[tuple[int, ...], Any]) -> tuple[int, dict[str, str]]:
        """(the estimate of the cycles, the schedules by the kernel's name)."""
        for old in folder.iterdir():
            old.unlink()
        abstract = [jax.ShapeDtypeStruct(*shape, sharding=place) for shape in shapes]
        text = jax.jit(function).lower(*abstract).compile().as_text()
        written = {
            name: path.read_text()
            for path in folder.iterdir()
            if "schedule-analysis" not in path.name
            for name in re.findall(r"splash_mha_(fwd|dq|dkv)|(?<=-)(fusion)-", path.name)
            for name in [name[0] or name[1]]
        }
        return read_program(text).cycles, written

    bf16, square = jnp.bfloat16, (SQUARE, SQUARE)
    estimate, written = compiled(lambda x, y: x @ y, (square, bf16), (square, bf16))
    *parts, runs = bundles(written["fusion"])
    scale = estimate / (sum(parts) * runs)
    for head_dim in HEAD_DIMS:
        figures: list[Any] = [topology.split(":")[0], head_dim, round(scale, 2)]
        for length in (SHORT, LONG):
            shapes = [
                ((BATCH, count, length, head_dim), bf16) for count in (HEADS, KEY_HEADS, KEY_HEADS)
            ]

            def loss(windows: Any, query: Any, key: Any, value: Any, segments: Any) -> Any:
                masks = _Masks(segments, segments, None, None)
                y = _attention(query, key, value, masks, windows, None, 1.0)
                return jnp.sum(jnp.square(y.astype(jnp.float32)))

            def both(windows: Any) -> Any:
                return jax.value_and_grad(lambda *arrays: loss(windows, *arrays), argnums=(0, 1, 2))

            ids = ((BATCH, length), jnp.int32)
            beside, written = compiled(both(()), *shapes, ids)
            if length == SHORT:
                plain, _ = compiled(both(None), *shapes, ids)
                figures += [plain, beside]
            for name in ("fwd", "dkv") if length == SHORT else ("dq", "dkv"):
                *parts, runs = bundles(written[name])
                blocks = length // block_of(length, head_dim)
                steps = BATCH * HEADS * blocks * (1 if (length, name) == (SHORT, "dkv") else blocks)
                # The two cores of a chip of v5p share the steps.
                assert runs in (steps, steps // 2), (name, runs)
                figures += [round(scale * part * runs / steps) for part in parts]
        print(*figures, flush=True)


def page(rows: list[list[float]], versions: str) -> str:
    """attention_tpu.md."""
    from jaxft.kernels.splash import block_of

    lines = [
        "# The attention kernel on TPUs, by the compiler's schedule",
        "",
        f"Made by `experiments/attention_tpu.py` ({versions}), bfloat16, blocks of {block_of(SHORT, 128):,} rows and"
        f" columns, of {block_of(SHORT, 256)} where head_dim is 256. Cycles of a chip, bundles of the schedule times"
        " `scale`: for a block of scores that is computed, for beginning and ending a row of blocks, and for a step of"
        " the grid beside, which hidden blocks are too. `plain` and `kernel`: attention forward and backward, causal"
        f" with segments, {BATCH} x {SHORT} tokens, {HEADS} heads over {KEY_HEADS}, in XLA's operations (the compiler's"
        " estimate) and by the kernels, with the operations around them. `all`: the kernel for all three gradients, of"
        f" a block of keys; `dq`, `dkv`: the two for {LONG:,} tokens.",
        "",
        "| chip | head_dim | scale | fwd block | row | step | all block | row | step | dq block | row | step |"
        " dkv block | row | step | plain | kernel | plain x kernel |",
        "|" + " ---: |" * 18,
    ]
    for chip, head_dim, scale, plain, beside, *parts in rows:
        blocks = SHORT // block_of(SHORT, int(head_dim))
        times = [BATCH * HEADS * count for count in (blocks * (blocks + 1) // 2, blocks, blocks**2)]
        kernel = beside + sum(a * b for a, b in zip(parts[:6], times * 2, strict=True))
        cells = " | ".join(f"{part:,}" for part in parts)
        lines.append(
            f"| {chip} | {head_dim} | {scale} | {cells} | {plain:,} | {kernel:,} | {plain / kernel:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compiles in a process a chip, prints, and with --record writes attention_tpu.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", action="store_true", help="write the table beside this script")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.one:
        with schedules() as folder:
            return measure(flags.one, folder)
    from importlib.metadata import version

    rows: list[Any] = []
    for topology in TOPOLOGIES:
        command = [sys.executable, __file__, "--one", topology]
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, check=True)
        for line in done.stdout.splitlines():
            chip, head_dim, scale, *counts = line.split()
            rows.append([chip, int(head_dim), float(scale), *map(int, counts)])
    text = page(rows, f"jax {version('jax')} with libtpu {version('libtpu')}")
    print(text)
    if flags.record:
        RECORD.write_text(text)
    return None


if __name__ == "__main__":
    main()
