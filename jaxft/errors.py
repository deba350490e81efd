"""A user's mistake, told in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend: one line that says what is wrong, where, and the nearest right name.

    The command line prints the message without a traceback and exits with 2.
    """


def nearest(word: str, words: Iterable[str], count: int = 3) -> str:
    """Names the `words` closest to `word`, ready to end an error message; "" if none is close.

    >>> nearest("q_prj", ["q_proj", "k_proj", "embedding"])
    " (nearest: 'q_proj', 'k_proj')"
    >>> nearest("zebra", ["q_proj"])
    ''
    """
    close = difflib.get_close_matches(word, list(dict.fromkeys(words)), n=count, cutoff=0.5)
    return f" (nearest: {', '.join(repr(name) for name in close)})" if close else ""
