"""A user's mistake, told in one line."""

from __future__ import annotations

import difflib
import heapq
from collections.abc import Iterable, Mapping
from typing import Any

LONGEST = 200  # letters of a name that are compared; what is longer comes from a hostile file
MANY = 2000  # names that are compared


class UserError(Exception):
    """A mistake the user can mend: one line that says what is wrong, where, and the nearest right name.

    The command line prints the message without a traceback and exits with 2.
    """


class Stalled(Exception):
    """The runtime will never finish what it was given. The command line says so and exits with 75: try again."""


def nearest(word: str, words: Iterable[str], count: int = 3) -> str:
    """Names the `words` closest to `word`, ready to end an error message; "" if none is close.

    >>> nearest("q_prj", ["q_proj", "k_proj", "embedding"])
    " (nearest: 'q_proj', 'k_proj')"
    >>> nearest("zebra", ["q_proj"])
    ''
    """
    if len(word) > LONGEST:
        return ""
    names = dict.fromkeys(name for name in words if len(name) <= LONGEST)
    if len(names) > MANY:
        names = dict.fromkeys(heapq.nsmallest(MANY, names, lambda name: abs(len(name) - len(word))))
    close = difflib.get_close_matches(word, list(names), n=count, cutoff=0.5)
    return f" (nearest: {', '.join(repr(name) for name in close)})" if close else ""


def row_of(table: Mapping[str, Any], name: Any, what: str) -> Any:
    """What a table has by that name; UserError, which says `what` it is a table of, for a name that it has not.

    >>> row_of({"grpo": 1, "dapo": 2}, "dapo", "loss")
    2
    """
    if not isinstance(name, str) or name not in table:
        raise UserError(
            f"unknown {what} {shown(name)}: known are {', '.join(table)}{nearest(str(name), table)}"
        )
    return table[name]


def shown(value: Any, most: int = 120) -> str:
    """The value's `repr`, cut where it is long: for a message about what a file holds.

    >>> shown("a"), shown("a" * 1000, most=10)
    ("'a'", "'aaaaaa...")
    """
    if isinstance(value, str):
        value = value[: most + 1]
    elif isinstance(value, int) and abs(value) >= 10**most:
        return "a number of many digits"
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def named(name: str) -> str:
    r"""A name as a message shows it: as it stands, but for one that is long or does not print.

    >>> named("model.norm.weight"), named("a\n")
    ('model.norm.weight', "'a\\n'")
    """
    return name if len(name) <= 120 and name.isprintable() else shown(name)


def counted(number: int, one: str, many: str = "") -> str:
    """A number with its noun, which is one's or many's; `many` is the noun with an s by default.

    >>> counted(1, "row"), counted(2, "row"), counted(1_024, "row"), counted(2, "entry", "entries")
    ('1 row', '2 rows', '1,024 rows', '2 entries')
    """
    return f"{number:,} {worded(number, one, many or one + 's')}"


def worded(number: int, one: str, many: str) -> str:
    """The word that goes with a number: one's or many's.

    >>> worded(1, "is", "are"), worded(0, "is", "are")
    ('is', 'are')
    """
    return one if number == 1 else many
