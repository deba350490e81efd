"""The moment that templates take for the present one."""

from __future__ import annotations

import datetime

from jaxft.errors import UserError, shown


def moment_of(text: str) -> datetime.datetime | None:
    """What an ISO date, or date and time, names; None for "", which is the present moment.

    >>> moment_of("2024-02-29"), moment_of("")
    (datetime.datetime(2024, 2, 29, 0, 0), None)
    """
    return datetime.datetime.fromisoformat(text) if text else None


def check_moment(text: str, where: str) -> None:
    """Raises UserError, naming where the text is from, for one that `moment_of` does not take."""
    try:
        moment_of(text)
    except ValueError:
        raise UserError(
            f"{where} takes a date as 2024-02-29, or a date and time as 2024-02-29T08:30, not {shown(text)}"
        ) from None


def today() -> str:
    """The present day as an ISO date, in this machine's time zone."""
    return datetime.date.today().isoformat()
