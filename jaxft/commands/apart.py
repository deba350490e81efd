"""Work in a child process, so that a signal ends it at once: a compiler may hear none for minutes."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAID = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
PARENT_DEATH = 1  # PR_SET_PDEATHSIG, of Linux


class _Asked(BaseException):
    """A signal that asks the work to end."""


def apart(work: Callable[[], int]) -> int:
    """The status of `work`, which a child does while this process waits for it, or for Ctrl-C or SIGTERM.

    Python runs a signal's handler when C++ returns, and XLA's compilers return late; libtpu has handlers of its own
    besides. So the child hears neither signal (it has a process group of its own, which the terminal does not reach),
    and its parent, which does nothing else, kills it, says so in one line, and ends with 130 or 143. The child dies
    with its parent, too. Called before JAX is imported: threads do not survive a fork.
    """
    if not hasattr(os, "fork"):
        return work()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until there is someone to hear them
    parent, child = os.getpid(), os.fork()
    if child == 0:
        _be_a_child(parent)
        return work()
    handlers = {number: signal.signal(number, _ask) for number in SIGNALS}
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return _ended(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    except _Asked as asked:
        number = signal.Signals(asked.args[0])
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        _kill(child)
        print(f"jaxft: {SAID[number]}", file=sys.stderr)
        return 128 + number
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _be_a_child(parent: int) -> None:
    os.setpgid(0, 0)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH, signal.SIGKILL)
    if os.getppid() != parent:  # it was killed meanwhile
        os._exit(1)


def _ask(number: int, _: Any) -> None:
    raise _Asked(number)


def _kill(child: int) -> None:
    """Ends the child and what it started; its parent is here, so that the number is still its own."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def _ended(status: int) -> int:
    """The shell's status of a child, which says itself why it ended, unless a signal ended it."""
    if status >= 0:
        return status
    name = signal.Signals(-status).name
    reason = ": the machine's memory may be too small" if name == "SIGKILL" else ""
    print(f"jaxft: ended by {name}{reason}", file=sys.stderr)
    return 128 - status
