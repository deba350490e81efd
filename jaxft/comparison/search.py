"""The search for a lever's learning rate: successive halving over a grid that widens where the best is at its edge."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

ADDED = 2  # rates at a time, where the grid widens
# (rates, part of a whole run) -> what each came to on the tuning rows; None where it failed
Heat = Callable[[Sequence[float], float], Sequence[float | None]]


class Tried(NamedTuple):
    """A rate that was tried.

    Attributes:
        rate: of learning.
        part: of a whole run that it got.
        value: what it came to on the tuning rows; None where it failed.
    """

    rate: float
    part: float
    value: float | None


def rate_at(middle: float, place: int, factor: float) -> float:
    """The rate so many steps of the grid above the middle one, to two digits.

    >>> rate_at(3e-4, 0, 3.0), rate_at(3e-4, 1, 3.0), rate_at(3e-4, -1, 3.0)
    (0.0003, 0.0009, 0.0001)
    """
    return float(f"{middle * factor**place:.2g}")


def search(
    middle: float, settings: ConfigDict, heat: Heat, *, lower: bool
) -> tuple[float | None, list[Tried]]:
    """The best rate, and all that were tried (successive halving: Jamieson and Talwalkar, arXiv 1502.07943).

    All rates of the grid get the first part of a run, the better half of them the next part, and so on. Each part is a
    run of its own, whose rate falls to its end, so that parts of any lever mean the same. While the best of a part is
    at the edge of all rates that there are, the next `ADDED` rates beyond it are tried at that part too: so the chosen
    rate has a worse one on either side, unless `widen` rates were added before.

    Args:
        middle: the rate around which the grid lies.
        settings: `config.search`.
        heat: tries several rates.
        lower: whether less is better.

    Returns:
        The rate; None where every run failed.
    """
    first = -((settings.rates - 1) // 2)
    places = list(range(first, first + settings.rates))
    known: dict[tuple[int, float], Tried] = {}
    added = 0

    def worth(place: int, part: float) -> float:
        value = known[place, part].value
        if value is None or math.isnan(value):
            return math.inf
        return value if lower else -value

    def ranked(some: Sequence[int], part: float) -> list[int]:
        """Those that are new are tried; the best first."""
        new = [place for place in some if (place, part) not in known]
        rates = [rate_at(middle, place, settings.factor) for place in new]
        values = heat(rates, part)
        for place, rate, value in zip(new, rates, values, strict=True):
            known[place, part] = Tried(rate, part, value)
        return sorted(some, key=lambda place: worth(place, part))

    alive: Sequence[int] = places
    for part in settings.parts:
        order, half = ranked(alive, part), max(len(alive) // 2, 1)
        while added < settings.widen and order[0] in (min(places), max(places)):
            failed = worth(order[0], part) == math.inf  # all of them: smaller ones may not
            down = failed or order[0] == min(places)
            steps = range(1, min(ADDED, settings.widen - added) + 1)
            beyond = [min(places) - step if down else max(places) + step for step in steps]
            added += len(beyond)
            places += beyond
            order = ranked([*order, *beyond], part)
        alive = sorted(order[:half])
    best = order[0]
    failed = worth(best, settings.parts[-1]) == math.inf
    return (None if failed else rate_at(middle, best, settings.factor)), list(known.values())


def heats_of(settings: ConfigDict) -> list[tuple[float, int]]:
    """(part, how many rates) of each heat of a search, with one that widens the grid: a guess.

    >>> heats_of(ConfigDict({"rates": 4, "widen": 4, "parts": (0.25, 0.5)}))
    [(0.25, 4), (0.25, 2), (0.5, 2)]
    """
    alive, found = settings.rates, []
    for place, part in enumerate(settings.parts):
        found.append((part, alive))
        if not place and settings.widen:
            found.append((part, min(ADDED, settings.widen)))
        alive = max(alive // 2, 1)
    return found


def as_told(tried: Sequence[Tried], name: str) -> list[dict[str, Any]]:
    """What was tried, as RUN/comparison.json has it."""
    return [
        {"setting": {"rate": one.rate}, "value": one.value, "name": name, "part": one.part}
        for one in tried
    ]
