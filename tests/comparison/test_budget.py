"""The plan keeps to the budget: fewer updates for all, then fewer levers."""

from __future__ import annotations

import math
import signal
import time

import pytest
from ml_collections import ConfigDict

from jaxft.comparison.budget import (
    Clock,
    LeftOut,
    Speed,
    lever_seconds,
    meanwhile,
    planned,
    runs_seconds,
)
from jaxft.comparison.levers import LEVERS

CONFIG = ConfigDict(
    {"seeds": 3, "search": {"rates": 4, "factor": 3.0, "widen": 4, "parts": (0.25, 0.5)}}
)
TUNED = [LEVERS[name] for name in ("lora", "vera", "full")]
SPEED = Speed(step=0.5, start=3.0, compiled=2.0, test=10.0)


def whole(steps: int, levers: list = TUNED) -> float:
    return sum(lever_seconds(lever, steps, SPEED, CONFIG) for lever in levers)


def test_all_that_is_wanted_is_planned_where_there_is_room() -> None:
    assert planned(TUNED, 100, SPEED, CONFIG, 2 * whole(100)) == (100, {})
    assert planned(TUNED, 100, SPEED, CONFIG, math.inf) == (100, {})


def test_all_levers_get_fewer_updates_alike() -> None:
    left = whole(50)
    steps, out = planned(TUNED, 1000, SPEED, CONFIG, left)
    assert 30 < steps < 50
    assert not out
    assert whole(steps) < left


def test_the_least_simple_levers_are_left_out_where_there_is_no_room() -> None:
    steps, out = planned(TUNED, 1000, SPEED, CONFIG, whole(10, TUNED[:1]) / 0.85 + 1)
    assert list(out) == ["full", "vera"]
    assert steps >= 10
    assert "no room" in out["full"]
    assert list(planned(TUNED, 1000, SPEED, CONFIG, 1.0)[1]) == ["full", "vera", "lora"]


def test_a_clock_counts_what_earlier_starts_took() -> None:
    clock = Clock(100.0, 95.0)
    assert clock.has_room(5.0)
    assert not clock.has_room(50.0)
    assert Clock(None, 1e9).has_room(1e9)


def test_what_is_kept_for_later_is_not_spent_now() -> None:
    """Levers that tune nothing leave room for one that tunes."""
    clock = Clock(100.0, 0.0)
    clock.kept = 60.0
    assert clock.has_room(40.0)
    assert not clock.has_room(60.0)
    clock.kept = 0.0
    assert clock.has_room(60.0)


def test_a_clock_counts_what_came_before_it_was_made() -> None:
    assert Clock(100.0, 0.0, time.perf_counter() - 30.0).left < 70.0


def test_what_goes_on_after_the_budgets_end_is_broken_off() -> None:
    """Wherever it is by then: a tenth of the budget is never exceeded by what was thought to be short."""
    clock = Clock(0.2, 0.0)
    with pytest.raises(LeftOut, match="no room"), clock.limit():
        time.sleep(5.0)
    assert 0.2 < clock.spent < 1.0
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_without_a_budget_nothing_is_broken_off() -> None:
    with Clock(None, 1e9).limit():
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_what_is_due_meanwhile_is_called_once_and_interrupts_nothing() -> None:
    """Not if all is over before."""
    called = list[str]()
    began = time.perf_counter()
    with (
        meanwhile(0.02, lambda: called.append("due")),
        meanwhile(60.0, lambda: called.append("later")),
        meanwhile(None, lambda: called.append("never")),
    ):
        time.sleep(0.3)
    assert time.perf_counter() - began >= 0.3
    assert called == ["due"]


def test_runs_that_train_together_begin_once() -> None:
    """Three of lora read and write once; three of full tuning thrice."""
    lora, full = (LEVERS[name] for name in ("lora", "full"))
    assert runs_seconds(lora, 10, 3, SPEED) == 3.0 + 3 * 10 * 0.5
    assert runs_seconds(full, 10, 3, SPEED) == pytest.approx(3 * 3.0 + 3 * 10 * 0.5 * full.work)
