"""SIGTERM (preemption) and Ctrl-C: noted, and obeyed where a checkpoint can be written."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from jaxft.runtime.processes import several


class Interrupted(Exception):
    """The run was asked to stop, and has come to where it can."""


class Stop:
    """Whether a signal has asked the run to stop.

    Attributes:
        signal: the first signal, or None.
        deferred: whether signals wait for `check`, as they do once there is something to save. Before that they
            end the run at once.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.deferred = False

    def __call__(self, number: int, _: Any) -> None:
        """The signals' handler. A second Ctrl-C does not wait."""
        again, self.signal = self.signal is not None, self.signal or number
        if not self.deferred or (again and number == signal.SIGINT):
            raise ending(number)

    def check(self) -> None:
        """Raises Interrupted where a signal came."""
        if self.signal is not None:
            raise Interrupted


def ending(number: int) -> BaseException:
    """How a process ends by a signal: Ctrl-C as in Python, another with exit code 128 + its number."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)


@contextlib.contextmanager
def stoppable() -> Iterator[Stop]:
    """Within it SIGTERM and SIGINT are the Stop's; Interrupted becomes what the signal means.

    Only a process's main thread may set handlers: elsewhere nothing changes. Nor does it in a run of several
    processes, which must stop at one step: `processes.preempted` tells it of SIGTERM, and Ctrl-C ends all at once.

    Raises:
        KeyboardInterrupt or SystemExit, as the signal means, once the block has ended.
    """
    stop, before = Stop(), {}
    if threading.current_thread() is threading.main_thread() and not several():
        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    except Interrupted:
        raise ending(stop.signal or signal.SIGTERM) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
