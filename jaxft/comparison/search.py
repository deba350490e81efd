"""The search for a lever's learning rate: successive halving over a grid that widens where the best is at its edge."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict


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
    middle: float, settings: ConfigDict, run: Callable[[float, float], float | None], *, lower: bool
) -> tuple[float | None, list[Tried]]:
    """The best rate, and all that were tried (successive halving: Jamieson and Talwalkar, arXiv 1502.07943).

    All rates of the grid get the first part of a run, the better half of them the next part, and so on. While the best
    of a part is at the edge of all rates that there are, the next rate beyond it is tried at that part too: so the
    chosen rate has a worse one on either side, unless `widen` rates were added before.

    Args:
        middle: the rate around which the grid lies.
        settings: `config.search`.
        run: (rate, part) -> what it came to; None where it failed.
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

    def take(place: int, part: float) -> None:
        rate = rate_at(middle, place, settings.factor)
        known[place, part] = Tried(rate, part, run(rate, part))

    alive: Sequence[int] = places
    for part in settings.parts:
        for place in alive:
            take(place, part)
        ranked = sorted(alive, key=lambda place: worth(place, part))
        while added < settings.widen and ranked[0] in (min(places), max(places)):
            beyond = min(places) - 1 if ranked[0] == min(places) else max(places) + 1
            if worth(ranked[0], part) == math.inf:
                beyond = min(places) - 1  # all failed: smaller ones may not
            added += 1
            places.append(beyond)
            take(beyond, part)
            ranked = sorted([*ranked, beyond], key=lambda place: worth(place, part))
        alive = sorted(ranked[: max(len(alive) // 2, 1)])
    best = ranked[0]
    failed = worth(best, settings.parts[-1]) == math.inf
    return (None if failed else rate_at(middle, best, settings.factor)), list(known.values())


def runs_of(settings: ConfigDict) -> list[tuple[float, float]]:
    """(part, how many runs of it) that a search takes, with half of the rates that may be added: a guess.

    >>> runs_of(ConfigDict({"rates": 4, "widen": 4, "parts": (0.25, 0.5)}))
    [(0.25, 6.0), (0.5, 2.0)]
    """
    alive, found = settings.rates, []
    for place, part in enumerate(settings.parts):
        found.append((part, alive + (settings.widen / 2 if not place else 0.0)))
        alive = max(alive // 2, 1)
    return found


def as_told(tried: Sequence[Tried], name: str) -> list[dict[str, Any]]:
    """What was tried, as RUN/comparison.json has it."""
    return [
        {"setting": {"rate": one.rate}, "value": one.value, "name": name, "part": one.part}
        for one in tried
    ]
