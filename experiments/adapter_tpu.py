"""What an adapter's product costs v6e inside the base's: the compiler's estimates, and how long its schedules are.

    python experiments/adapter_tpu.py [--record]

`x W + n b` with n (tokens, 16), b (16, out), as two operations and, by the option that jaxft gives v6e's compiler, as
one. Of one the compiler estimates the wide product alone; its schedule tells how many bundles of instructions the
narrow one adds. Needs the package `libtpu` (extra `tpu`), and no TPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from attention_tpu import read_schedule, schedules, size

RECORD = Path(__file__).with_suffix(".md")
TOKENS, RANK = 2048, 16
KERNELS = ((4096, 14336), (4096, 4096), (4096, 1024), (14336, 4096))


def main() -> None:
    """Compiles, prints, and with --record writes adapter_tpu.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="write the table beside this script")
    flags = parser.parse_args()
    with schedules() as folder:
        lines = table(folder)
    print("\n".join(lines))
    if flags.record:
        RECORD.write_text("\n".join(lines) + "\n")


def table(folder: Path) -> list[str]:
    """adapter_tpu.md; the compiler writes its schedules to the folder."""
    from importlib.metadata import version

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from jaxft.kernels.compiler_options import ADDED, WIDEST
    from jaxft.planning.hlo import read_program
    from jaxft.planning.topology import tpu_devices

    device = tpu_devices("v6e:2x2").devices[:1]
    place = NamedSharding(Mesh(np.array(device), ("x",)), PartitionSpec())

    def compiled(function: Any, options: dict[str, str], *shapes: tuple[int, int]) -> str:
        """Thousands of cycles by the estimate, and of bundles."""
        for old in folder.iterdir():
            old.unlink()
        abstract = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in shapes]
        made = jax.jit(function).lower(*abstract).compile(compiler_options=WIDEST | options)
        read = [
            read_schedule(path.read_text())
            for path in folder.iterdir()
            if "fusion" in path.name and "schedule-analysis" not in path.name
        ]
        # The largest region is the loop's body.
        issued = sum(max(map(size, regions), default=0) * runs for regions, _, runs in read)
        return f"{read_program(made.as_text()).cycles / 1e3:,.0f} | {issued / 1e3:,.0f}"

    def both(x: Any, narrow: Any, kernel: Any, b: Any) -> Any:
        return narrow @ b + x @ kernel

    lines = [
        "# An adapter's product inside the base's, on v6e",
        "",
        f"Made by `experiments/adapter_tpu.py` (jax {version('jax')} with libtpu {version('libtpu')}): {TOKENS} tokens,"
        f" rank {RANK}, bfloat16; thousands of cycles by the compiler's estimate, and of bundles of instructions in its"
        " schedules. Data are not always there when a bundle is: what is apart waits for the narrow product's result.",
        "",
        "| kernel | base alone | bundles | apart | bundles | inside | bundles |",
        "| --- |" + " ---: |" * 6,
    ]
    for rows, columns in KERNELS:
        arrays = ((TOKENS, rows), (TOKENS, RANK), (rows, columns), (RANK, columns))
        alone = compiled(lambda x, kernel: x @ kernel, {}, arrays[0], arrays[2])
        apart, inside = (compiled(both, options, *arrays) for options in ({}, ADDED))
        lines.append(f"| {rows} x {columns} | {alone} | {apart} | {inside} |")
    return lines


if __name__ == "__main__":
    main()
