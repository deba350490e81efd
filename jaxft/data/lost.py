"""Rows that are left out because the chat template's process has too little time or memory for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from jaxft.data.sources import Row
from jaxft.runtime.sandbox import TooMuch

HOPELESS = 3  # first rows that are lost, all of them: then it is the template that is at fault

Made = TypeVar("Made")


class Lost:
    """The rows that were left out.

    Attributes:
        count: how many they are.
        first: the location of the first, "" without any.
        error: why it was; None without any.
    """

    def __init__(self) -> None:
        self.count, self.first = 0, ""
        self.error: TooMuch | None = None
        self._hopeful = False

    def without(
        self, rows: Sequence[Row], make: Callable[[Sequence[Row]], Iterable[Made]]
    ) -> Iterator[Made]:
        """What `make` makes of the rows, one thing for each in their order, but for those that are too much.

        Args:
            rows: in which those that are too much are to be found.
            make: raises a `TooMuch` that begins with the origin of the row that is.

        Raises:
            TooMuch: every row so far is, and they are several.
        """
        rest = list(rows)
        while rest:
            done = 0
            try:
                for made in make(rest):
                    self._hopeful, done = True, done + 1
                    yield made
                return
            except TooMuch as error:
                told = [str(error).startswith(f"{row.origin}: ") for row in rest[done:]]
                if True not in told:
                    raise
                bad = done + told.index(True)
                self._add(rest[bad].origin, error)
                rest = rest[done:bad] + rest[bad + 1 :]

    def _add(self, origin: str, error: TooMuch) -> None:
        self.first, self.error = self.first or origin, self.error or error
        self.count += 1
        if not self._hopeful and self.count == HOPELESS:
            raise self.error


def lost_lines(count: int, first: str) -> list[str]:
    """What is to be said of so many; nothing if there are none.

    >>> lost_lines(2, "a.jsonl:7")
    ["2 rows left out, too long for the chat template's process (the first at a.jsonl:7)"]
    """
    rows = "1 row" if count == 1 else f"{count} rows"
    said = f"{rows} left out, too long for the chat template's process (the first at {first})"
    return [said] if count else []
