"""DPO beside TRL's DPOTrainer in one run: SmolLM-135M's shape, LoRA of rank 16, HH pairs of at most 512 tokens.

    python experiments/dpo_speed.py [--reference-python PATH] [--pairs 4] [--steps 3] [--record]

A column is a process of its own, and they take turns of one update. All start from the same random weights (float32)
and the same adapter, and take the same pairs in the same order; their losses are printed and must agree. Columns of
jaxft show what each part gives: `separate` writes the prompt before each completion, `precomputed` knows the
reference's log-probabilities, `one chunk` forms the logits of all tokens at once. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import speed

ROOT = Path(__file__).resolve().parent.parent
TRL = "trl"
COLUMNS = ("jaxft", "separate", "precomputed", "one chunk")
MAX_LENGTH, BETA, ROWS = 512, 0.1, 400
GOALS = {"pairs_per_second": 1.5, "peak_bytes": 0.6}

Update = Callable[[], float]


def prepare(folder: Path, data: Path) -> None:
    """Model, adapter, tokenizer (the embedded one: its ids are among SmolLM's), and pairs that fit whole."""
    import shutil

    from jaxft.assets import tiny_folder
    from jaxft.data import load_tokenizer
    from jaxft.data.preference_rows import read_preferences
    from jaxft.data.preferences import prepare_preferences

    speed.prepare(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_folder() / name, folder / "model" / name)
    rows, skipped = read_preferences(data, judged=False, skip=True)
    _, summary = prepare_preferences(
        rows, load_tokenizer("tiny"), max_length=MAX_LENGTH, share=True, skip=True, skipped=skipped, group=1
    )  # fmt: skip
    print(f"HH at max {MAX_LENGTH}: {summary}", file=sys.stderr)
    tokenizer = load_tokenizer("tiny")
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for row in rows[:ROWS]:
            prompt, *sides = (row.values[key] for key in ("prompt", "chosen", "rejected"))
            if max(len(tokenizer.encode(prompt + side)) for side in sides) < MAX_LENGTH - 2:
                file.write(json.dumps(row.values) + "\n")


def jaxft_worker(name: str, folder: Path, pairs: int) -> Update:
    """One update of jaxft's on the next pairs, packed in one row."""
    import jax
    import numpy as np

    import jaxft
    from jaxft.data import length_buckets, load_tokenizer
    from jaxft.data.preference_rows import read_preferences
    from jaxft.data.preferences import collate_comparisons, prepare_preferences
    from jaxft.objectives import completion_log_probabilities, cross_entropy, objective_of
    from jaxft.training.optimizer import make_optimizer, schedule
    from jaxft.training.reference import left_out
    from jaxft.training.step import initial_state, make_train_step
    from jaxft.tree import filled

    if name == "one chunk":
        sys.modules["jaxft.objectives.cross_entropy"].CHUNK_ELEMENTS = 2**40
    del cross_entropy
    model, params = jaxft.load(folder / "model")
    method = jaxft.methods.lora(rank=speed.RANK)
    trainable, frozen = jaxft.partition(jaxft.load_adapter(params, folder / "adapter"), method)
    del params
    rows, _ = read_preferences(folder / "pairs.jsonl", judged=False, skip=False)
    examples, _ = prepare_preferences(
        rows, load_tokenizer("tiny"), max_length=MAX_LENGTH, share=name != "separate", skip=False,
        skipped=0, group=1,
    )  # fmt: skip
    recipe = jaxft.load_config(
        "configs/dpo.py:lora", {"optimizer.learning_rate": speed.LEARNING_RATE}
    )
    recipe.optimizer.schedule = "constant"
    optimizer = make_optimizer(recipe.optimizer, method, trainable, 1000)
    refers = name != "precomputed"

    def beside(rest: Any, held: Any) -> tuple[Any, ...]:
        return (filled(left_out(rest), held),) if refers else ()

    loss = functools.partial(objective_of(recipe.objective), model.config)
    rate = schedule(recipe.optimizer, 1000)
    step = jax.jit(make_train_step(loss, optimizer, rate, seed=0, beside=beside), donate_argnums=0)
    state, made = initial_state(trainable, optimizer), 0
    held = left_out(trainable)

    @jax.jit
    def known(rest: Any, batch: Any) -> Any:
        return completion_log_probabilities(model.config, filled(left_out(rest), held), batch)

    total = 2 * MAX_LENGTH * pairs

    def batch_of(number: int) -> dict[str, Any]:
        chosen = examples[number * pairs : (number + 1) * pairs]
        length = next(
            size for size in length_buckets(total) if size >= sum(len(one.tokens) for one in chosen)
        )
        return collate_comparisons([chosen], batch_size=1, length=length, pad_id=0, slots=pairs)

    answers = {}
    if not refers:
        answers = {
            number: np.stack([np.asarray(x) for x in known(frozen, batch_of(number))], -1)
            for number in range(min(8, len(examples) // pairs))
        }

    def update() -> float:
        nonlocal state, made
        batch = batch_of(made)
        if not refers:
            batch["reference"] = answers[made]
        state, metrics = step(state, frozen, batch, held)
        made += 1
        return float(metrics["loss"])

    return update


def trl_worker(folder: Path, pairs: int) -> Update:
    """The same update by TRL: its trainer's own step, one batch at a time."""
    import torch
    import transformers
    from datasets import load_dataset
    from peft import PeftModel
    from trl import DPOConfig, DPOTrainer

    file, cache = str(folder / "pairs.jsonl"), str(folder / "cache")
    data = load_dataset("json", data_files=file, split="train", cache_dir=cache)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="sdpa"
    )
    model = PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
    arguments = DPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=pairs, max_steps=1000, beta=BETA,
        learning_rate=speed.LEARNING_RATE, lr_scheduler_type="constant", max_length=MAX_LENGTH, bf16=False,
        gradient_checkpointing=False, use_cpu=True, report_to=[], train_sampling_strategy="sequential",
        disable_tqdm=True, max_grad_norm=speed.CLIP_NORM,
    )  # fmt: skip
    words = transformers.AutoTokenizer.from_pretrained(folder / "model")
    trainer = DPOTrainer(model=model, args=arguments, train_dataset=data, processing_class=words)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # which `train` would set
    batches = iter(trainer.get_train_dataloader())
    trained = [leaf for leaf in trainer.model.parameters() if leaf.requires_grad]

    def update() -> float:
        loss = trainer.training_step(trainer.model, next(batches))
        torch.nn.utils.clip_grad_norm_(trained, speed.CLIP_NORM)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return update


def work(name: str, folder: Path, pairs: int) -> None:
    """A worker: answers "go 1" with what an update took, as those of speed.py."""
    answers, sys.stdout = sys.stdout, sys.stderr
    made = trl_worker(folder, pairs) if name == TRL else jaxft_worker(name, folder, pairs)
    import time

    print(json.dumps({"ready": name}), file=answers, flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        losses = [made() for _ in range(int(line.split()[1]))]
        seconds = time.perf_counter() - start
        answer = {"seconds": seconds, "losses": losses, "peak_bytes": speed.peak_bytes()}
        print(json.dumps(answer), file=answers, flush=True)


class Worker(speed.Worker):
    """A column's process."""

    def __init__(self, name: str, python: str, folder: Path, pairs: int) -> None:
        words = ["--worker", name, "--folder", str(folder), "--pairs", str(pairs)]
        self.name = name
        self.process = subprocess.Popen(
            [python, str(Path(__file__).resolve()), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        )
        self._answer()


def compare(arguments: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """{column: figures}: the first update of each apart, then one update each in turn."""
    results: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        workers = []
        for name in (*arguments.columns, TRL):
            python = arguments.reference_python if name == TRL else sys.executable
            workers.append(Worker(name, str(python), folder, arguments.pairs))
            stack.callback(workers[-1].end)
            first = workers[-1].go(1)
            results[name] = {"first": first["seconds"], "losses": first["losses"], "seconds": []}
            print(f"{name}: first update {first['seconds']:.1f} s", file=sys.stderr)
        for _ in range(arguments.steps):
            for worker in workers:
                answer, column = worker.go(1), results[worker.name]
                column["seconds"].append(answer["seconds"])
                column["losses"] += answer["losses"]
                column["peak_bytes"] = answer["peak_bytes"]
            taken = ", ".join(
                f"{name} {column['seconds'][-1]:.1f}" for name, column in results.items()
            )
            print(taken, file=sys.stderr)
    return results


def table(results: dict[str, dict[str, Any]], pairs: int) -> list[str]:
    """The figures as Markdown. An update that compiled (a new bucket of lengths) does not move the least."""
    reference = results[TRL]
    lines = ["| | pairs/s, median | best | x TRL (best) | peak memory | x TRL | losses |"]
    lines.append("| --- " + "| ---: " * 6 + "|")
    for name, column in results.items():
        ratio = min(reference["seconds"]) / min(column["seconds"])
        memory = column["peak_bytes"]
        lines.append(
            f"| {name} | {pairs / statistics.median(column['seconds']):.3f} | {pairs / min(column['seconds']):.3f} "
            f"| {ratio:.2f} | {memory / 1e9:.2f} GB | {memory / reference['peak_bytes']:.2f} "
            f"| {', '.join(f'{loss:.5f}' for loss in column['losses'])} |"
        )
    goals = ", ".join(f"{name} {goal}" for name, goal in GOALS.items())
    return [*lines, "", f"Goals, x TRL: {goals}."]


def main() -> None:
    """Measures, prints, and with --record writes dpo_speed.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = Path("../shared/data/hh_rlhf/harmless_test.jsonl.gz")
    parser.add_argument("--data", type=Path, default=data)
    parser.add_argument("--reference-python", type=Path, help="a Python with torch, PEFT and TRL")
    parser.add_argument("--pairs", type=int, default=4, help="pairs an update")
    parser.add_argument("--steps", type=int, default=3, help="updates measured")
    parser.add_argument("--columns", nargs="+", default=list(COLUMNS), choices=COLUMNS)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--worker", choices=(*COLUMNS, TRL), help=argparse.SUPPRESS)
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments.worker, arguments.folder, arguments.pairs)
    if arguments.prepare:
        return prepare(arguments.folder, arguments.data)
    arguments.reference_python = arguments.reference_python or speed.reference_python()
    with tempfile.TemporaryDirectory() as name:
        command = [
            sys.executable,
            __file__,
            "--prepare",
            "--folder",
            name,
            "--data",
            str(arguments.data),
        ]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        subprocess.run(command, check=True, env=environment)
        results = compare(arguments, Path(name))
    lines = table(results, arguments.pairs)
    print("\n".join(lines))
    if arguments.record:
        command = f"`python experiments/dpo_speed.py --pairs {arguments.pairs}`"
        title = ["# DPO beside TRL", "", f"{command}, {os.cpu_count()} CPU cores.", ""]
        target = Path(__file__).with_suffix(".md")
        target.write_text("\n".join([*title, *lines]) + "\n", encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
