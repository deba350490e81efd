"""The one bar of a comparison, the time that is left, and where everything else is said: RUN/log.txt."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

BAR = "{desc} {percentage:3.0f}% |{bar}| {elapsed}{postfix}"


class Progress:
    """A bar on a terminal, plain lines elsewhere.

    Args:
        log: the file that takes what runs say themselves.
    """

    def __init__(self, log: Path) -> None:
        self.stream: TextIO = sys.stderr
        self.terminal = self.stream.isatty()
        self.log, self.began, self.left = log, time.perf_counter(), 0.0
        self.thought, self.took = (
            0.0,
            0.0,
        )  # seconds of the pieces since it is known what is to come
        self.bar = tqdm(
            total=100, bar_format=BAR, file=self.stream, disable=not self.terminal, leave=False
        )

    def expect(self, seconds: float) -> None:
        """So many seconds of work are still to come, by what is thought of each piece."""
        self.left, self.thought, self.took = max(seconds, 0.0), 0.0, 0.0
        self._show()

    @contextlib.contextmanager
    def piece(self, what: str, seconds: float) -> Iterator[None]:
        """A piece of work that takes about so many seconds. What is said within it goes into the log."""
        if self.terminal:
            self.bar.set_description_str(what)
        began = self.elapsed
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"== {what}\n")
            with contextlib.redirect_stderr(log), contextlib.redirect_stdout(log):
                yield
        self.left = max(self.left - seconds, 0.0)
        self.thought, self.took = self.thought + seconds, self.took + self.elapsed - began
        self._show()
        if not self.terminal:
            left = f", about {told_seconds(self.to_come)} left" if self.left else ""
            self.say(f"{what} ({told_seconds(self.elapsed)}{left})")

    @property
    def to_come(self) -> float:
        """Seconds that are left, at the pace of what is done."""
        return self.left * (self.took / self.thought if self.thought else 1.0)

    @property
    def elapsed(self) -> float:
        """Seconds since this began."""
        return time.perf_counter() - self.began

    def say(self, line: str) -> None:
        """A line above the bar."""
        if self.terminal:
            self.bar.write(line, file=self.stream)
        else:
            print(line, file=self.stream, flush=True)

    def close(self) -> None:
        """Takes the bar away."""
        self.bar.close()

    def _show(self) -> None:
        whole = self.elapsed + self.to_come
        self.bar.n = round(100 * self.elapsed / whole) if whole else 0
        self.bar.set_postfix_str(f"about {told_seconds(self.to_come)} left" if self.left else "")


def told_seconds(seconds: float) -> str:
    """A time as a reader takes it.

    >>> told_seconds(42.3), told_seconds(200), told_seconds(5000)
    ('42 s', '3 min', '1.4 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
