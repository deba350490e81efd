"""The embedded base learns two tasks by reward, each from a start that hardly ever does the right thing by itself.

    python experiments/reinforcement.py --tasks words sums --seeds 1 2 3 4 5

`words`: a word is to be written backwards; the start has read words written forwards thrice as often. `sums`: two
numbers are to be added whose last digits make ten or more; the start has read sums without the carry thrice as often.
So each start has seen the right answers, and says the wrong ones where it is to say what is likeliest. From its adapter
a run with rewards goes on, which sees no answer: one that it samples is worth the share of its letters that stand where
they should, and 1 more if it is right. A fifth of the questions is held out of both.
Written beside this script, after each run: reinforcement.json (runs that stand there are not made again),
reinforcement.png, reinforcement.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HELD_OUT = 5  # one question in so many
WRONG = 3  # times that the start reads the wrong answer, for each time the right one
LOW, HIGH = 0.1, 0.95  # held out: below, before; at least, after
COMMON: Mapping[str, Any] = {
    "model": "tiny",
    "data.max_length": 16,
    "samples.count": 0,
    "checkpoint.every": 0,
    "mesh.data": 1,
    "eval_batch_size": 64,
}
START: Mapping[str, Any] = {
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
    "rollout.max_new_tokens": 5,
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
Question = tuple[str, str, str]  # what is asked, the right answer, the wrong one


def share(sample: Mapping[str, Any], item: Mapping[str, Any]) -> float:
    """The share of the letters that stand where they should, less those too few or too many."""
    said, right = ("".join(text.split()) for text in (sample["output_text"], item["completion"]))
    return (sum(map(str.__eq__, said, right)) - abs(len(said) - len(right))) / len(right)


def words() -> list[Question]:
    """Words of three letters, no palindromes: backwards, and as they stand."""
    found = []
    for word in itertools.permutations("abcdefgh", 3):
        forwards, backwards = " ".join(word), " ".join(word[::-1])
        found.append((f"{forwards} ->", f" {backwards}", f" {forwards}"))
    return found


def sums() -> list[Question]:
    """Sums below 90 of numbers of two digits, with a carry and without it: of 90 and more no start tries the 9."""
    return [
        (f"{one} + {two} =", f" {one + two}", f" {one + two - 10}")
        for one in range(10, 50)
        for two in range(10, 50)
        if one % 10 + two % 10 >= 10 and one + two < 90
    ]


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learned.

    Attributes:
        title: as a heading.
        questions: all that there are.
        start: supervised updates, of `rows` questions each.
        steps: updates with rewards.
        rate: of these.
        schedule: of the rate, after the warm-up.
    """

    title: str
    questions: Callable[[], list[Question]]
    start: int
    rows: int
    steps: int
    rate: float
    schedule: str


TASKS = {
    "words": Task(
        "Words backwards",
        words,
        start=150,
        rows=32,
        steps=160,
        rate=3e-4,
        schedule="constant",
    ),
    "sums": Task(
        "Sums with a carry",
        sums,
        start=250,
        rows=64,
        steps=120,
        rate=3e-4,
        schedule="linear",
    ),
}


def write_questions(task: Task, folder: Path, seed: int, most: int = 128) -> dict[str, Path]:
    """train.jsonl and heldout.jsonl (at most so many): the right answers; start.jsonl: also the wrong ones."""
    questions = task.questions()
    random.Random(seed).shuffle(questions)
    train = [question for number, question in enumerate(questions) if number % HELD_OUT]
    parts = {
        "train": [(asked, right) for asked, right, _ in train],
        "heldout": [(asked, right) for asked, right, _ in questions[::HELD_OUT][:most]],
        "start": [(asked, wrong) for asked, _, wrong in train] * WRONG
        + [(asked, right) for asked, right, _ in train],
    }
    for name, pairs in parts.items():
        rows = [{"prompt": asked, "completion": answer} for asked, answer in pairs]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: folder / f"{name}.jsonl" for name in parts}


def run(name: str, seed: int, folder: Path, objective: str) -> dict[str, Any]:
    """Both runs of a seed, and the held-out numbers of the second."""
    import jaxft
    from jaxft.runs.metrics import read_metrics

    task, began, used = TASKS[name], time.perf_counter(), time.process_time()
    files = write_questions(task, folder, seed)
    common: dict[str, Any] = {**COMMON, "seed": seed, "data.train": str(files["train"])}
    start = {**common, **START, "steps": task.start, "batch_size": task.rows}
    start["data.train"] = str(files["start"])
    jaxft.train(jaxft.load_config("configs/sft.py:lora", start), folder / "start")
    (folder / "graders.json").write_text(json.dumps(GRADERS))
    rewarded = {
        **common,
        **REWARDED,
        "objective.name": objective,
        "optimizer.learning_rate": task.rate,
        "optimizer.schedule": task.schedule,
        "data.eval": str(files["heldout"]),
        "graders": str(folder / "graders.json"),
        "adapter": str(folder / "start" / "adapter"),
        "steps": task.steps,
    }
    jaxft.train(jaxft.load_config("configs/rl.py:lora", rewarded), folder / "run")
    lines = read_metrics(folder / "run" / "metrics.jsonl")
    held_out = [line for line in lines if line["split"] == "eval"]
    training = [line for line in lines if line["split"] == "train"]
    return {
        "task": name,
        "seed": seed,
        "objective": objective,
        "settings": {key: value for key, value in vars(task).items() if key != "questions"},
        "steps": [line["step"] for line in held_out],
        "exact": [line["rewards/exact/mean"] for line in held_out],
        "training_reward": [round(line["reward"], 4) for line in training],
        "seconds": round(time.perf_counter() - began, 1),
        "processor_seconds": round(time.process_time() - used, 1),
    }


def page(results: Sequence[Mapping[str, Any]]) -> str:
    """reinforcement.md but for what stands there by hand, behind its last table."""
    lines = [
        "# Learning from rewards",
        "",
        "Made by `experiments/reinforcement.py` with the embedded base and LoRA: some supervised updates, then "
        f"`{results[0]['objective']}`, {REWARDED['batch_size']} questions an update with {REWARDED['rollout.group']} "
        "answers each. The figures are the share of held-out questions to which the likeliest answer is right to the "
        "letter; processor seconds are those of both runs.",
        "",
    ]
    for name, task in TASKS.items():
        mine = [one for one in results if one["task"] == name]
        if mine:
            lines += [f"## {task.title}", "", *_table(task, mine), ""]
    return "\n".join([*lines, "![Held-out questions, and the reward](reinforcement.png)", ""])


def _table(task: Task, results: Sequence[Mapping[str, Any]]) -> list[str]:
    asked, right, wrong = task.questions()[0]
    steps = results[0]["steps"]
    reached = [one for one in results if one["exact"][0] < LOW and one["exact"][-1] >= HIGH]
    lines = [
        f"`{asked}` wants `{right.strip()}`, and the start mostly says `{wrong.strip()}`. {task.start} supervised "
        f"updates of {task.rows} rows; then rate {task.rate:.0e}, {task.schedule}. From below {LOW} to at least "
        f"{HIGH}: {len(reached)} of {len(results)} seeds.",
        "",
        f"| seed | before | {' | '.join(str(step) for step in steps[1:])} updates | processor seconds |",
        "| ---: |" + " ---: |" * (len(steps) + 1),
    ]
    for one in results:
        cells = " | ".join(f"{value:.3f}" for value in one["exact"])
        lines.append(f"| {one['seed']} | {cells} | {one['processor_seconds']:.0f} |")
    return lines


def draw(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Held-out questions on the left, the reward of training on the right; a row a task, a line a seed."""
    from matplotlib.figure import Figure

    from jaxft.runs.plots import smoothed

    tasks = [name for name in TASKS if any(one["task"] == name for one in results)]
    figure = Figure(figsize=(8.5, 3.3 * len(tasks)), layout="constrained")
    grid = figure.subplots(len(tasks), 2, squeeze=False)
    for (left, right), name in zip(grid, tasks, strict=True):
        for one in (one for one in results if one["task"] == name):
            left.plot(one["steps"], one["exact"], marker="o", label=f"seed {one['seed']}")
            right.plot(smoothed(one["training_reward"]))
        left.axhline(HIGH, color="#777777", linestyle=":", linewidth=1)
        left.set_ylabel("held out, right to the letter")
        right.set_ylabel("reward of sampled answers, smoothed")
        left.set_title(TASKS[name].title, loc="left", fontsize="medium")
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
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--objective", default="dapo")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, metavar="FOLDER")
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )  # where graders find `share`
    made = arguments.output / "reinforcement.json"
    results = json.loads(made.read_text()) if made.exists() else []
    for name, seed in itertools.product(arguments.tasks, arguments.seeds):
        if any((one["task"], one["seed"]) == (name, seed) for one in results):
            continue
        with tempfile.TemporaryDirectory() as folder:
            results.append(run(name, seed, Path(folder), arguments.objective))
        results.sort(key=lambda one: (list(TASKS).index(one["task"]), one["seed"]))
        made.write_text(json.dumps(results) + "\n")
        (arguments.output / "reinforcement.md").write_text(page(results), encoding="utf-8")
        draw(results, arguments.output / "reinforcement.png")
    print(page(results))


if __name__ == "__main__":
    main()
