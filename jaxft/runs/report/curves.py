"""The curves of runs: which numbers are plotted, together with which, and the table behind each plot."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from jaxft.objectives.objective import Metric
from jaxft.runs.report.plots import Series, lines_plot, thinned
from jaxft.runs.report.reading import Run
from jaxft.runs.report.words import figure

OF_A_RUN = (Metric("learning_rate", "", ""), Metric("grad_norm", "", ""))
TRAINING = "training"
DRAWN = 14  # lines of a plot, at most


@dataclasses.dataclass(frozen=True)
class Plot:
    """A plot and what stands beside it.

    Attributes:
        title: what is plotted.
        picture: its SVG.
        notes: what to know when reading it.
        columns, rows: the table of the points: updates first.
        first: whether it is shown at once, and not behind "more".
    """

    title: str
    picture: Markup
    notes: Sequence[str]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    first: bool


def curves_of(
    runs: Sequence[Run], labels: Sequence[str], name: str, numbers: Sequence[int]
) -> list[Plot]:
    """The plots of runs of one objective; those of its loss, its best and of what was asked for come first.

    Of a single run, training and held-out numbers share a plot.

    Args:
        runs: they report the same metrics.
        labels: their names on the page.
        name: begins the ids.
        numbers: their marks on the page.
    """
    asked = [metric for run in runs for metric in run.metrics]
    metrics = list({metric.name: metric for metric in [*asked, *OF_A_RUN]}.values())
    chosen = {runs[0].objective.metrics[0].name, runs[0].best.name}
    chosen |= {name for run in runs for name in run.config.eval_metrics}
    found = []
    for number, metric in enumerate(metrics):
        for at, (title, series, notes) in enumerate(_panels(runs, labels, metric, numbers)):
            found.append(
                _plot(f"{name}-{number}-{at}", title, series, metric, notes, metric.name in chosen)
            )
    return sorted(found, key=lambda plot: not plot.first)


def _panels(
    runs: Sequence[Run], labels: Sequence[str], metric: Metric, numbers: Sequence[int]
) -> list[tuple[str, list[Series], list[str]]]:
    """(title, lines, notes) of the plots of a metric."""
    sets = list(dict.fromkeys(name for run in runs for name in run.sets))
    held_out, notes = {}, []
    for one in sets:
        where = f"held out: {one}" if one else "held out"
        each = [thinned(_points(run.split("eval", one), metric.name)) for run in runs]
        held_out[where] = [points for points, _ in each]
    thin = [thinned(_points(run.split("train"), metric.name)) for run in runs]
    training, most = [points for points, _ in thin], max(mean for _, mean in thin)
    if most > 1:
        notes = [
            f"A point in training is the mean of up to {most:,} updates of those that were written."
        ]
    name = metric.name.replace("_", " ")
    if len(runs) == 1:
        lines = [
            (TRAINING, training[0]),
            *((where, points[0]) for where, points in held_out.items()),
        ]
        series = [Series(label, p, i, label != TRAINING) for i, (label, p) in enumerate(lines) if p]
        return [(name, series, notes)] if series else []
    panels: list[tuple[str, list[Any], bool, list[str]]] = [
        (f"{name}, {where}", points, True, []) for where, points in held_out.items()
    ]
    panels.append((f"{name}, in training", training, False, notes))
    found = [
        (title, _series(labels, points, dots, numbers), said)
        for title, points, dots, said in panels
    ]
    return [(title, series, [*said, *_left_out(series)]) for title, series, said in found if series]


def _series(
    labels: Sequence[str], points: Sequence[Any], dots: bool, numbers: Sequence[int]
) -> list[Series]:
    each = zip(labels, points, numbers, strict=True)
    return [Series(label, found, number, dots) for label, found, number in each if found]


def _left_out(series: Sequence[Series]) -> list[str]:
    if len(series) <= DRAWN:
        return []
    return [f"Drawn are the first {DRAWN} of {len(series):,} runs; the table has them all."]


def _points(lines: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    found = [(float(one["step"]), one.get(name)) for one in lines]
    return sorted(
        (x, float(y)) for x, y in found if isinstance(y, int | float) and math.isfinite(y)
    )


def _plot(
    name: str,
    title: str,
    series: Sequence[Series],
    metric: Metric,
    notes: Sequence[str],
    first: bool,
) -> Plot:
    unit = f"per {metric.per}" if metric.per and metric.name == "loss" else ""
    better = {"lower": "lower is better", "higher": "higher is better", "": ""}[metric.better]
    unit = ", ".join(filter(None, (unit, better)))
    drawn = [dict(one.points) for one in series]
    places = sorted({x for points in drawn for x in points})
    rows = [
        [f"{x:,.0f}", *(figure(points[x]) if x in points else "" for points in drawn)]
        for x in places
    ]
    picture = lines_plot(name, title, series[:DRAWN], unit)
    return Plot(title, picture, notes, ["updates", *(one.label for one in series)], rows, first)
