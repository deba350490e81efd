"""A run that exists gets more updates: `steps` or `epochs` alone are others than in its folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxft.configuration import difference, to_json
from jaxft.errors import UserError, counted, worded
from jaxft.objectives.reading import updates_of
from jaxft.runs.best import is_exhausted
from jaxft.runs.folder import LENGTH, config_in, written
from jaxft.runtime import processes, storage

HISTORY = "history.json"
Rates = Callable[[ConfigDict, int], Callable[[int], Any]]


@dataclasses.dataclass(frozen=True)
class Past:
    """What a folder says of its run, read by every process before the first of them writes.

    Attributes:
        config: the configuration so far; None for a new run.
        changes: of RUN/history.json: {"step", "changed", "config"} each time that the run's length changed, with
            the step from which it went on, the keys that changed, and the whole configuration before.
    """

    config: ConfigDict | None
    changes: tuple[dict[str, Any], ...]


def past_of(workdir: Path) -> Past:
    """What stands in the folder. A change that was told but not made, because the process was killed, is left out."""
    config = config_in(workdir)
    if config is None:
        return Past(None, ())
    changes = _read(workdir / HISTORY)
    if changes and changes[-1]["config"] == json.loads(to_json(config)):
        changes = changes[:-1]
    return Past(config, changes)


def _read(file: Path) -> tuple[dict[str, Any], ...]:
    if not file.exists():
        return ()
    try:
        changes = json.loads(file.read_text())
        for change in changes:
            int(change["step"]), change["changed"], change["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file}: not what jaxft wrote of the run's earlier configurations; remove it, and they are forgotten"
        ) from error
    return tuple(changes)


def extend(
    config: ConfigDict,
    past: Past,
    workdir: Path,
    step: int,
    steps_per_epoch: int,
    rates: Rates,
    say: Callable[[str], None],
) -> list[int]:
    """Takes up another length of the run, if it is given one: says it, and writes config.json and history.json.

    Args:
        config: of this call.
        past: what the folder says.
        workdir: RUN.
        step: updates made, which the run goes on from.
        steps_per_epoch: updates of a pass over the data.
        rates: (`config.optimizer`, updates) -> the learning rate of each update.
        say: takes a line.

    Returns:
        The steps at which the run's length has ever changed, in order.

    Raises:
        UserError: fewer updates than are made, or epochs that count for nothing.
    """
    at = [int(change["step"]) for change in past.changes]
    if past.config is None:
        return at
    changed = [line for line in difference(past.config, config) if line.startswith(LENGTH)]
    if not changed:
        return at
    keys = "; ".join(f"config.{line}" for line in changed)
    before, after = (updates_of(each, steps_per_epoch) for each in (past.config, config))
    if config.steps and config.steps == past.config.steps:
        raise UserError(
            f"{workdir}: {keys} counts for nothing where config.steps is {config.steps}: give more steps, or "
            "config.steps=0 with the epochs"
        )
    if after < step:
        raise UserError(
            f"{workdir}: {keys} makes {counted(after, 'update')}, and this run has made {step}: give more of them, or "
            "take another folder"
        )
    for line in _lines(config, past.config, (before, after), step, keys, rates):
        say(line)
    if processes.first():
        change = {"step": step, "changed": changed, "config": json.loads(to_json(past.config))}
        text = json.dumps([*past.changes, change], indent=2, ensure_ascii=False) + "\n"
        with written(workdir):
            storage.write_text(workdir / HISTORY, text)
            storage.write_text(workdir / "config.json", to_json(config))
    return [*at, step]


def _lines(
    config: ConfigDict,
    old: ConfigDict,
    updates: tuple[int, int],
    step: int,
    keys: str,
    rates: Rates,
) -> list[str]:
    """What changes, for the log."""
    (before, after), length = updates, counted(updates[1], "update")
    kept = f"the configuration before is kept in {HISTORY}"
    if before == after:
        return [f"{keys}: {length} as before; {kept}"]
    kind = "extended" if after > before else "shortened"
    made = f"of which {step} {worded(step, 'is', 'are')} made"
    lines = [f"{kind}: {keys}: {length} instead of {before}, {made}; {kept}"]
    if 0 < step < after:
        was = float(rates(old.optimizer, before)(step - 1))
        goes = float(rates(config.optimizer, after)(step))
        lines.append(
            f"the schedule ({config.optimizer.schedule}) is computed anew over {length}: the learning rate was "
            f"{was:.3g} and goes on at {goes:.3g}"
        )
    return lines


def patience_since(
    changes: Sequence[int],
    values: Mapping[int, float],
    patience: int,
    say: Callable[[str], None],
    better: str = "lower",
) -> int:
    """The step from which evaluations count for `config.patience`: a run that it had stopped is given it anew.

    Args:
        changes: the steps at which the run's length changed.
        values: the best metric at each evaluation, by its step.
        patience: `config.patience`.
        say: takes a line.
        better: which way the metric gets better.
    """
    since = 0
    for step in changes:
        known = {at: value for at, value in values.items() if at <= step}
        since = step if is_exhausted(known, patience, since, better) else since
    if since:
        last = f"{counted(patience, 'evaluation')} {worded(patience, 'counts', 'count')}"
        say(f"patience had stopped this run: its {last} anew from step {since}")
    return since
