"""DPO on HH harmless with the embedded base: held-out preference accuracy and margin over the updates.

    python experiments/preferences.py --data ../shared/data/hh_rlhf/harmless_test.jsonl.gz

Every eighth pair of the file is held out, the others train once, in rows packed with many pairs behind one copy of
their prompt each. The base has read nothing but GSM8K's problems: what it can learn of harmlessness is little, and what
the curves show is that the objective does what it says. Some of the data are offensive; none of it is written.
Written beside this script: preferences.json, preferences.png, preferences.md.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HELD_OUT = 8  # one pair in so many
SETTINGS: Mapping[str, Any] = {
    "data.max_length": 256,
    "data.packing": True,
    "data.bad_rows": "skip",
    "batch_size": 8,  # packed rows of 512 tokens
    "eval_batch_size": 8,
    "samples.count": 0,
    "checkpoint.every": 0,
    "method.rank": 16,
    "optimizer.schedule": "cosine",
    "optimizer.learning_rate": 1e-3,
    "optimizer.warmup_steps": 5,
    "mesh.data": 1,
}
SHOWN = (
    "loss",
    "rewards/accuracies",
    "rewards/margins",
    "rewards/chosen",
    "rewards/rejected",
    "kl",
)


def split(source: Path, target: Path) -> dict[str, Path]:
    """train.jsonl and heldout.jsonl, lines as they stand in the source."""
    opened = gzip.open if source.suffix == ".gz" else open
    with opened(source, "rt", encoding="utf-8") as file:  # type: ignore[operator]
        lines = [line for line in file if line.strip()]
    parts = {
        "train": [line for number, line in enumerate(lines) if number % HELD_OUT],
        "heldout": lines[::HELD_OUT],
    }
    for name, chosen in parts.items():
        (target / f"{name}.jsonl").write_text("".join(chosen), encoding="utf-8")
    return {name: target / f"{name}.jsonl" for name in parts}


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Trains, and reads the held-out numbers at each evaluation."""
    import jaxft
    from jaxft.runs.metrics import read_metrics

    files = split(arguments.data, folder)
    overrides = {
        **SETTINGS,
        "model": arguments.model,
        "objective.name": arguments.objective,
        "data.train": str(files["train"]),
        "data.eval": str(files["heldout"]),
        "steps": arguments.steps,
        "eval_every": arguments.eval_every,
    }
    config = jaxft.load_config("configs/dpo.py:lora", overrides)
    jaxft.train(config, folder / "run")
    lines = read_metrics(folder / "run" / "metrics.jsonl")
    held_out = [line for line in lines if line["split"] == "eval"]
    return {
        "objective": arguments.objective,
        "updates": held_out[-1]["step"],
        "learning_rate": config.optimizer.learning_rate,
        "steps": [line["step"] for line in held_out],
        **{name: [line.get(name) for line in held_out] for name in SHOWN},
    }


def page(results: Mapping[str, Any]) -> str:
    """preferences.md."""
    rows = zip(results["steps"], *(results[name] for name in SHOWN), strict=True)
    lines = [
        "# Preferences: HH harmless, with the embedded base",
        "",
        f"Made by `experiments/preferences.py`: `{results['objective']}`, LoRA of rank {SETTINGS['method.rank']}, rate "
        f"{results['learning_rate']:.0e}, {results['updates']} updates of {SETTINGS['batch_size']} packed rows. "
        "Numbers are those of the held-out pairs; before the first update policy and reference are one, so that "
        "no reward exceeds another.",
        "",
        f"| updates | {' | '.join(SHOWN)} |",
        f"| ---: {'| ---: ' * len(SHOWN)}|",
    ]
    for step, *values in rows:
        lines.append(f"| {step} | {' | '.join(f'{value:.4f}' for value in values)} |")
    return "\n".join([*lines, "", "![Held-out accuracy and margin](preferences.png)", ""])


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Accuracy on the left, rewards and their margin on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(results["steps"][1:], results["rewards/accuracies"][1:], marker="o", color="#0072B2")
    left.axhline(0.5, color="#777777", linestyle=":", linewidth=1)
    left.set_ylabel("held-out preference accuracy")
    for name, color in (("chosen", "#009E73"), ("rejected", "#D55E00"), ("margins", "#0072B2")):
        values = results[f"rewards/{name}"]
        right.plot(results["steps"], values, marker="o", color=color, label=name)
    right.set_ylabel("held-out reward")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.set_xlabel("updates")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{results['objective']} on HH harmless, base of 3.5 million parameters", fontsize=11
    )
    figure.savefig(path, dpi=150)


def main() -> None:
    """Reads the arguments, trains, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = Path("../shared/data/hh_rlhf/harmless_test.jsonl.gz")
    parser.add_argument("--data", type=Path, default=data)
    parser.add_argument("--model", default="tiny", help="a Hugging Face folder; default: tiny")
    parser.add_argument("--objective", default="dpo")
    parser.add_argument("--steps", type=int, default=0, help="updates; default: one epoch")
    parser.add_argument("--eval-every", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, metavar="FOLDER")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        results = run(arguments, Path(name))
    (arguments.output / "preferences.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.output / "preferences.md").write_text(page(results), encoding="utf-8")
    draw(results, arguments.output / "preferences.png")
    print(page(results))


if __name__ == "__main__":
    main()
