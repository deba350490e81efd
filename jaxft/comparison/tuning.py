"""Makes the tuning runs of a lever, several in one program where the lever allows it, and collects their figures."""

from __future__ import annotations

import functools
import json
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

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
from jaxft.training.loop import train
from jaxft.training.members import ENDED, MEMBERS
from jaxft.training.memory import NoRoom
from jaxft.training.population import population
from jaxft.training.precision import with_dtypes
from jaxft.tree import PyTree

Made = TypeVar("Made")
WARM = 2  # updates at a run's start whose speed is not that of the others
COMMON: Mapping[str, Any] = {
    "samples.count": 0,
    "checkpoint.every": 0,
    "eval_every": 0,
    "log_every": 1,
}


def configured(
    given: Given,
    lever: Lever,
    rate: float,
    steps: int,
    seed: int,
    members: Sequence[Mapping[str, Any]] = (),
) -> ConfigDict:
    """The configuration of a lever's run, or of `members` that train together.

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
        "population": tuple(members),
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


class Wanted(NamedTuple):
    """A tuning run that is to be made.

    Attributes:
        rate: of learning.
        seed: beside `config.seed`.
    """

    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Its name among the lever's runs of that many updates."""
        return f"rate{self.rate:g}-seed{self.seed}"


def tune(
    given: Given, lever: Lever, wanted: Sequence[Wanted], steps: int, *, keep: bool
) -> list[dict[str, Any]]:
    """Tunes, all of them together where the lever's runs can, and tells what is known of each.

    Args:
        given: what every lever gets.
        lever: a row that has a recipe.
        wanted: the runs.
        steps: updates of each.
        keep: whether what was tuned stays in RUN/runs.

    Returns:
        Of each run: value, on the tuning rows, None where it failed, and then why; its folder and what it left there,
        parameters, bytes of what it left, memory of an update, tokens, tokens a second, seconds of an update, and
        seconds of it all. Of runs that train together, memory and seconds are their share: about what one takes alone.
    """
    if not lever.together:
        return [_alone(given, lever, one, steps, keep=keep) for one in wanted]
    try:
        return _together(given, lever, wanted, steps, keep=keep)
    except NoRoom:  # of several
        half = len(wanted) // 2
        parts = (wanted[:half], wanted[half:])
        return [made for part in parts for made in tune(given, lever, part, steps, keep=keep)]


def _alone(given: Given, lever: Lever, one: Wanted, steps: int, *, keep: bool) -> dict[str, Any]:
    """One run."""
    folder = given.folder / "runs" / f"{lever.name}-steps{steps}-{one.name}"
    config, began = configured(given, lever, one.rate, steps, one.seed), time.perf_counter()
    try:
        result = _gone_on(lambda: train(config, folder), folder)
    except UserError as error:
        if not (folder / "metrics.jsonl").exists():  # it never began: the data or a setting
            raise
        shutil.rmtree(folder, ignore_errors=True)
        return {"value": None, "why": str(error)}
    seconds = time.perf_counter() - began
    made = _told(given, lever, folder, (result.trained, result.peak), seconds, 1)
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
    return made


def _together(
    given: Given, lever: Lever, wanted: Sequence[Wanted], steps: int, *, keep: bool
) -> list[dict[str, Any]]:
    """Several runs as a population: one program, one base in memory."""
    runs = f"{lever.name}-steps{steps}-{'+'.join(one.name for one in wanted)}"
    folder, began = given.folder / "runs" / runs, time.perf_counter()
    seed = given.config.seed
    own = [
        {"name": one.name, "optimizer.learning_rate": one.rate, "seed": seed + one.seed}
        for one in wanted
    ]
    config = configured(given, lever, wanted[0].rate, steps, wanted[0].seed, own)

    def make() -> tuple[int, int]:
        with population(config, folder) as members:
            members.advance(steps)
            if keep:
                members.finish()
            else:
                members.keep(members.names[1:])  # one adapter is written: it tells its bytes
            return members.trained, members.peak_of_one

    try:
        cost = _gone_on(make, folder)
    except UserError as error:
        began_at_all = folder.exists()
        shutil.rmtree(folder, ignore_errors=True)
        if not began_at_all or (isinstance(error, NoRoom) and len(wanted) > 1):
            raise
        return [{"value": None, "why": str(error)} for _ in wanted]
    seconds, count = time.perf_counter() - began, len(wanted)
    each = [folder / MEMBERS / one.name for one in wanted]
    made = [_told(given, lever, member, cost, seconds, count) for member in each]
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
    return made


def _gone_on(make: Callable[[], Made], folder: Path) -> Made:
    """Calls `make`, which continues the runs in the folder; if it cannot (RUN was moved, say), they begin anew."""
    if folder.exists():
        try:
            return make()
        except NoRoom:
            raise
        except UserError:
            shutil.rmtree(folder)
    return make()


def _told(
    given: Given, lever: Lever, folder: Path, cost: tuple[int, int], seconds: float, count: int
) -> dict[str, Any]:
    """What is known of a run that has ended; of one of several, its share.

    Args:
        given: as of `tune`.
        lever: the row.
        folder: of the run.
        cost: its trained parameters, and bytes of an update.
        seconds: that all of them took.
        count: how many trained together.
    """
    best = objective_for(lever).best
    lines = read_metrics(folder / "metrics.jsonl")
    train, measured = (
        [one for one in lines if one["split"] == split] for split in ("train", "eval")
    )
    value, error = measured[-1].get(best.name) if measured else None, _why(folder)
    if error or value is None:
        return {"value": None, "why": error or f"its held-out {best.name} is no number"}
    tuned = [
        file for name in ("adapter", "model") for file in (folder / name).glob("*.safetensors")
    ]
    updates = [line["tokens"] / line["tokens_per_second"] for line in train]
    step = statistics.median(updates[WARM:] or updates)
    rates = [line["tokens_per_second"] for line in train]
    return {
        "value": value,
        "run": str(folder.relative_to(given.folder)),
        "parameters": cost[0],
        "memory": cost[1],
        "bytes": sum(file.stat().st_size for file in tuned),
        "output": str(tuned[0].parent.relative_to(given.folder)) if tuned else "",
        "tokens": int(sum(line["tokens"] for line in train)),
        "tokens_per_second": round(statistics.median(rates[WARM:] or rates) * count, 1),
        "step_seconds": step / count,
        "tuning_seconds": round(seconds - sum(updates) * (1 - 1 / count), 3),
    }


def _why(folder: Path) -> str:
    """Why a member of a population ended before the others; "" where it did not."""
    file = folder / ENDED
    return str(json.loads(file.read_text()).get("error", "")) if file.exists() else ""


def planned_bytes(given: Given, lever: Lever, rate: float, steps: int) -> int:
    """What an update needs on a device of `config.topology`, by `jaxft plan`."""
    from jaxft.planning.plan import plan
    from jaxft.planning.topology import tpu_devices

    target = tpu_devices(given.config.topology)
    return plan(configured(given, lever, rate, steps, 0), target).peak_bytes


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
