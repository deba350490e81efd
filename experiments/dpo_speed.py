"""DPO beside TRL's DPOTrainer in one run: SmolLM-135M's shape, LoRA of rank 16, HH pairs of at most 512 tokens.

    python experiments/dpo_speed.py [--reference-python PATH] [--rows 1] [--steps 6] [--record]

A column is a process of its own, and they take turns of one update. All start from the same random weights (float32)
and the same adapter, and take the same pairs in the same order; their losses are printed and must agree. jaxft's
batches are those of `config.data.packing`: rows of 1,024 places. TRL, with SDPA and without recomputation, as jaxft,
gets the pairs of a batch as its own batch. Columns of jaxft show what each part gives: `separate` writes the prompt
before each completion, `precomputed` knows the reference's log-probabilities, `one chunk` forms the logits of all
tokens at once. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import speed

ROOT = Path(__file__).resolve().parent.parent
TRL = "trl"
COLUMNS = ("jaxft", "separate", "precomputed", "one chunk")
MAX_LENGTH, BETA, ROWS, BLOCK = 512, 0.1, 400, 128
GOALS = {"pairs/s, x TRL": (1.5, True), "peak memory, x TRL": (0.6, False)}

Update = Callable[[], float]


def prepare(folder: Path, data: Path, rows: int, updates: int) -> None:
    """Model, adapter, tokenizer (the embedded one: its ids are among SmolLM's), pairs that fit whole, and batches."""
    import shutil

    from jaxft.assets import tiny_folder
    from jaxft.data import load_tokenizer
    from jaxft.data.preference_rows import read_preferences
    from jaxft.data.preferences import prepare_preferences

    speed.prepare(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_folder() / name, folder / "model" / name)
    read, skipped = read_preferences(data, judged=False, skip=True)
    tokenizer = load_tokenizer("tiny")
    _, summary = prepare_preferences(
        read, tokenizer, max_length=MAX_LENGTH, share=True, skip=True, skipped=skipped, group=1
    )
    print(f"HH at max {MAX_LENGTH}: {summary}", file=sys.stderr)
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for row in read[:ROWS]:
            prompt, *sides = (row.values[key] for key in ("prompt", "chosen", "rejected"))
            if max(len(tokenizer.encode(prompt + side)) for side in sides) < MAX_LENGTH - 2:
                file.write(json.dumps(row.values) + "\n")
    packed = batches_of(examples_of(folder), rows)
    numbers = [
        [int(name.rsplit(":", 1)[1]) - 1 for name in packed.origins(n)] for n in range(updates)
    ]
    (folder / "batches.json").write_text(json.dumps(numbers), encoding="ascii")


def examples_of(folder: Path, *, share: bool = True) -> Any:
    """The pairs, tokenized."""
    from jaxft.data import load_tokenizer
    from jaxft.data.preference_rows import read_preferences
    from jaxft.data.preferences import prepare_preferences

    rows, _ = read_preferences(folder / "pairs.jsonl", judged=False, skip=False)
    return prepare_preferences(
        rows, load_tokenizer("tiny"), max_length=MAX_LENGTH, share=share, skip=False, skipped=0, group=1
    )[0]  # fmt: skip


def batches_of(examples: Any, rows: int) -> Any:
    """Those of a run with data.packing and batch_size=rows."""
    import jaxft
    from jaxft.objectives import objective_of

    config = jaxft.load_config("configs/dpo.py:lora", {"data.packing": True, "seed": 0})
    return objective_of(config).examples.batches(
        config, examples, max_length=MAX_LENGTH, batch_size=rows, shuffle=True, pad_id=0
    )


def written_twice(folder: Path) -> list[dict[str, Any]]:
    """The same pairs with a prompt before each completion, a batch in one row, all of one length."""
    from jaxft.data.preferences import collate_comparisons

    examples = examples_of(folder, share=False).pairs()
    chosen = [[examples[i] for i in batch] for batch in groups_of(folder)]
    longest = max(sum(len(pair.tokens) for pair in batch) for batch in chosen)
    length, slots = -(-longest // BLOCK) * BLOCK, max(map(len, chosen))
    return [
        collate_comparisons([batch], batch_size=1, length=length, pad_id=0, slots=slots)
        for batch in chosen
    ]


def groups_of(folder: Path) -> list[list[int]]:
    """The pairs of each update, by number."""
    return json.loads((folder / "batches.json").read_text(encoding="ascii"))


def jaxft_worker(name: str, folder: Path, rows: int) -> Update:
    """One update of jaxft's, by the program of `jaxft train`."""
    import jax
    import numpy as np

    import jaxft
    from jaxft.objectives import completion_log_probabilities
    from jaxft.training.precompute import without
    from jaxft.training.program import OnOwn, make_program, own_of
    from jaxft.training.reference import make_reference
    from jaxft.training.sharding import make_mesh

    if name == "one chunk":
        sys.modules["jaxft.objectives.cross_entropy"].CHUNK_ELEMENTS = 2**40
    config = jaxft.load_config(
        "configs/dpo.py:lora",
        {"optimizer.learning_rate": speed.LEARNING_RATE, "optimizer.schedule": "constant", "objective.beta": BETA,
         "optimizer.warmup_steps": 0, "optimizer.clip_norm": speed.CLIP_NORM, "mesh.data": 1},
    )  # fmt: skip
    model, params = jaxft.load(folder / "model")
    method = jaxft.methods.lora(rank=speed.RANK)
    trainable, frozen = jaxft.partition(jaxft.load_adapter(params, folder / "adapter"), method)
    del params
    reference = make_reference(config, model.config, trainable, make_mesh(config.mesh))
    if name == "separate":
        batches = written_twice(folder)
    else:
        packed = batches_of(examples_of(folder), rows)
        batches = [packed[number] for number in range(len(groups_of(folder)))]
    if name == "precomputed":
        (params,) = reference.beside(frozen, *reference.held)
        known = jax.jit(lambda tree, batch: completion_log_probabilities(model.config, tree, batch))
        for batch in batches:
            batch["reference"] = np.stack(jax.device_get(known(params, batch)), -1)
        reference = without(reference)
        del params
    program = make_program(config, model.config, method, trainable, reference, steps=1000)
    step = OnOwn(jax.jit(program.update, donate_argnums=0), own_of(config, 1000))
    state = jax.device_put(jax.jit(program.initial)(trainable), jax.devices()[0])
    made = 0

    def update() -> float:
        nonlocal state, made
        state, metrics = step(state, frozen, batches[made], *reference.held)
        made += 1
        return float(metrics["loss"])

    return update


def trl_worker(folder: Path) -> Update:
    """The same update by TRL: its trainer's own step and collator."""
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
        output_dir=str(folder / "trl"), max_steps=1000, beta=BETA, learning_rate=speed.LEARNING_RATE,
        lr_scheduler_type="constant", max_length=MAX_LENGTH, bf16=False, gradient_checkpointing=False, use_cpu=True,
        report_to=[], disable_tqdm=True, max_grad_norm=speed.CLIP_NORM,
    )  # fmt: skip
    words = transformers.AutoTokenizer.from_pretrained(folder / "model")
    trainer = DPOTrainer(model=model, args=arguments, train_dataset=data, processing_class=words)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # which `train` would set
    groups = iter(groups_of(folder))
    trained = [leaf for leaf in trainer.model.parameters() if leaf.requires_grad]

    def update() -> float:
        pairs = [trainer.train_dataset[number] for number in next(groups)]
        loss = trainer.training_step(trainer.model, trainer.data_collator(pairs))
        torch.nn.utils.clip_grad_norm_(trained, speed.CLIP_NORM)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return update


def work(name: str, folder: Path, rows: int) -> None:
    """A worker: answers "go 1" with what an update took, as those of speed.py."""
    speed.answer(
        name, lambda: trl_worker(folder) if name == TRL else jaxft_worker(name, folder, rows)
    )


def compare(arguments: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """{column: figures}: the first update of each apart, then one update each in turn, every other turn backwards."""
    results: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        workers = []
        for name in (*arguments.columns, TRL):
            python = arguments.reference_python if name == TRL else sys.executable
            words = ("--folder", str(folder), "--rows", str(arguments.rows))
            workers.append(speed.Worker(name, str(python), __file__, *words))
            stack.callback(workers[-1].end)
            first = workers[-1].go(1)
            results[name] = {"first": first["seconds"], "losses": first["losses"]}
            results[name] |= {"seconds": [], "cpu_seconds": [], "peak_bytes": first["peak_bytes"]}
            print(f"{name}: first update {first['seconds']:.1f} s", file=sys.stderr)
        for turn in range(arguments.steps):
            for worker in workers if turn % 2 == 0 else reversed(workers):
                answer, column = worker.go(1), results[worker.name]
                for key in ("seconds", "cpu_seconds"):
                    column[key].append(answer[key])
                column["losses"] += answer["losses"]
                column["peak_bytes"] = answer["peak_bytes"]
            taken = (f"{name} {column['seconds'][-1]:.1f} s" for name, column in results.items())
            print(f"update {turn + 2}: {', '.join(taken)}", file=sys.stderr)
    return results


def faster(column: dict[str, Any], other: dict[str, Any]) -> float:
    """How many times as fast as the other: the median over the updates, of which each has the same pairs in both."""
    both = zip(column["seconds"], other["seconds"], strict=True)
    return statistics.median(theirs / own for own, theirs in both)


def table(results: dict[str, dict[str, Any]], pairs: Sequence[int]) -> list[str]:
    """The figures as Markdown; `pairs` are those of each measured update."""
    reference = results[TRL]
    lines = ["| | pairs/s | x TRL | first update | peak memory | x TRL | loss, first and last |"]
    lines.append("| --- " + "| ---: " * 6 + "|")
    for name, column in results.items():
        memory, losses = column["peak_bytes"], column["losses"]
        shown = name if name in (TRL, "jaxft") else f"jaxft, {name}"
        lines.append(
            f"| {shown} | {sum(pairs) / sum(column['seconds']):.3f} | {faster(column, reference):.2f} "
            f"| {column['first']:.1f} s | {memory / 1e9:.2f} GB | {memory / reference['peak_bytes']:.2f} "
            f"| {losses[0]:.5f}, {losses[-1]:.5f} |"
        )
    return lines


def verdicts(results: dict[str, dict[str, Any]]) -> list[str]:
    """Each goal with what was measured, and what each part of jaxft gives."""
    ours, reference = results["jaxft"], results[TRL]
    measured = (faster(ours, reference), ours["peak_bytes"] / reference["peak_bytes"])
    lines = []
    for (name, (goal, least)), value in zip(GOALS.items(), measured, strict=True):
        said = "reached" if (value >= goal if least else value <= goal) else "MISSED"
        lines.append(f"- {said}: {name}: {value:.2f} (goal {'>=' if least else '<='} {goal:g})")
    apart = max(
        abs(one - two)
        for column in results.values()
        for one, two in zip(column["losses"], reference["losses"], strict=True)
    )
    said = "reached" if apart <= speed.LOSS_TOLERANCE else "MISSED"
    count = len(ours["losses"])
    lines.append(
        f"- {said}: losses of {count} updates apart, all columns: {apart:.2g} (goal <= {speed.LOSS_TOLERANCE:g})"
    )
    gives = (
        ("sharing the prompt", "separate", "jaxft"),
        ("the reference beforehand", "jaxft", "precomputed"),
        ("chunks of the logits", "one chunk", "jaxft"),
    )
    for what, without, having in gives:
        if without in results and having in results:
            saved = (results[without]["peak_bytes"] - results[having]["peak_bytes"]) / 1e9
            times = faster(results[having], results[without])
            lines.append(f"- {what}: {times:.2f} x as fast, {saved:.2f} GB less")
    return lines


def main() -> None:
    """Measures, prints, and with --record writes dpo_speed.md and dpo_speed.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = Path("../shared/data/hh_rlhf/harmless_test.jsonl.gz")
    parser.add_argument("--data", type=Path, default=data)
    parser.add_argument("--reference-python", type=Path, help="a Python with torch, PEFT and TRL")
    parser.add_argument("--rows", type=int, default=1, help="packed rows an update")
    parser.add_argument("--steps", type=int, default=6, help="updates measured")
    parser.add_argument("--columns", nargs="*", default=list(COLUMNS), choices=COLUMNS)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--worker", choices=(*COLUMNS, TRL), help=argparse.SUPPRESS)
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments.worker, arguments.folder, arguments.rows)
    if arguments.prepare:
        return prepare(arguments.folder, arguments.data, arguments.rows, arguments.steps + 1)
    arguments.reference_python = arguments.reference_python or speed.reference_python()
    with tempfile.TemporaryDirectory() as name:
        words = ["--folder", name, "--data", str(arguments.data), "--rows", str(arguments.rows)]
        words += ["--steps", str(arguments.steps)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        subprocess.run([sys.executable, __file__, "--prepare", *words], check=True, env=environment)
        results = compare(arguments, Path(name))
        pairs = [len(group) for group in groups_of(Path(name))[1:]]
    lines = [*table(results, pairs), "", *verdicts(results)]
    print("\n".join(lines))
    if arguments.record:
        record(lines, results, arguments)
    return None


def record(lines: list[str], results: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Writes the report and its figures beside this script."""
    command = f"`python experiments/dpo_speed.py --rows {arguments.rows} --steps {arguments.steps}`"
    title = ["# DPO beside TRL", "", f"{command}, {os.cpu_count()} CPU cores.", ""]
    target = Path(__file__).with_suffix(".md")
    target.write_text("\n".join([*title, *lines]) + "\n", encoding="utf-8")
    target.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
