"""Costs against a quality: a plot for each cost, and the table behind it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from markupsafe import Markup

from jaxft.runs.report.plots import Spot, cost_plot
from jaxft.runs.report.words import interval

Shown = Callable[[float | None], str]


@dataclasses.dataclass(frozen=True)
class Judged:
    """One of those that are compared.

    Attributes:
        label: its name.
        number: its mark.
        value: its quality.
        low: end of its interval; None for none.
        high: the other end.
    """

    label: str
    number: int
    value: float | None
    low: float | None = None
    high: float | None = None


@dataclasses.dataclass(frozen=True)
class Cost:
    """A cost of each of them.

    Attributes:
        name: of the cost.
        values: in the order of those that are compared; None for one that is not known.
        shown: a cost in words.
    """

    name: str
    values: Sequence[float | None]
    shown: Shown


@dataclasses.dataclass(frozen=True)
class CostPlot:
    """A plot, and (label, cost, quality) of each point in words."""

    title: str
    picture: Markup
    rows: Sequence[tuple[str, str, str]]


@dataclasses.dataclass(frozen=True)
class Costs:
    """The plots of one quality.

    Attributes:
        id: begins the ids.
        quality: its name.
        plots: one a cost.
    """

    id: str
    quality: str
    plots: Sequence[CostPlot]


def costs_of(
    id: str, quality: str, better: str, judged: Sequence[Judged], costs: Sequence[Cost]
) -> Costs | None:
    """The plots of costs that at least two have and that are not the same for all; None where there are none.

    Args:
        id: begins the ids, and is on the page once.
        quality: its name.
        better: "lower", "higher" or "".
        judged: what is compared.
        costs: their costs.
    """
    plots, beside = [], quality + (f", {better} is better" if better else "")
    for at, cost in enumerate(costs):
        pairs = list(zip(judged, cost.values, strict=True))
        known = [(one, x) for one, x in pairs if one.value is not None and x is not None]
        if len({x for _, x in known}) > 1:
            spots = [
                Spot(one.label, float(x), float(one.value or 0.0), one.low, one.high, one.number)
                for one, x in known
            ]
            title = f"{cost.name} against {quality}"
            picture = cost_plot(f"{id}-{at}", title, spots, cost.name, beside, cost.shown)
            rows = [
                (one.label, cost.shown(x), interval(one.value, one.low, one.high))
                for one, x in known
            ]
            plots.append(CostPlot(cost.name, picture, rows))
    return Costs(id, quality, plots) if plots else None
