"""Which evaluation was best so far, and whether to wait for a better one."""

from __future__ import annotations

import math
from collections.abc import Mapping


def best_step(values: Mapping[int, float], better: str = "lower") -> int | None:
    """The step after the first update whose held-out value is best; the earliest of equals, None without any.

    Args:
        values: by the step of each evaluation.
        better: "lower" or "higher". What is not finite is worst.

    >>> best_step({0: 1.0, 2: 3.0, 4: 2.0, 6: 2.0}), best_step({2: 0.1, 4: 0.5, 6: 0.4}, "higher")
    (4, 4)
    """
    sign = -1.0 if better == "higher" else 1.0
    ranked = [(_finite(sign * value), step) for step, value in values.items() if step > 0]
    return min(ranked)[1] if ranked else None


def is_exhausted(
    values: Mapping[int, float], patience: int, since: int = 0, better: str = "lower"
) -> bool:
    """Whether `patience` evaluations have passed since the best one, and since that step; never, where it is 0.

    >>> is_exhausted({2: 3.0, 4: 2.0, 6: 2.5}, 1), is_exhausted({2: 3.0, 4: 2.0, 6: 2.5}, 2)
    (True, False)
    """
    best = best_step(values, better)
    return best is not None and 0 < patience <= sum(step > max(best, since) for step in values)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf
