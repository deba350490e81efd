"""The search for a rate: halving, and a grid that widens where the best is at its edge."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from ml_collections import ConfigDict

from jaxft.comparison.search import as_told, rate_at, search

SETTINGS = ConfigDict({"rates": 4, "factor": 3.0, "widen": 4, "parts": (0.25, 0.5)})


def each(value):  # type: ignore[no-untyped-def]
    """A heat in which each rate comes to `value(rate, part)`."""
    return lambda rates, part: [value(rate, part) for rate in rates]


def bowl(best: float):  # type: ignore[no-untyped-def]
    """A loss that is lowest at a rate."""
    return each(lambda rate, part: abs(math.log(rate / best)) + 1 / part)


def test_losers_are_stopped_early() -> None:
    """Four rates get a quarter of a run, the better two of them a half."""
    rate, tried = search(3e-4, SETTINGS, bowl(3e-4), lower=True)
    assert rate == 3e-4
    assert sorted(one.rate for one in tried if one.part == 0.25) == [1e-4, 3e-4, 9e-4, 2.7e-3]
    halves = [one.rate for one in tried if one.part == 0.5]
    assert len(halves) == 2
    assert 3e-4 in halves


@pytest.mark.parametrize("steps", [-3, 3, 4])
def test_a_best_at_the_edge_widens_the_grid(steps: int) -> None:
    """The best rate is found outside of the first grid, and has a worse one on either side."""
    best = rate_at(3e-4, steps, 3.0)
    rate, tried = search(3e-4, SETTINGS, bowl(best), lower=True)
    rates = sorted({one.rate for one in tried})
    assert rate == best
    assert rates[0] < rate < rates[-1]


def test_the_grid_does_not_widen_for_ever() -> None:
    rate, tried = search(3e-4, SETTINGS, each(lambda rate, part: -rate), lower=True)
    assert len({one.rate for one in tried}) == 8
    assert rate == max(one.rate for one in tried)


def test_rates_of_a_part_are_tried_at_once() -> None:
    """They may train together: four, the two beyond the grid's upper edge, then the better half."""
    heats: list[tuple[int, float]] = []

    def heat(rates: Sequence[float], part: float) -> Sequence[float | None]:
        heats.append((len(rates), part))
        return bowl(8.1e-3)(rates, part)

    assert search(3e-4, SETTINGS, heat, lower=True)[0] == 8.1e-3
    assert heats == [(4, 0.25), (2, 0.25), (2, 0.5)]


def test_more_is_better_where_it_is_said() -> None:
    worth = bowl(9e-4)
    rate, _ = search(3e-4, SETTINGS, lambda *given: [-one for one in worth(*given)], lower=False)
    assert rate == 9e-4


def test_failed_runs_lose_and_smaller_rates_are_tried() -> None:
    """Rates that diverge are no candidates; where all of the grid do, lower ones are tried."""
    rate, tried = search(
        3e-4, SETTINGS, each(lambda rate, _: None if rate > 5e-5 else 1.0 + rate), lower=True
    )
    assert rate is not None
    assert rate <= 5e-5
    assert [one["value"] for one in as_told(tried, "loss")].count(None) >= 4
    nothing, _ = search(3e-4, SETTINGS, each(lambda *_: None), lower=True)
    assert nothing is None
