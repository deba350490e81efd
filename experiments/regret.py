"""What "LoRA Without Regret" found, tried on the embedded base: rates, ranks and places of LoRA beside full tuning.

    python experiments/regret.py --data ../shared/data/e2e --results experiments

Asked are: is LoRA's best learning rate about ten times that of full tuning, and free of the rank (with its scale
alpha / rank, alpha 32)? Are all projections better than attention's alone? Is rank 1 enough to learn from rewards? The
post: https://thinkingmachines.ai/blog/lora, by John Schulman and Thinking Machines Lab, 2025.

`--data` holds E2E's valid.txt, whose rows train; other rows of it, whose records do not train, are held out. All runs
see the same batches in the same order. The rates of LoRA of one rank train together as a population. Rewards are the
planted task's (planted/planted.py): 1 for an answer that begins with "The" or "He".

Every run is a line of regret.jsonl under `--results`, written when it is done: the same command goes on from there, and
writes regret.png. Rates are half a decade apart.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import e2e

sys.path.insert(0, str(Path(__file__).parent / "planted"))
import planted

TRAIN, HELD_OUT = 480, 80  # rows of E2E
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
SETTINGS: Mapping[str, Any] = {
    "data.max_length": 192,
    "data.packing": True,
    "batch_size": 4,
    "eval_batch_size": 16,
    "samples.count": 0,
    "checkpoint.every": 0,
    "eval_every": 0,
    "optimizer.schedule": "linear",
    "mesh.data": 1,
}
REWARDS: Mapping[str, Any] = {
    "data.max_length": 64,
    "batch_size": 8,
    "graders": planted.BEGINNING,
    "rollout.group": 8,
    "rollout.max_new_tokens": 4,
    "samples.count": 0,
    "checkpoint.every": 0,
    "eval_every": 0,
    "mesh.data": 1,
}

Row = dict[str, Any]


class Curve(NamedTuple):
    """Runs that differ in the rate.

    Attributes:
        task: "e2e" or "rewards".
        name: of the curve.
        recipe: of its runs.
        rates: of learning.
        settings: keys of the recipe that are the curve's own.
        style: colour and line.
    """

    task: str
    name: str
    recipe: str
    rates: Sequence[float]
    settings: Mapping[str, Any]
    style: tuple[str, str]


def rates(middle: float, count: int = 5) -> list[float]:
    """So many rates, half a decade apart."""
    return [float(f"{middle * 10 ** ((n - count // 2) / 2):.2g}") for n in range(count)]


def lora(name: str, style: tuple[str, str], **settings: Any) -> Curve:
    """A curve of LoRA on E2E."""
    keys = {f"method.{key}": value for key, value in settings.items()}
    return Curve("e2e", name, "configs/sft.py:lora", rates(1e-2), keys, style)


NEAR = (3.2e-3, 1e-2, 3.2e-2)  # where the others found the best
CURVES = (
    Curve("e2e", "full", "configs/sft.py:full", rates(1e-3), {}, ("#000000", "-")),
    lora("rank 1", ("#56B4E9", "-"), rank=1),
    lora("rank 4", ("#0072B2", "--"), rank=4),
    lora("rank 16", ("#0072B2", "-"), rank=16),
    *(
        Curve("rewards", f"rank {rank}", "configs/rl.py:lora", (8e-4, 3.2e-3), {"method.rank": rank}, style)
        for rank, style in ((1, ("#56B4E9", "-")), (16, ("#0072B2", "-")))
    ),
    lora("attention, rank 16", ("#E69F00", "--"), rank=16, targets=ATTENTION)._replace(rates=NEAR),
    lora("feed-forward, rank 16", ("#009E73", "--"), rank=16, targets=FEED_FORWARD)._replace(rates=NEAR),
    lora("rank 64", ("#CC79A7", "-"), rank=64)._replace(rates=NEAR),
    Curve("rewards", "full", "configs/rl.py:full", (8e-5, 3.2e-4), {}, ("#000000", "-")),
)  # fmt: skip


def write_data(source: Path, target: Path) -> dict[str, Path]:
    """Writes the rows of both tasks: those that train and those that are held out."""
    lines = (source / "valid.txt").read_text(encoding="utf-8").splitlines()
    rows = list(e2e.convert(lines, "valid.txt"))
    records = list(dict.fromkeys(row["prompt"] for row in rows))
    aside = set(records[::5])
    train = [row for row in rows if row["prompt"] not in aside]
    held_out = list({row["prompt"]: row for row in rows if row["prompt"] in aside}.values())
    parts = {
        "e2e": (_spread(train, TRAIN), _spread(held_out, HELD_OUT)),
        "rewards": planted.questions(random.Random(0)),
    }
    files = {}
    for task, each in parts.items():
        for part, some in zip(("train", "eval"), each, strict=True):
            files[f"{task} {part}"] = target / f"{task}.{part}.jsonl"
            text = "".join(json.dumps(row) + "\n" for row in some)
            files[f"{task} {part}"].write_text(text, encoding="utf-8")
    return files


def _spread(rows: Sequence[Row], count: int) -> list[Row]:
    return [rows[index * len(rows) // count] for index in range(count)]


def made(curve: Curve, files: Mapping[str, Path], steps: int, folder: Path) -> list[Row]:
    """The curve's runs: rate, held-out number, trained parameters and processor seconds of each."""
    import jax

    import jaxft

    common = dict(SETTINGS if curve.task == "e2e" else REWARDS) | {"steps": steps}
    common |= {f"data.{part}": str(files[f"{curve.task} {part}"]) for part in ("train", "eval")}
    together = curve.task == "e2e" and "lora" in curve.recipe
    groups = [curve.rates] if together else [[rate] for rate in curve.rates]
    found, number = [], "eval_loss" if curve.task == "e2e" else "eval_reward"
    for group in groups:
        members = [{"name": f"{rate:g}", "optimizer.learning_rate": rate} for rate in group]
        own = {"population": tuple(members)} if together else {"optimizer.learning_rate": group[0]}
        run, began = folder / f"{group[0]:g}", time.process_time()
        result = jaxft.train(jaxft.load_config(curve.recipe, common | curve.settings | own), run)
        seconds = (time.process_time() - began) / len(group)
        told = (
            {row["name"]: row for row in json.loads((run / "population.json").read_text())}
            if together
            else {f"{group[0]:g}": {"metrics": result.metrics}}
        )
        for rate in group:
            value = told[f"{rate:g}"]["metrics"].get(number)
            found.append({
                "task": curve.task, "curve": curve.name, "rate": rate, "steps": steps, "value": value,
                "trained": result.trained, "cpu_seconds": round(seconds, 1),
            })  # fmt: skip
        jax.clear_caches()
    return found


def best(rows: Sequence[Row]) -> tuple[float, float, bool]:
    """(the best rate of those that were tried, its loss, whether it is at the edge).

    >>> best([{"rate": 10.0**n, "value": abs(n)} for n in (-1, 0, 1)])
    (1.0, 0, False)
    """
    known = sorted((row["rate"], row["value"]) for row in rows if _is_number(row["value"]))
    at = min(range(len(known)), key=lambda place: known[place][1])
    return (*known[at], not 0 < at < len(known) - 1)


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def table(rows: Sequence[Row]) -> str:
    """Of each curve its best rate, that beside full tuning's, and what it comes to."""
    lines = [
        "| task | what trains | trained | best rate | of full's | held-out loss |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    mine = [(curve, of_curve(rows, curve)) for curve in CURVES if curve.task == "e2e"]
    full = best(mine[0][1])[0] if mine[0][1] else math.nan
    for curve, some in mine:
        if some:
            rate, value, edge = best(some)
            lines.append(
                f"| E2E | {curve.name} | {some[0]['trained']:,} | {rate:.2g}{' (edge)' * edge} | {rate / full:.3g} "
                f"| {value:.3f} |"
            )
    rewarded = [(curve, of_curve(rows, curve)) for curve in CURVES if curve.task == "rewards"]
    if any(some for _, some in rewarded):
        lines += [
            "",
            "| what trains on rewards | trained | held-out reward, by rate |",
            "| --- | ---: | --- |",
        ]
    for curve, some in rewarded:
        if some:
            told = ", ".join(f"{row['value']:.2f} ({row['rate']:g})" for row in some)
            lines.append(f"| {curve.name} | {some[0]['trained']:,} | {told} |")
    return "\n".join(lines)


def of_curve(rows: Sequence[Row], curve: Curve) -> list[Row]:
    """The curve's rows."""
    return [row for row in rows if (row["task"], row["curve"]) == (curve.task, curve.name)]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Held-out loss over the rate, a line for each curve on E2E."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4.8), layout="constrained")
    axes = figure.subplots()
    for curve in CURVES:
        some = sorted((row["rate"], row["value"]) for row in of_curve(rows, curve))
        if curve.task == "e2e" and some:
            color, line = curve.style
            label = "full tuning" if curve.name == "full" else f"LoRA, {curve.name}"
            axes.plot(*zip(*some, strict=True), line, color=color, marker="o", label=label)
    lowest = min(row["value"] for row in rows if row["task"] == "e2e")
    axes.set_xscale("log")
    axes.set_ylim(lowest - 0.1, lowest + 2.0)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.set_title("E2E on the embedded base of 3.5 million parameters", fontsize=11)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Makes the runs that are missing, then the table and the plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data/e2e"))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent, metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=48, help="updates of a run on E2E")
    parser.add_argument("--rewarded", type=int, default=8, help="updates of a run on rewards")
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)
    file = arguments.results / "regret.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines]
    for curve in CURVES:
        if of_curve(rows, curve):
            continue
        with tempfile.TemporaryDirectory() as folder:
            files = write_data(arguments.data, Path(folder))
            steps = arguments.steps if curve.task == "e2e" else arguments.rewarded
            found = made(curve, files, steps, Path(folder))
        rows += found
        with file.open("a", encoding="utf-8") as stream:
            stream.write("".join(json.dumps(row) + "\n" for row in found))
        print("\n".join(map(json.dumps, found)), flush=True)
    draw(rows, arguments.results / "regret.png")
    print(table(rows))


if __name__ == "__main__":
    main()
