"""The table of runs: what each is, what it cost, and how good it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxft.runs.report.reading import Run
from jaxft.runs.report.words import NONE, duration, figure, many, size


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        shown: its text.
        order: the number by which it is sorted; None: by its text, or last where other cells have numbers.
        note: what stands under it.
    """

    shown: str
    order: float | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: its head.
        numeric: whether it is sorted by numbers.
        note: what stands under its head.
    """

    name: str
    numeric: bool = True
    note: str = ""


def number(value: float | None, shown: str) -> Cell:
    """A cell with a number."""
    return Cell(shown if value is not None else NONE, value)


def table_of(runs: Sequence[Run], labels: Sequence[str]) -> tuple[list[Column], list[list[Cell]]]:
    """The columns, and a row of cells for each run."""
    scores = list(dict.fromkeys(name for run in runs for name in _scored(run)))
    columns = [
        Column("run", False),
        Column("method", False),
        Column("signal", False),
        *(
            Column(f"held-out {name.replace('_', ' ')}", note=_better(runs, name))
            for name in scores
        ),
        Column("trained parameters"),
        Column("bytes it left"),
        Column("memory of a step", note="on a device"),
        Column("tokens a second"),
        Column("time of its updates"),
        Column("updates"),
    ]
    rows = []
    for run, label in zip(runs, labels, strict=True):
        values = [run.held_out(name) if name in _scored(run) else None for name in scores]
        left = run.artefact[1] if run.artefact else None
        trained, memory = run.fact("trained_parameters"), run.fact("peak_bytes")
        rows.append(
            [
                Cell(label, note=run.state),
                Cell(method_of(run)),
                Cell(run.objective.name),
                *(number(value, figure(value)) for value in values),
                number(trained, many(trained)),
                number(left, size(left)),
                number(memory, size(memory)),
                number(run.tokens_per_second, many(run.tokens_per_second)),
                number(run.seconds, duration(run.seconds)),
                number(run.steps, f"{run.steps:,}"),
            ]
        )
    return columns, rows


def method_of(run: Run) -> str:
    """The method, and the codes of its base."""
    scheme = run.config.base.quantize
    return run.config.method.name + (f" over {scheme}" if scheme != "none" else "")


def _scored(run: Run) -> list[str]:
    return list(dict.fromkeys((run.best.name, *run.config.eval_metrics)))


def _better(runs: Sequence[Run], name: str) -> str:
    found = {metric.better for run in runs for metric in run.metrics if metric.name == name}
    better = next(iter(found)) if len(found) == 1 else ""
    return f"{better} is better" if better else ""


def differing(values: dict[str, list[Any]]) -> list[tuple[str, list[str]]]:
    """(key, its value in each run) of keys that differ, as texts."""
    return [(key, [shown_value(one) for one in each]) for key, each in sorted(values.items())]


def shown_value(value: Any) -> str:
    """A value of the configuration: as the command line takes it."""
    if value is None:
        return NONE
    if isinstance(value, str):
        return value or '""'
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value)) or "()"
    return str(value)
