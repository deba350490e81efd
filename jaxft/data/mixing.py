"""Sources mixed by weight: which examples an epoch holds, and in which order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from jaxft.data.store import Examples
from jaxft.errors import UserError, counted

MOST = 1000  # how often an example may stand in an epoch


class Mixed(Examples):
    """Examples in another order, some of them several times; tokens are not copied."""

    def __init__(self, base: Examples, order: Int64[np.ndarray, " examples"]) -> None:
        derived = ("fingerprint", "fingerprints")
        vars(self).update({key: part for key, part in vars(base).items() if key not in derived})
        self.lengths, self.source = base.lengths[order], base.source[order]
        self.lines = base.lines[order]
        self._base, self._order = base, order

    def span(self, index: int) -> slice:
        """Where an example stands in `tokens` and `trained`."""
        return self._base.span(int(self._order[index]))

    @property
    def starts(self) -> Int64[np.ndarray, " examples"]:
        """Where each example begins in `tokens`."""
        starts: Int64[np.ndarray, " examples"] = self._base.starts[self._order]
        return starts

    @property
    def fingerprints(self) -> dict[str, str]:
        """Those of the sources, which a mixture does not change."""
        return self._base.fingerprints

    @property
    def fingerprint(self) -> str:
        """Of the sources and of the order."""
        return hashlib.sha256(self._base.fingerprint.encode() + self._order.tobytes()).hexdigest()


def check_weights(weights: Sequence[float], sources: int) -> None:
    """UserError unless there is a weight for each source."""
    if len(weights) != sources:
        raise UserError(
            f"config.data.mix has {counted(len(weights), 'weight')}, and config.data.train "
            f"{counted(sources, 'source')}: give a weight for each source"
        )


def mix(
    examples: Examples, names: Sequence[str], sizes: Sequence[int], weights: Sequence[float]
) -> Mixed:
    """An epoch in which the sources' examples stand as their weights say.

    Args:
      examples: of all sources, one after the other.
      names: of the sources.
      sizes: examples of each source.
      weights: of each source.

    Raises:
      UserError: a source has no example left, or would be gone through very often.
    """
    check_weights(weights, len(sizes))
    if 0 in sizes:
        raise UserError(f"{names[sizes.index(0)]}: none of its rows has a trained token")
    epoch = max(size / weight for size, weight in zip(sizes, weights, strict=True))
    for name, size, weight in zip(names, sizes, weights, strict=True):
        if epoch * weight > MOST * size:
            raise UserError(
                f"config.data.mix: an epoch would hold each of the {counted(size, 'example')} of {name} "
                f"{epoch * weight / size:.0f} times; give it less weight (at most {MOST} times)"
            )
    return Mixed(examples, mix_order(sizes, weights))


def mix_order(sizes: Sequence[int], weights: Sequence[float]) -> Int64[np.ndarray, " examples"]:
    """The examples of an epoch, numbered over all sources, in the order in which they stand.

    The epoch is the shortest that holds every example: the source with the most examples for its
    weight stands in it once, the others are gone through again and again. Shares are kept all the
    way: after any n examples, each source has had its share of n, to within one.

    >>> mix_order([2, 4], [1.0, 1.0]).tolist()
    [0, 2, 1, 3, 0, 4, 1, 5]
    >>> mix_order([2, 4], [2.0, 1.0]).tolist()
    [0, 2, 1, 0, 3, 1, 0, 4, 1, 0, 5, 1]
    """
    epoch = max(size / weight for size, weight in zip(sizes, weights, strict=True))
    counts = [round(epoch * weight) for weight in weights]
    # The i-th of a source's c examples belongs at (i + 1/2) / c of the epoch.
    at = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    first = np.cumsum([0, *sizes[:-1]])
    numbers = [
        begin + np.arange(count) % size
        for begin, count, size in zip(first, counts, sizes, strict=True)
    ]
    order: Int64[np.ndarray, " examples"] = np.concatenate(numbers)[np.argsort(at, kind="stable")]
    return order.astype(np.int64)


def mix_line(names: Sequence[str], sizes: Sequence[int], weights: Sequence[float]) -> str:
    """What the mixture is, to be said.

    >>> mix_line(["a.jsonl", "b.jsonl"], [2, 4], [3, 1])
    'mixed: a.jsonl 75.0 % (2 examples, x 6), b.jsonl 25.0 % (4 examples, x 1)'
    """
    epoch = max(size / weight for size, weight in zip(sizes, weights, strict=True))
    parts = [
        f"{name} {100 * weight / sum(weights):.1f} % ({counted(size, 'example')}, x {epoch * weight / size:.3g})"
        for name, size, weight in zip(names, sizes, weights, strict=True)
    ]
    return f"mixed: {', '.join(parts)}"
