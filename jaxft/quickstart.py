"""`jaxft quickstart`: fine-tunes the embedded base on the embedded data and shows what changed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxft.assets import quickstart_data, tiny_folder
from jaxft.configuration import load_config
from jaxft.data import read_rows
from jaxft.errors import UserError
from jaxft.formats import load, load_adapter
from jaxft.inference import generate
from jaxft.runs.metrics import read_metrics
from jaxft.runtime.storage import place
from jaxft.training.loop import Result, train

RECIPE = "configs/sft.py:lora"
SHOWN = 3  # held-out prompts whose answers are printed
LONGEST_ANSWER = 40  # tokens: a few more than the longest right one
# Large for LoRA: the base is small, and so is the time.
SETTINGS: Mapping[str, Any] = {
    "model": "tiny",
    "data.train": str(quickstart_data("train")),
    "data.eval": str(quickstart_data("heldout")),
    "data.max_length": 128,
    "batch_size": 16,
    "eval_batch_size": 20,
    "epochs": 6.0,
    "eval_every": 100,
    "mesh.data": 1,  # one device is enough, and there may be any number
    "samples.max_new_tokens": LONGEST_ANSWER,
    "optimizer.learning_rate": 5e-3,
    "optimizer.schedule": "cosine",
    "optimizer.warmup_steps": 10,
}
START = """\
jaxft quickstart
A base of 3.5 million parameters, which has read nothing but GSM8K's problems, learns by LoRA to
turn a small record into the problem that it stands for. The run is written to {workdir}.
"""
NEXT = """
Ask the tuned model something else:

  jaxft generate --model tiny --adapter {adapter} \\
      --prompt "name: Anna | item: pens | count: 7 | price: 3 dollars ->"

Next, with a model and data of your own (JSONL rows of "prompt" and "completion", or "messages"):

  jaxft train --config {recipe} --workdir runs/first \\
      --config.model=path/to/model --config.data.train=train.jsonl --config.data.eval=heldout.jsonl
  jaxft generate --model path/to/model --adapter runs/first/adapter --prompt "..."
"""


def quickstart(workdir: str | Path, overrides: Mapping[str, Any] | None = None) -> None:
    """Trains, and prints what base and tuned model say, the held-out figures, and what to do next.

    On the folder of a quickstart that was cut short it goes on; on a whole one it trains no more
    and prints the same again.

    Args:
        workdir: the run's folder.
        overrides: keys of the configuration and their values, for a run other than `SETTINGS`.

    Raises:
        UserError: the folder is of another run, or of none.
    """
    began = time.perf_counter()
    config = load_config(RECIPE, {**SETTINGS, **(overrides or {})})
    print(START.format(workdir=workdir), flush=True)
    result = _train(config, workdir)
    trained = time.perf_counter() - began
    rows = [row.values for row in read_rows(quickstart_data("heldout"))]
    prompts, references = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    model, params = load(tiny_folder())
    tuned = load_adapter(params, result.output)
    before, after = (
        generate(model, tree, prompts, tokenizer=tiny_folder(), max_new_tokens=LONGEST_ANSWER,
                 batch_size=len(prompts))
        for tree in (params, tuned)
    )  # fmt: skip
    _print_answers(prompts, before, after, references)
    _print_figures(result, _share(before, references), _share(after, references))
    print(f"\nloss plot   {result.plot}\nadapter     {result.output} (PEFT's format)")
    print(f"seconds     {trained:.0f} for training, {time.perf_counter() - began:.0f} in all")
    print(NEXT.format(recipe=RECIPE, adapter=result.output), end="", flush=True)


def _train(config: ConfigDict, workdir: str | Path) -> Result:
    try:
        return train(config, workdir)
    except UserError as error:
        if (place(workdir) / "config.json").exists():
            hint = f"{error}; jaxft quickstart --workdir OTHER begins in a new folder"
            raise UserError(hint) from error
        raise


def _share(answers: Sequence[str], references: Sequence[str]) -> float:
    """The share of the answers that are right to the letter.

    >>> _share([" 2 cats.", " a dog"], [" 2 cats.", " a cow"])
    0.5
    """
    pairs = zip(answers, references, strict=True)
    return sum(answer.strip() == reference.strip() for answer, reference in pairs) / len(answers)


def _print_answers(
    prompts: Sequence[str], before: Sequence[str], after: Sequence[str], references: Sequence[str]
) -> None:
    print("\nHeld-out prompts, and what the models say to them:")
    for row in list(zip(prompts, before, after, references, strict=True))[:SHOWN]:
        prompt, base, tuned, reference = (" ".join(text.split()) for text in row)
        print(f"\n  prompt    {prompt}\n  base      {base}\n  tuned     {tuned}")
        print(f"  right is  {reference}")


def _print_figures(result: Result, right_before: float, right_after: float) -> None:
    losses = [
        line["loss"]
        for line in read_metrics(result.workdir / "metrics.jsonl")
        if line["split"] == "eval"
    ]
    print(f"\n{'held out':12}{'base':>10}{'tuned':>10}")
    print(f"{'loss':12}{losses[0]:10.3f}{losses[-1]:10.3f}")
    print(f"{'exactly right':12}{right_before:9.0%}{right_after:10.0%}")
