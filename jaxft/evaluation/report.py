"""What is said of figures: lines for people, an object for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxft.errors import counted
from jaxft.evaluation.confidence import Difference, Figure

Figures = Mapping[str, Figure]


def table_lines(systems: Mapping[str, Figures]) -> list[str]:
    r"""A line for each system and metric.

    >>> print(*table_lines({"base": {"exact": Figure(0.5, 0.25, 0.75, 20, 20)}}), sep="\n")
    system  metric     value  95 % interval     items
    base    exact     0.5000  0.2500 to 0.7500  20
    """
    rows = [("system", "metric", "value", "95 % interval", "items")]
    for system, figures in systems.items():
        for name, found in figures.items():
            rows.append((system, name, shown(found.value), _interval(found), _items(found)))
    first, second, third = (max(len(row[column]) for row in rows) for column in (0, 1, 3))
    return [
        f"{row[0]:{first}}  {row[1]:{second}}  {row[2]:>9}  {row[3]:{third}}  {row[4]}"
        for row in rows
    ]


def comparison_lines(first: str, second: str, differences: Mapping[str, Difference]) -> list[str]:
    """A line for each metric: how the second system differs from the first, and whether that is more than chance.

    >>> found = Difference(0.1, -0.1, 0.3, 20, 20, "cannot tell", 60)
    >>> print(*comparison_lines("base", "tuned", {"exact": found}))
    tuned beside base: exact +0.1000 (-0.1000 to +0.3000), 20 items: cannot tell: about 60 more items would
    """
    return [
        f"{second} beside {first}: {name} {_change(found)}: {_verdict(found)}"
        for name, found in differences.items()
    ]


def _verdict(found: Difference) -> str:
    if found.verdict != "cannot tell":
        return found.verdict
    if found.more is None:
        return (
            "cannot tell: no difference is seen"
            if found.n
            else "cannot tell: no item is scored in both"
        )
    return f"cannot tell: about {counted(found.more, 'more item')} would"


def _change(found: Difference) -> str:
    if found.value is None:
        return "unknown"
    interval = ""
    if found.low is not None and found.high is not None:
        interval = f" ({_signed(found.low)} to {_signed(found.high)})"
    return f"{_signed(found.value)}{interval}, {counted(found.n, 'item')}"


def _interval(found: Figure) -> str:
    if found.low is None or found.high is None:
        return "unknown"
    return f"{shown(found.low)} to {shown(found.high)}"


def _items(found: Figure) -> str:
    if found.clusters == found.n:
        return f"{found.n:,}"
    return f"{found.n:,} in {counted(found.clusters, 'cluster')}"


def shown(value: float | None) -> str:
    """A figure with four digits behind the point; of a large one, fewer.

    >>> shown(0.51234), shown(61.234), shown(None)
    ('0.5123', '61.23', 'none')
    """
    if value is None:
        return "none"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def _signed(value: float) -> str:
    return ("+" if value >= 0 else "-") + shown(abs(value))


def as_object(systems: Mapping[str, Figures]) -> dict[str, Any]:
    """{"metrics": {name: {"value", "low", "high", "n", "clusters"}}} of the first system, and beside it those of all
    systems by name where they are several.
    """
    each = {
        system: {"metrics": {name: dataclasses.asdict(found) for name, found in figures.items()}}
        for system, figures in systems.items()
    }
    first = next(iter(each.values()))
    return first if len(each) == 1 else {**first, "systems": each}
