"""BLEU and chrF by sacrebleu (https://aclanthology.org/W18-6319): its counts of an item, and its value of their sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float


def statistics(
    metric: Any, answers: Sequence[str], references: Sequence[Sequence[str]]
) -> Float[np.ndarray, "items numbers"]:
    """What the metric counts of each item.

    Args:
        metric: `sacrebleu.BLEU(...)` or `sacrebleu.CHRF(...)`.
        answers: of each item.
        references: likewise, one or more; items may have other numbers of them.
    """
    most = max(map(len, references))
    streams = [
        [each[index] if index < len(each) else None for each in references] for index in range(most)
    ]
    return np.asarray(metric._extract_corpus_statistics(list(answers), streams), float)


def value_of(metric: Any, sums: Float[np.ndarray, "... numbers"]) -> Float[np.ndarray, "..."]:
    """The metric's value, from 0 to 100, of sums of `statistics`."""
    flat = sums.reshape(-1, sums.shape[-1])
    scores = [metric._compute_score_from_stats(list(row)).score for row in flat]
    return np.asarray(scores).reshape(sums.shape[:-1])
