"""How fast examples become packed rows, beside TRL on the same file, and whether a step ever waits for them.

    python experiments/data_speed.py --data train.jsonl [--tokenizer FOLDER] [--reference-python PATH]
                                     [--rounds 5] [--steps 8] [--record]

Preparation: reading the file, tokenizing it and packing it into rows of 1024 places, each column in a
process of its own that is warm (imports and tokenizer loaded, the first rows done once) and then waits
for its turn; they take turns, so that all see the same machine. TRL is SFTTrainer's own preparation
(`packing=True`, its best-fit strategy) in one process, as it does by default, and in two. Its cache is
off. The tokens must agree. Two CPU cores are used, whatever the machine has.

Waiting: `jaxft.train` on SmolLM-135M's shape with random weights (LoRA r=16, 2 rows of 512 places,
float32), over the same file in the tokenizer of the embedded base: the seconds that steps waited for
batches against the seconds that they took.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from speed import ROOT, reference_python

MAX_LENGTH = 1024
CORES = 2
COLUMNS = {"jaxft": "jaxft", "trl": "TRL, 1 process", "trl2": "TRL, 2 processes"}
GOALS = {"tokens_per_second": 1e6, "filled": 0.95, "waiting": 0.01}

Numbers = dict[str, float]
Prepare = Callable[[], tuple[int, int]]


def jaxft_worker(data: str, tokenizer_folder: str) -> Prepare:
    """Reads, tokenizes and packs, and gives (tokens, rows)."""
    from jaxft.data import load_tokenizer, pack, prepare_examples, read_rows

    tokenizer = load_tokenizer(tokenizer_folder)

    def prepare() -> tuple[int, int]:
        rows = read_rows(data)
        examples, summary = prepare_examples(
            rows, tokenizer, max_length=MAX_LENGTH, loss_on="completion"
        )
        return summary.tokens, len(pack(examples.lengths.tolist(), MAX_LENGTH))

    return prepare


def trl_worker(data: str, tokenizer_folder: str, processes: int) -> Prepare:
    """The same by SFTTrainer's preparation."""
    import types

    import datasets
    import transformers
    import trl

    datasets.disable_caching()
    datasets.disable_progress_bars()
    tokenizer = trl_tokenizer(transformers, Path(tokenizer_folder))
    trainer = types.SimpleNamespace(
        _tokenizer=tokenizer, completion_only_loss=True, chat_template=None
    )

    def prepare() -> tuple[int, int]:
        with tempfile.TemporaryDirectory() as folder:
            arguments = trl.SFTConfig(
                output_dir=folder,
                max_length=MAX_LENGTH,
                packing=True,
                dataset_num_proc=processes if processes > 1 else None,
                use_cpu=True,
                bf16=False,
            )
            rows = datasets.load_dataset("json", data_files=data, split="train", cache_dir=folder)
            packed = trl.SFTTrainer._prepare_dataset(
                trainer, rows, tokenizer, arguments, True, None, "train"
            )
            return sum(len(ids) for ids in packed["input_ids"]), len(packed)

    return prepare


def trl_tokenizer(transformers: Any, folder: Path) -> Any:
    """The tokenizer with the special tokens that jaxft finds in the folder."""
    if (folder / "tokenizer_config.json").exists():
        return transformers.AutoTokenizer.from_pretrained(str(folder))
    named = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    file = str(folder / "tokenizer.json")
    return transformers.PreTrainedTokenizerFast(tokenizer_file=file, **named)


def work(arguments: argparse.Namespace) -> None:
    """A column's process: warms up, then does the work once for each line that it is sent."""
    name = arguments.worker
    first = Path(arguments.folder) / f"{name}.jsonl"
    with open(arguments.data, encoding="utf-8") as file:
        first.write_text("".join(line for line, _ in zip(file, range(200), strict=False)))

    def worker(data: str) -> Prepare:
        if name == "jaxft":
            return jaxft_worker(data, arguments.tokenizer)
        return trl_worker(data, arguments.tokenizer, 2 if name == "trl2" else 1)

    worker(str(first))()
    prepare = worker(arguments.data)
    print("ready", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        tokens, rows = prepare()
        numbers = {"seconds": time.perf_counter() - began, "tokens": tokens, "rows": rows}
        print(json.dumps(numbers), flush=True)


def measure(arguments: argparse.Namespace, folder: str) -> dict[str, list[Numbers]]:
    """{column: its turns}."""
    pythons = {"jaxft": sys.executable}
    pythons |= dict.fromkeys(("trl", "trl2"), str(arguments.reference_python))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment |= {"RAYON_NUM_THREADS": str(CORES), "OMP_NUM_THREADS": str(CORES)}
    words = ["--data", arguments.data, "--tokenizer", arguments.tokenizer, "--folder", folder]
    turns: dict[str, list[Numbers]] = {name: [] for name in COLUMNS}
    processes: dict[str, subprocess.Popen] = {}
    try:
        for name in COLUMNS:
            processes[name] = subprocess.Popen(
                [pythons[name], __file__, *words, "--worker", name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            _line(processes[name], "ready")
        for _ in range(arguments.rounds):
            for name, process in processes.items():
                process.stdin.write("go\n")
                process.stdin.flush()
                turns[name].append(json.loads(_line(process, "{")))
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()
    return turns


def _line(process: subprocess.Popen, start: str) -> str:
    """The process's next line that starts so; what else it prints is passed over."""
    for line in process.stdout:
        if line.startswith(start):
            return line
    raise SystemExit(f"{process.args[-1]}: ended with status {process.wait()}")


def waiting(data: str, steps: int) -> Numbers:
    """{"waited": seconds, "stepped": seconds, "steps"} of a run on SmolLM-135M's shape."""
    from speed import prepare

    import jaxft
    from jaxft.assets import tiny_folder
    from jaxft.runs.metrics import read_metrics

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        config = jaxft.load_config(
            str(ROOT / "configs" / "sft.py") + ":lora",
            {
                "model": str(folder / "model"),
                "tokenizer": str(tiny_folder()),
                "data.train": data,
                "data.packing": True,
                "data.max_length": 512,
                "batch_size": 2,
                "steps": steps,
                "method.rank": 16,
            },
        )
        result = jaxft.train(config, folder / "run")
        lines = read_metrics(folder / "run" / "metrics.jsonl")
    seconds = [line["tokens"] / line["tokens_per_second"] for line in lines]
    # The first step compiles: its seconds do not count, though its wait does.
    return {"waited": result.data_wait, "stepped": sum(seconds[1:]), "steps": len(seconds) - 1}


def report(turns: dict[str, list[Numbers]], waited: Numbers) -> list[str]:
    """The table and what became of the goals."""
    lines = [
        "| | tokens a second, median | best | seconds | filled |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    speeds = {}
    for name, title in COLUMNS.items():
        seconds = [turn["seconds"] for turn in turns[name]]
        tokens, rows = turns[name][0]["tokens"], turns[name][0]["rows"]
        middle = statistics.median(seconds)
        speeds[name] = tokens / middle
        lines.append(
            f"| {title} | {tokens / middle:,.0f} | {tokens / min(seconds):,.0f} | {middle:.2f} | "
            f"{100 * tokens / (rows * MAX_LENGTH):.2f} % |"
        )
    counts = {name: turns[name][0]["tokens"] for name in COLUMNS}
    if len(set(counts.values())) > 1:
        raise SystemExit(f"the columns did not make the same tokens: {counts}")
    first = turns["jaxft"][0]
    reached = {
        "tokens_per_second": speeds["jaxft"] >= GOALS["tokens_per_second"],
        "filled": first["tokens"] / (first["rows"] * MAX_LENGTH) >= GOALS["filled"],
        "waiting": waited["waited"] / waited["stepped"] <= GOALS["waiting"],
    }
    said = {name: "reached" if holds else "MISSED" for name, holds in reached.items()}
    times = min(speeds["jaxft"] / speeds[name] for name in ("trl", "trl2"))
    share = 100 * waited["waited"] / waited["stepped"]
    return [
        *lines,
        "",
        f"- {said['tokens_per_second']}: {speeds['jaxft']:,.0f} tokens a second "
        f"(goal {GOALS['tokens_per_second']:,.0f}), {times:.1f} x the faster of TRL's",
        f"- {said['filled']}: at least {100 * GOALS['filled']:.0f} % of a row filled",
        f"- {said['waiting']}: steps waited {1000 * waited['waited']:.1f} ms in all for "
        f"{waited['steps'] + 1:.0f} batches, {share:.3f} % of {waited['stepped']:.1f} s "
        f"(goal under {100 * GOALS['waiting']:.0f} %)",
    ]


def main() -> None:
    """Measures, prints, and with --record writes data_speed.md and data_speed.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="JSONL, as experiments/e2e.py writes it")
    parser.add_argument(
        "--tokenizer", default=str(ROOT / "jaxft" / "assets" / "tiny"), help="a tokenizer's folder"
    )
    parser.add_argument("--reference-python", type=Path, help="a Python with TRL")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each column")
    parser.add_argument("--steps", type=int, default=8, help="updates of the run that may wait")
    parser.add_argument("--record", action="store_true", help="write data_speed.md and .json")
    parser.add_argument("--worker", choices=COLUMNS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    if arguments.worker:
        return work(arguments)
    arguments.reference_python = arguments.reference_python or reference_python()
    loads = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as folder:
        turns = measure(arguments, folder)
    loads.append(os.getloadavg()[0])
    sys.path.insert(0, str(ROOT))
    waited = waiting(arguments.data, arguments.steps)
    loads.append(os.getloadavg()[0])
    lines = report(turns, waited)
    name = Path(arguments.data).name
    lines.append(
        f"- {name}, {turns['jaxft'][0]['tokens']:,.0f} tokens, tokenizer {Path(arguments.tokenizer).name}; the "
        f"machine's load before, between and after: {', '.join(f'{load:.1f}' for load in loads)}"
    )
    print("\n".join(lines))
    if arguments.record:
        target = Path(__file__).with_suffix(".md")
        title = [
            "# Speed of the data",
            "",
            f"`python experiments/data_speed.py`, {CORES} CPU cores.",
            "",
        ]
        target.write_text("\n".join([*title, *lines]) + "\n", encoding="utf-8")
        results = {"preparation": turns, "waiting": waited, "loads": loads}
        text = json.dumps(results, indent=1)
        target.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
