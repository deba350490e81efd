"""One tuning run of a lever, by `jaxft.train`, and what it came to."""

from __future__ import annotations

import functools
import shutil
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxft.assets import model_folder
from jaxft.comparison.given import Given, graders_in
from jaxft.comparison.levers import LEVERS, Lever
from jaxft.configuration import flatten, load_config, recipe
from jaxft.errors import UserError
from jaxft.formats import load
from jaxft.inference.opening import open_model
from jaxft.models import Transformer
from jaxft.objectives.objective import Objective, objective_of
from jaxft.runs.metrics import read_metrics
from jaxft.runs.result import Result
from jaxft.training.loop import train
from jaxft.training.precision import with_dtypes
from jaxft.tree import PyTree

WARM = 2  # updates at a run's start whose speed is not that of the others
COMMON: Mapping[str, Any] = {
    "samples.count": 0,
    "checkpoint.every": 0,
    "eval_every": 0,
    "log_every": 1,
}


def configured(given: Given, lever: Lever, rate: float, steps: int, seed: int) -> ConfigDict:
    """The configuration of a lever's run.

    Raises:
        UserError: a key of `config.settings` that no recipe has, or a value that does not fit.
    """
    config = given.config
    known = _keys(lever.recipe)
    own: dict[str, Any] = {
        **COMMON,
        "model": config.model,
        "dtype": config.dtype,
        "param_dtype": config.param_dtype,
        "seed": config.seed + seed,
        "data.train": given.files[lever.rows],
        "data.eval": given.files[f"tuning {lever.rows}"],
        "data.max_length": config.data.max_length,
        "data.packing": config.data.packing,
        "batch_size": config.batch_size,
        "eval_batch_size": config.eval_batch_size,
        "steps": steps,
        "optimizer.learning_rate": rate,
        **lever.settings,
    }
    if "documents" in lever.needs:
        own["data.retrieve"] = given.index
        own["data.retrieve_passages"] = max(config.search.passages)
    if "grader" in lever.needs:
        own["graders"] = graders_in(config.graders)
        own["rollout.max_new_tokens"] = config.max_new_tokens
    others = {key for row in LEVERS.values() if row.recipe for key in _keys(row.recipe)}
    for key, value in config.settings.items():
        if key in known or key not in others:  # as full tuning has no rank
            own[key] = value
    return load_config(lever.recipe, own)


@functools.cache
def _keys(source: str) -> tuple[str, ...]:
    return tuple(flatten(unchecked(source)))


def unchecked(source: str) -> ConfigDict:
    """What a recipe gives, before anything is set that it needs."""
    file, _, method = source.partition(":")
    return recipe(file, method)


def objective_for(lever: Lever) -> Objective:
    """The objective of the lever's recipe."""
    return objective_of(unchecked(lever.recipe))


def run(
    given: Given, lever: Lever, rate: float, steps: int, seed: int, *, keep: bool
) -> dict[str, Any]:
    """Tunes, and tells what is known of the run; `value` is that of the tuning rows, None where it failed.

    Args:
        given: what every lever gets.
        lever: a row that has a recipe.
        rate: of learning.
        steps: updates.
        seed: beside `config.seed`.
        keep: whether what was tuned stays in RUN/runs.
    """
    folder = given.folder / "runs" / f"{lever.name}-rate{rate:g}-steps{steps}-seed{seed}"
    config, began = configured(given, lever, rate, steps, seed), time.perf_counter()
    try:
        result = _trained(config, folder)
    except UserError as error:
        if not (folder / "metrics.jsonl").exists():  # it never began: the data or a setting
            raise
        shutil.rmtree(folder, ignore_errors=True)
        return {"value": None, "why": str(error)}
    best = objective_for(lever).best
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if line["split"] == "train"]
    speeds = [line["tokens_per_second"] for line in lines[WARM:] or lines]
    made = {
        "value": result.metrics.get(f"eval_{best.name}"),
        "run": str(folder.relative_to(given.folder)),
        "output": str(result.output.relative_to(given.folder)),
        "parameters": result.trained,
        "memory": result.peak,
        "bytes": sum(file.stat().st_size for file in result.output.glob("*.safetensors")),
        "tokens": int(sum(line["tokens"] for line in lines)),
        "tokens_per_second": round(statistics.median(speeds), 1),
        "step_seconds": statistics.median(
            line["tokens"] / line["tokens_per_second"] for line in lines[WARM:] or lines
        ),
        "tuning_seconds": round(time.perf_counter() - began, 3),
    }
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
    return made


def planned_bytes(given: Given, lever: Lever, rate: float, steps: int) -> int:
    """What an update needs on a device of `config.topology`, by `jaxft plan`."""
    from jaxft.planning.plan import plan
    from jaxft.planning.topology import tpu_devices

    target = tpu_devices(given.config.topology)
    return plan(configured(given, lever, rate, steps, 0), target).peak_bytes


def _trained(config: ConfigDict, folder: Path) -> Result:
    """The run in its folder, from where it was cut short; anew where that does not go on (RUN was moved, say)."""
    if folder.exists():
        try:
            return train(config, folder)
        except UserError:
            shutil.rmtree(folder)
    return train(config, folder)


def opened(given: Given, output: Path | None) -> tuple[Transformer, PyTree]:
    """The model as it was, or as a run left it: with an adapter, or tuned as a whole."""
    dtype = dtype_of(given.config)
    if output is None:
        return load(model_folder(given.config.model), dtype=dtype)
    if output.name == "model":
        return load(output, dtype=dtype)
    return open_model(given.config.model, str(output), dtype)


def dtype_of(config: ConfigDict) -> str:
    """In which dtype the levers are asked."""
    plain = load_config("configs/sft.py:lora", {"dtype": config.dtype})
    return str(with_dtypes(plain, jax.devices()[0]).dtype)
