"""What two texts, or two lists, have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def common_prefix_length(left: Sequence[Any], right: Sequence[Any]) -> int:
    """How many items two sequences begin with in common.

    >>> common_prefix_length([1, 2, 3], [1, 2, 4, 5]), common_prefix_length("ab", "abc")
    (2, 2)
    """
    shorter = min(len(left), len(right))
    if left[:shorter] == right[:shorter]:
        return shorter
    return next(i for i in range(shorter) if left[i] != right[i])
