"""How good a ranking is: recall, nDCG and the reciprocal rank of the first relevant one, as trec_eval computes them."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence


def recall(ranking: Sequence[Hashable], relevant: Mapping[Hashable, float], k: int) -> float:
    """The share of the relevant ones that stand among the first k; 0 where there are none.

    Args:
        ranking: what was found, the best first.
        relevant: grades; what has one above 0 is relevant.
        k: how far is looked.

    >>> recall(["b", "a"], {"a": 1, "c": 2, "d": 0}, 2)
    0.5
    """
    wanted = {one for one, grade in relevant.items() if grade > 0}
    return len(wanted.intersection(ranking[:k])) / len(wanted) if wanted else 0.0


def ndcg(ranking: Sequence[Hashable], relevant: Mapping[Hashable, float], k: int) -> float:
    """Sum over the first k of grade / log2(1 + rank), over that of the best ranking (Jarvelin and Kekalainen, 2002).

    >>> round(ndcg(["b", "a"], {"a": 1}, 10), 4)
    0.6309
    """
    gains = [max(relevant.get(one, 0.0), 0.0) for one in ranking[:k]]
    ideal = sorted((grade for grade in relevant.values() if grade > 0), reverse=True)[:k]
    most = _discounted(ideal)
    return _discounted(gains) / most if most else 0.0


def _discounted(gains: Sequence[float]) -> float:
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, start=1))


def reciprocal_rank(ranking: Sequence[Hashable], relevant: Mapping[Hashable, float]) -> float:
    """1 / the rank of the first relevant one, 0 where there is none; its mean over queries is MRR.

    >>> reciprocal_rank(["b", "a"], {"a": 1})
    0.5
    """
    ranks = (rank for rank, one in enumerate(ranking, start=1) if relevant.get(one, 0) > 0)
    return 1.0 / next(ranks, math.inf)


def measures(
    rankings: Sequence[Sequence[Hashable]],
    relevant: Sequence[Mapping[Hashable, float]],
    cutoffs: Sequence[int] = (1, 4, 10),
) -> dict[str, float]:
    """{"recall@k": of each cut-off, "ndcg@10", "mrr"}: the means over queries."""
    pairs = list(zip(rankings, relevant, strict=True))
    found = {f"recall@{k}": [recall(*pair, k) for pair in pairs] for k in cutoffs}
    found["ndcg@10"] = [ndcg(*pair, 10) for pair in pairs]
    found["mrr"] = [reciprocal_rank(*pair) for pair in pairs]
    return {name: sum(each) / max(len(each), 1) for name, each in found.items()}
