"""K runs trained together beside K runs one after the other: processor seconds and memory, on the embedded base.

    python experiments/population.py [--members 2 8 32] [--updates 12] [--record]

Each measurement has a process of its own. One run alone is measured once; K of them take K times as long, and as much
memory as one. LoRA of rank 16 on all projections, updates of 4 packed rows of 128 tokens, rates that differ. Seconds
are those of the processor, median over the updates after the first four: on a machine that does other things as well
the clock on the wall tells less. Memory is the process's highest, and what the compiler says of the update.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
WARM = 4


def settings(updates: int) -> dict[str, Any]:
    """What all runs have in common."""
    from jaxft.assets import quickstart_data

    return {
        "data.train": str(quickstart_data("train")),
        "data.packing": True,
        "data.max_length": 128,
        "batch_size": 4,
        "steps": updates,
        "eval_every": 0,
        "samples.count": 0,
        "checkpoint.every": 0,
        "mesh.data": 1,
    }


def measure(members: int, updates: int) -> dict[str, float]:
    """One run alone (0 members), or so many together: trained in this process."""
    from jaxft.configuration import load_config
    from jaxft.training import loop, population
    from jaxft.training.start import train

    moments: list[float] = []
    owner, name = (population.Population, "_dispatch") if members else (loop.Loop, "dispatch")
    dispatch = getattr(owner, name)

    def noted(self: Any, fed: Any) -> Any:
        moments.append(time.process_time())
        return dispatch(self, fed)

    setattr(owner, name, noted)
    own = tuple({"optimizer.learning_rate": 1e-4 * (n + 1)} for n in range(members))
    config = load_config("configs/sft.py:lora", settings(updates) | {"population": own})
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        result = train(config, Path(folder) / "run")
        whole = time.process_time() - began
    each = [after - before for before, after in itertools.pairwise(moments)]
    return {
        "update": statistics.median(each[WARM:]),
        "whole": whole,
        "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "compiler": result.peak,
    }


def apart(members: int, updates: int) -> dict[str, float]:
    """`measure` in a process of its own."""
    words = [sys.executable, __file__, "--one", str(members), "--updates", str(updates)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(alone: dict[str, float], together: dict[int, dict[str, float]], updates: int) -> str:
    """The page."""
    head = [
        "members",
        "an update of all, s",
        "K alone, s",
        "ratio",
        "whole run, s",
        "K alone, s",
        "ratio",
    ]
    head += ["process, MiB", "update by the compiler, MiB"]

    def memory(one: dict[str, float]) -> str:
        return f"{one['resident'] / 2**20:.0f} | {one['compiler'] / 2**20:.0f} |"

    rows = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    rows += [f"| 1, alone | {alone['update']:.3f} | | | {alone['whole']:.1f} | | | {memory(alone)}"]
    for members, one in together.items():
        update, whole = members * alone["update"], members * alone["whole"]
        rows.append(
            f"| {members} | {one['update']:.3f} | {update:.3f} | {one['update'] / update:.2f} | {one['whole']:.1f} | "
            f"{whole:.1f} | {one['whole'] / whole:.2f} | {memory(one)}"
        )
    text = "# Runs trained together\n\n"
    text += " ".join((__doc__ or "").split("\n\n")[2].split()) + "\n\n"
    tail = f"\n\nRuns of {updates} updates on the CPU; `python experiments/population.py --record` measures again.\n"
    return text + "\n".join(rows) + tail


def main() -> None:
    """Measures, prints the page and, asked to, writes it beside this script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--members", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--record", action="store_true", help="write population.md")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one is not None:
        print(json.dumps(measure(given.one, given.updates)))
        return
    alone = apart(0, given.updates)
    together = {members: apart(members, given.updates) for members in given.members}
    page = table(alone, together, given.updates)
    print(page)
    if given.record:
        (HERE / "population.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
