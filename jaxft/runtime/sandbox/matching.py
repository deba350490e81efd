"""Regular expressions of a folder's, tried in the sandbox."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any


def match(
    patterns: Sequence[str], each: Sequence[str], form: str = "{}", whole: bool = False
) -> list[Any]:
    """For each text [index, groups] of the first pattern that matches it, or None.

    Args:
        patterns: regular expressions.
        each: the texts.
        form: the expression that is tried, `{}` standing for the pattern.
        whole: as `re.fullmatch`; else from the text's beginning, as `re.match`.

    >>> match(["a(.)"], ["xabc", "b"], "x?{}")
    [[0, ['b']], None]
    """
    compiled = [_compiled(pattern, form) for pattern in patterns]
    return [_first(compiled, text, whole) for text in each]


def _compiled(pattern: str, form: str) -> tuple[str, re.Pattern[str]]:
    """The word that every match ends with, where the pattern says it plainly, and the expression."""
    ending = ""
    if form.endswith("(?:{})$") and (
        plain := re.fullmatch(r"[\w.]*?(\w*)", pattern.replace("\\.", "."))
    ):
        ending = plain[1]
    try:
        return ending, re.compile(form.replace("{}", pattern))
    except (re.error, OverflowError) as error:
        raise ValueError(f"{pattern[:80]!r} is no regular expression: {error}") from None


def _first(compiled: Sequence[tuple[str, re.Pattern[str]]], text: str, whole: bool) -> Any:
    for index, (ending, expression) in enumerate(compiled):
        if text.endswith(ending):
            found = expression.fullmatch(text) if whole else expression.match(text)
            if found:
                return [index, list(found.groups())]
    return None
