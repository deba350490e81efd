"""What an answer quotes, and whether it stands in a passage."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

# Between quotation marks of one kind, or RAFT's ##begin_quote## and ##end_quote##.
QUOTED = re.compile(
    r"##begin_quote##(.+?)##end_quote##|\"([^\"]+)\"|\u201c([^\u201d]+)\u201d|\u00ab([^\u00bb]+)\u00bb"
    r"|\u201e([^\u201c\u201d]+)[\u201c\u201d]|\u2018([^\u2019]+)\u2019",
    re.DOTALL,
)


def quotes_of(answer: str, passages: Sequence[str]) -> list[dict[str, Any]]:
    """Each span that the answer quotes, with the number of the first passage in which it stands; None for none.

    White space and the case of letters do not count, nor do full stops and commas at the span's ends.

    >>> quotes_of('It says "opens at  3 bar," and "never".', ["The valve opens at 3 bar."])
    [{'text': 'opens at  3 bar,', 'passage': 1}, {'text': 'never', 'passage': None}]
    """
    plain = [_plain(passage) for passage in passages]
    found = []
    for match in QUOTED.finditer(answer):
        text = next(group for group in match.groups() if group is not None)
        asked = _plain(text).strip(".,;:!? ")
        numbers = [n for n, passage in enumerate(plain, start=1) if asked and asked in passage]
        found.append({"text": text, "passage": numbers[0] if numbers else None})
    return found


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()
