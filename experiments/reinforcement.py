"""The embedded base learns to write words backwards by reward: from a start that hardly ever does so by itself.

    python experiments/reinforcement.py --seeds 1 2 3

The start has read words written forwards thrice as often as backwards, and writes them forwards where it is to say
what is likeliest. From its adapter a run with rewards goes on, which sees no answer: one that it samples is worth the
share of its letters that stand where they should, and 1 more if it is right. A fifth of the words is held out of both.
Written beside this script: reinforcement.json, reinforcement.png, reinforcement.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LETTERS, LENGTH = "abcdefgh", 3
HELD_OUT = 5  # one word in so many
FORWARDS = 3  # times that the start reads a word forwards, for each time backwards
ENOUGH = 0.95
COMMON: Mapping[str, Any] = {
    "model": "tiny",
    "data.max_length": 32,
    "samples.count": 0,
    "checkpoint.every": 0,
    "mesh.data": 1,
    "optimizer.schedule": "constant",
    "eval_batch_size": 64,
}
START: Mapping[str, Any] = {
    "batch_size": 32,
    "method.rank": 32,
    "method.alpha": 32.0,
    "optimizer.learning_rate": 2e-3,
    "optimizer.schedule": "linear",
    "optimizer.warmup_steps": 5,
    "eval_every": 0,
}
REWARDED: Mapping[str, Any] = {
    "batch_size": 16,
    "rollout.group": 8,
    "rollout.max_new_tokens": LENGTH + 2,
    "optimizer.warmup_steps": 5,
    "eval_every": 20,
}
GRADERS: Sequence[Mapping[str, Any]] = (
    {"type": "function", "name": "share", "function": "reinforcement:share"},
    {
        "type": "string_check",
        "name": "exact",
        "operation": "eq",
        "input": "{{ sample.output_text }}",
        "reference": "{{ item.completion }}",
    },
)


def share(sample: Mapping[str, Any], item: Mapping[str, Any]) -> float:
    """The share of the letters that stand where they should, less those too few or too many."""
    said, right = sample["output_text"].split(), item["completion"].split()
    return (sum(map(str.__eq__, said, right)) - abs(len(said) - len(right))) / len(right)


def write_words(folder: Path, seed: int) -> dict[str, Path]:
    """train.jsonl and heldout.jsonl: words, letter by letter, and backwards; start.jsonl: also forwards."""
    words = list(itertools.permutations(LETTERS, LENGTH))  # no palindromes
    random.Random(seed).shuffle(words)
    train = [word for number, word in enumerate(words) if number % HELD_OUT]
    parts = {
        "train": [(word, word[::-1]) for word in train],
        "heldout": [(word, word[::-1]) for word in words[::HELD_OUT]],
        "start": [(word, word) for word in train] * FORWARDS
        + [(word, word[::-1]) for word in train],
    }
    for name, pairs in parts.items():
        rows = [
            {"prompt": f"{' '.join(word)} ->", "completion": f" {' '.join(answer)}"}
            for word, answer in pairs
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: folder / f"{name}.jsonl" for name in parts}


def run(seed: int, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both runs of a seed, and the held-out numbers of the second."""
    import jaxft
    from jaxft.runs.metrics import read_metrics

    files = write_words(folder, seed)
    common: dict[str, Any] = {**COMMON, "seed": seed, "data.train": str(files["train"])}
    start = {**common, **START, "steps": arguments.start, "data.train": str(files["start"])}
    jaxft.train(jaxft.load_config("configs/sft.py:lora", start), folder / "start")
    (folder / "graders.json").write_text(json.dumps(GRADERS))
    rewarded = {
        **common,
        **REWARDED,
        "objective.name": arguments.objective,
        "optimizer.learning_rate": arguments.rate,
        "data.eval": str(files["heldout"]),
        "graders": str(folder / "graders.json"),
        "adapter": str(folder / "start" / "adapter"),
        "steps": arguments.steps,
    }
    began, used = time.perf_counter(), time.process_time()
    config = jaxft.load_config("configs/rl.py:lora", rewarded)
    jaxft.train(config, folder / "run")
    lines = read_metrics(folder / "run" / "metrics.jsonl")
    held_out = [line for line in lines if line["split"] == "eval"]
    training = [line for line in lines if line["split"] == "train"]
    return {
        "seed": seed,
        "steps": [line["step"] for line in held_out],
        "exact": [line["rewards/exact/mean"] for line in held_out],
        "training_reward": [line["reward"] for line in training],
        "seconds": round(time.perf_counter() - began, 1),
        "processor_seconds": round(time.process_time() - used, 1),
    }


def page(results: Sequence[Mapping[str, Any]], arguments: argparse.Namespace) -> str:
    """reinforcement.md."""
    lines = [
        "# Learning from rewards: words backwards, with the embedded base",
        "",
        f"Made by `experiments/reinforcement.py`: {arguments.start} supervised updates of {START['batch_size']} words, "
        f"then `{arguments.objective}` with LoRA, rate {arguments.rate:.0e}, {REWARDED['batch_size']} words "
        f"an update with {REWARDED['rollout.group']} answers each. The figures are the share of held-out words "
        "that the likeliest answer writes backwards to the letter.",
        "",
        "| seed | before | "
        + " | ".join(f"{step} updates" for step in results[0]["steps"][1:])
        + " | processor seconds |",
        "| ---: |" + " ---: |" * (len(results[0]["steps"]) + 1),
    ]
    for one in results:
        cells = " | ".join(f"{value:.3f}" for value in one["exact"])
        lines.append(f"| {one['seed']} | {cells} | {one['processor_seconds']:.0f} |")
    return "\n".join([*lines, "", "![Held-out words, and the reward](reinforcement.png)", ""])


def draw(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Held-out words on the left, the reward of training on the right; a line a seed."""
    from matplotlib.figure import Figure

    from jaxft.runs.plots import smoothed

    figure = Figure(figsize=(8.5, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for one in results:
        left.plot(one["steps"], one["exact"], marker="o", label=f"seed {one['seed']}")
        right.plot(smoothed(one["training_reward"]))
    left.axhline(ENOUGH, color="#777777", linestyle=":", linewidth=1)
    left.set_ylabel("held-out words right to the letter")
    right.set_ylabel("reward of sampled answers, smoothed")
    left.legend(frameon=False)
    for axes in (left, right):
        axes.set_xlabel("updates")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Reads the arguments, trains, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--objective", default="dapo")
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--start", type=int, default=150, help="supervised updates")
    parser.add_argument("--steps", type=int, default=100, help="updates with rewards")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, metavar="FOLDER")
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )  # where graders find `share`
    results = []
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as name:
            results.append(run(seed, Path(name), arguments))
        said = page(results, arguments)
        (arguments.output / "reinforcement.json").write_text(json.dumps(results, indent=1) + "\n")
        (arguments.output / "reinforcement.md").write_text(said, encoding="utf-8")
    draw(results, arguments.output / "reinforcement.png")
    print(said)


if __name__ == "__main__":
    main()
