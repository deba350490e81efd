"""How large a comparison may be: updates of a whole run, and levers, within the budget."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxft.comparison.levers import Lever
from jaxft.comparison.search import heats_of

ROOM = 0.85  # of the budget that is planned for: the rest is for what takes longer than it was thought to
FEWEST_STEPS = 10  # of a whole run: of fewer nothing is learned that a test would see
GRACE = 0.05  # of the budget, by which the last piece may be late by what is thought of it
LATE = 0.06  # of the budget, after which it is broken off
AGAIN = 5.0  # seconds after which it is told once more, should somebody not have listened
NO_ROOM = "the budget has no room for it any more"


class LeftOut(Exception):
    """A lever is not measured; the message says why."""


class Speed(NamedTuple):
    """What was measured before the plan.

    Attributes:
        step: seconds of an update of one run of lora, its program compiled.
        start: seconds of a run, or of some that train together, beside its updates and its program: reading, measuring,
            writing.
        compiled: seconds of making a program, which runs of another number have anew.
        test: seconds of one measurement on the test rows.
    """

    step: float
    start: float
    compiled: float
    test: float


class Clock:
    """The time of a comparison, over all of its starts.

    Args:
        budget: seconds; None for any.
        before: seconds that earlier starts took.
        began: `time.perf_counter()` at this start; None: now.

    Attributes:
        kept: seconds of the budget that are for later, and not for what is done now.
    """

    def __init__(self, budget: float | None, before: float, began: float | None = None) -> None:
        self.budget, self.before, self.kept = budget, before, 0.0
        self.began = time.perf_counter() if began is None else began

    @property
    def spent(self) -> float:
        """Seconds until now."""
        return self.before + time.perf_counter() - self.began

    @property
    def left(self) -> float:
        """Seconds that the budget still has for what is done now; infinite without one."""
        return math.inf if self.budget is None else self.budget - self.kept - self.spent

    def has_room(self, seconds: float) -> bool:
        """Whether a piece of so many seconds still fits."""
        return self.budget is None or seconds <= self.left + GRACE * self.budget

    def admit(self, seconds: float) -> None:
        """Raises LeftOut where a piece of so many seconds does not fit."""
        if not self.has_room(seconds):
            raise LeftOut(NO_ROOM)

    @contextlib.contextmanager
    def limit(self) -> Iterator[None]:
        """Raises LeftOut in the midst of what stands in it, where that goes on for too long after the budget's end.

        It comes by a signal (SIGALRM), which a process's main thread alone can wait for: in another one, never.
        """
        if self.budget is None or threading.current_thread() is not threading.main_thread():
            yield
            return

        def late(*_: Any) -> None:
            raise LeftOut(NO_ROOM)

        before = signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, max(self.left + LATE * self.budget, 1e-3), AGAIN)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def meanwhile(seconds: float | None, call: Callable[[], None]) -> Iterator[None]:
    """Calls it after so many seconds, if what stands in it takes as long, and does not interrupt that; None: never.

    It is called in a thread of its own: a compilation of minutes holds back a signal, but no thread.
    """
    if seconds is None:
        yield
        return
    timer = threading.Timer(seconds, call)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def runs_seconds(lever: Lever, steps: int, count: int, speed: Speed) -> float:
    """What so many tuning runs take, of so many updates each, and with programs that are compiled."""
    starts = 1 if lever.together else count
    return starts * speed.start + count * steps * speed.step * lever.work


def lever_seconds(lever: Lever, steps: int, speed: Speed, config: ConfigDict) -> float:
    """What a lever takes in all: its search, its measured runs, and their tests."""
    heats = [*heats_of(config.search), (1.0, config.seeds)]
    programs = len({count for _, count in heats}) if lever.together else 1
    tuned = sum(runs_seconds(lever, round(part * steps), count, speed) for part, count in heats)
    tested = config.seeds * speed.test + speed.compiled  # answers have programs of their own
    return tuned + programs * speed.compiled + tested


def planned(
    levers: Sequence[Lever], wanted: int, speed: Speed, config: ConfigDict, left: float
) -> tuple[int, Mapping[str, str]]:
    """The updates of a whole run, the same for all levers, and the levers that the budget has no room for.

    As many updates as are wanted, or else as many as fit; where fewer than `FEWEST_STEPS` would, the least simple lever
    is left out, and so on.

    Args:
        levers: those that tune, the simplest first.
        wanted: updates.
        speed: as measured.
        config: of the comparison.
        left: seconds of the budget.
    """
    kept, out = list(levers), dict[str, str]()
    if math.isinf(left):
        return wanted, out
    fewest = min(FEWEST_STEPS, wanted)

    def need(steps: int) -> float:
        return sum(lever_seconds(lever, steps, speed, config) for lever in kept)

    while kept and need(fewest) > ROOM * left:
        lever = kept.pop()
        seconds = lever_seconds(lever, fewest, speed, config)
        out[lever.name] = f"the budget has no room for it: it takes about {seconds:,.0f} s more"
    steps = wanted
    if kept and need(wanted) > ROOM * left:
        fixed = need(0)
        each = (need(wanted) - fixed) / wanted
        steps = max(int((ROOM * left - fixed) / each), fewest)
    return steps, out
