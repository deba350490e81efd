"""What every index answers, how the best of its scores are chosen, and how the rankings of several become one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Float32, Int64

from jaxft.errors import UserError, shown

NONE = -1  # stands where fewer chunks were found than were asked for
RRF_K = 60  # of the paper


class Found(NamedTuple):
    """What a search gives.

    Attributes:
        ids: the keys of the chunks, (queries, k), the best first; -1 where there are no more.
        scores: of each, (queries, k) float32, higher is better; 0 where there are no more.
    """

    ids: Int64[np.ndarray, "queries k"]
    scores: Float32[np.ndarray, "queries k"]


class Searcher(Protocol):
    """An index over chunks, which are known by their keys: here, or in a store of another process or machine."""

    def search(self, queries: Sequence[str], k: int) -> Found:
        """The k best chunks of each query."""

    def add(self, ids: Sequence[int], texts: Sequence[str]) -> None:
        """Adds chunks."""

    def remove(self, ids: Sequence[int]) -> None:
        """Takes chunks away; those that are not there are passed over."""


def best(scores: Float32[np.ndarray, " chunks"], k: int, above: float | None = None) -> np.ndarray:
    """The indices of the k highest scores, the highest first; of equal ones the lowest index first.

    Args:
        scores: of each chunk.
        k: how many, at most.
        above: scores that are not above it do not count.

    >>> best(np.float32([1, 3, 0, 3]), 3).tolist(), best(np.float32([1, 3, 0, 3]), 4, above=0).tolist()
    ([1, 3, 0], [1, 3, 0])
    """
    indices = np.arange(len(scores)) if above is None else np.flatnonzero(scores > above)
    k = min(k, len(indices))
    if k < len(indices):
        of_those = scores[indices]
        least = np.partition(of_those, len(indices) - k)[len(indices) - k] if k else np.inf
        indices = indices[of_those >= least]
    order = np.lexsort((indices, -scores[indices]))
    chosen: np.ndarray = indices[order][:k]
    return chosen


def together(rows: Sequence[tuple[np.ndarray, np.ndarray]], k: int) -> Found:
    """Rows of (ids, scores), each of k or fewer, as `Found`."""
    ids = np.full((len(rows), k), NONE, np.int64)
    scores = np.zeros((len(rows), k), np.float32)
    for row, (some, values) in enumerate(rows):
        count = min(len(some), k)
        ids[row, :count], scores[row, :count] = some[:count], values[:count]
    return Found(ids, scores)


def fuse(rankings: Sequence[Found], k: int) -> Found:
    """One ranking of several, by reciprocal ranks: sum over rankings of 1 / (60 + rank), ranks from 1.

    Cormack, Clarke and Buettcher, "Reciprocal rank fusion outperforms Condorcet and individual rank learning methods",
    SIGIR 2009. Of chunks with equal sums the one that an earlier ranking has first goes first.

    Args:
        rankings: of the same queries, (queries, any k) each.
        k: how many of each query.
    """
    rows = []
    for each in zip(*(found.ids for found in rankings), strict=True):
        sums: dict[int, float] = {}
        for ids in each:
            for rank, key in enumerate(ids[ids != NONE].tolist(), start=1):
                sums[key] = sums.get(key, 0.0) + 1.0 / (RRF_K + rank)
        chosen = sorted(sums, key=lambda key: -sums[key])[:k]
        rows.append((np.array(chosen, np.int64), np.array([sums[key] for key in chosen])))
    return together(rows, k)


@contextlib.contextmanager
def told(name: str) -> Iterator[None]:
    """What a store's client raises, which is whatever it likes, in one line that begins with the store's name."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{name}: {type(error).__name__}: {shown(' '.join(str(error).split()), 300)}"
        ) from error
