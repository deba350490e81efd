"""`jaxft train` with rewards as a process of its own, which is killed where it is told to be.

rewarded_process.py MOMENT WORDS...    MOMENT: never | rollout | grading | update
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from jaxft import cli
from jaxft.objectives import rollouts
from jaxft.training import loop

NUMBER = 3  # of the batch in which it dies
WITHIN = 0.005  # seconds after that moment began


def mortal(owner: Any, name: str) -> None:
    """The process gets SIGKILL shortly after the method has begun for the third time, whatever it then does."""
    before: Callable[..., Any] = getattr(owner, name)
    calls = iter(range(1, 10**6))

    def method(*arguments: Any, **settings: Any) -> Any:
        if next(calls) == NUMBER:
            threading.Timer(WITHIN, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return before(*arguments, **settings)

    setattr(owner, name, method)


MOMENTS: dict[str, tuple[Any, str]] = {
    "rollout": (rollouts.Rollouts, "_sampled"),
    "grading": (rollouts.Rollouts, "_judging"),
    "update": (loop.Loop, "dispatch"),
}


if __name__ == "__main__":
    if sys.argv[1] != "never":
        mortal(*MOMENTS[sys.argv[1]])
    sys.exit(cli.main(sys.argv[2:]))
