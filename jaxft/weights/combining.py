"""Several low-rank updates of one kernel as one, in the ways that PEFT's `add_weighted_adapter` knows.

An update is s a b, with a (in, r) and b (r, out). Its share is w s: the weight that a user gives it, times its scale.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from jaxft.errors import UserError

Array = np.ndarray
Keep = Callable[[Array], Array]  # an array -> which of its numbers stay, as booleans


@dataclasses.dataclass(frozen=True)
class Update:
    """One low-rank update: a (in, r), b (r, out), float32, and the factor s."""

    a: Array
    b: Array
    scale: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[1])


@dataclasses.dataclass(frozen=True)
class Way:
    """How updates become one.

    Attributes:
        beside: a and b are laid side by side, with the sum of the ranks: exact.
        whole: what is summed are the products s a b, of which an SVD keeps `rank` directions; else a and b themselves,
            each times the root of its share, for which all ranks must be equal.
        pruned: "" | "largest" | "random": which numbers of each stay before they are summed; the random ones are
            divided by the density (DARE, arXiv 2311.03099).
        elected: of each number only those stay that have the sign of most, and they are averaged (TIES, arXiv
            2306.01708).
    """

    beside: bool = False
    whole: bool = False
    pruned: str = ""
    elected: bool = False


WAYS = {
    "cat": Way(beside=True),
    "linear": Way(),
    "svd": Way(whole=True),
    "ties": Way(pruned="largest", elected=True),
    "ties_svd": Way(whole=True, pruned="largest", elected=True),
    "dare": Way(pruned="random"),
    "dare_linear": Way(pruned="random"),
    "dare_linear_svd": Way(whole=True, pruned="random"),
    "dare_ties": Way(pruned="random", elected=True),
    "dare_ties_svd": Way(whole=True, pruned="random", elected=True),
    "magnitude_prune": Way(pruned="largest"),
    "magnitude_prune_svd": Way(whole=True, pruned="largest"),
}
MAJORITIES = ("total", "frequency")


def combined(
    updates: Sequence[Update],
    weights: Sequence[float],
    way: Way,
    *,
    rank: int = 0,
    density: float = 1.0,
    majority: str = "total",
    keep: Keep | None = None,
) -> Update:
    """One update, of scale 1, for the weighted sum of several, as PEFT 0.21 combines them.

    Args:
        updates: of one kernel.
        weights: one number each.
        way: how.
        rank: of the result, where an SVD makes it; 0: the largest of the updates'.
        density: the share of numbers that stay, of ways that prune.
        majority: by what a sign is elected: the "total" of the numbers, or the "frequency" of the signs.
        keep: which numbers a random pruning leaves: it is asked for each update, a before b.

    Raises:
        UserError: ranks that differ, where a and b themselves are summed.
    """
    shares = [weight * one.scale for weight, one in zip(weights, updates, strict=True)]
    if way.beside:
        return _beside(updates, shares)
    mix = _mixer(way, density, majority, keep)
    if way.whole:
        rank = rank or max(one.rank for one in updates)
        if not way.pruned:
            return _of_factors(_beside(updates, shares), rank)
        products = [one.scale * (one.a @ one.b) for one in updates]
        return _of_product(mix(products, weights), rank)
    ranks = sorted({one.rank for one in updates})
    if len(ranks) > 1:
        raise UserError(f"has the ranks {', '.join(map(str, ranks))}")
    roots = [abs(share) ** 0.5 for share in shares]
    signed = [np.copysign(root, share) for root, share in zip(roots, shares, strict=True)]
    a = mix([one.a for one in updates], signed)
    return Update(a, mix([one.b for one in updates], roots), 1.0)


def distance(
    one: Update, updates: Sequence[Update], weights: Sequence[float]
) -> tuple[float, float]:
    """(the Frobenius norm of `one` less the weighted sum of the updates, that of the sum)."""
    shares = [weight * each.scale for weight, each in zip(weights, updates, strict=True)]
    less = _beside([*updates, one], [*shares, -one.scale])
    return _norm(less), _norm(_beside(updates, shares))


def random_keep(density: float, seed: int, name: str) -> Keep:
    """Each number stays with this probability, drawn from the seed and the kernel's name."""
    draw = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return lambda numbers: draw.random(numbers.shape) < density


def largest(numbers: Array, density: float) -> Array:
    """Which numbers stay, as booleans: the share `density` of them that are largest in size."""
    kept = int(density * numbers.size)
    mask = np.zeros(numbers.size, bool)
    if kept:
        mask[np.argpartition(-np.abs(numbers).reshape(-1), kept - 1)[:kept]] = True
    return mask.reshape(numbers.shape)


def elect(tensors: Array, shares: Array, majority: str) -> Array:
    """The mean, over the first axis, of the shares of those tensors that have the sign of most.

    The sign of each number is decided by the tensors without their weights; where they balance, it is plus.
    """
    by = tensors if majority == "total" else np.sign(tensors)
    sign = np.where(by.sum(0) >= 0, 1, -1)
    agree = np.sign(tensors) == sign
    return (shares * agree).sum(0) / np.maximum(agree.sum(0), 1)


def _mixer(
    way: Way, density: float, majority: str, keep: Keep | None
) -> Callable[[Sequence[Array], Sequence[float]], Array]:
    """tensors of one shape and their weights -> one tensor."""

    def mix(tensors: Sequence[Array], weights: Sequence[float]) -> Array:
        if way.pruned and density < 1:
            tensors = [_pruned(one, way, density, keep) for one in tensors]
        stack = np.stack(tensors)
        shares = stack * np.asarray(weights, np.float32).reshape(-1, 1, 1)
        mixed = elect(stack, shares, majority) if way.elected else shares.sum(0)
        return mixed.astype(np.float32)

    return mix


def _pruned(numbers: Array, way: Way, density: float, keep: Keep | None) -> Array:
    if way.pruned == "largest":
        return numbers * largest(numbers, density)
    if keep is None:
        raise ValueError("a random pruning needs `keep`")
    return numbers * keep(numbers) / np.float32(density)


def _beside(updates: Sequence[Update], shares: Sequence[float]) -> Update:
    a = [one.a * np.float32(share) for one, share in zip(updates, shares, strict=True)]
    return Update(np.concatenate(a, 1), np.concatenate([one.b for one in updates], 0), 1.0)


def _cut(left: Array, sizes: Array, right: Array, rank: int) -> Update:
    """The first `rank` directions; the sizes go to b, as in PEFT."""
    return Update(left[:, :rank], sizes[:rank, None] * right[:rank], 1.0)


def _of_product(product: Array, rank: int) -> Update:
    return _cut(*np.linalg.svd(product, full_matrices=False), rank)


def _of_factors(one: Update, rank: int) -> Update:
    """The same of a product that is given by its factors and is never made: an SVD of a square of their rank."""
    left, inner, right = _triangles(one)
    u, sizes, v = np.linalg.svd(inner, full_matrices=False)
    return _cut(left @ u, sizes, v @ right, rank)


def _triangles(one: Update) -> tuple[Array, Array, Array]:
    left, upper = np.linalg.qr(one.a)
    right, lower = np.linalg.qr(one.b.T)
    return left, upper @ lower.T, right.T


def _norm(one: Update) -> float:
    return float(np.linalg.norm(_triangles(one)[1]))
