"""From rewards to advantages: what a completion's reward is compared with, and in which unit.

Completions stand group by group: rows 0 ... G-1 are the first prompt's, the next G the second's. A reward of NaN cannot
be judged: it takes no part in any mean or deviation, and its advantage is 0. Deviations have n - 1 below, as TRL's
have, and `SMALL` is added to them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxft.errors import UserError, counted, row_of, shown

SMALL = 1e-4  # TRL's, beside a deviation
WHITE = 1e-8  # verl's, beside a variance


def advantages(
    rewards: Any,
    group: int,
    *,
    scale: str = "group",
    weights: Sequence[float] | None = None,
    combine: str = "sum",
) -> Float[Array, " n"]:
    """How much better each completion is than its group: A = (r - mean_G) / (std + 1e-4).

    That is GRPO's (arXiv 2402.03300) with `scale="group"`, Dr. GRPO's (2503.20783) with "none", and
    with "batch" that of 2508.08221. Several rewards are weighed and summed first ("sum"), or each is standardised in
    its group, and their weighted sum over the whole batch ("normalize", GDPO, arXiv 2601.05242), whatever `scale` says.

    Args:
        rewards: (n,) or (n, functions); NaN (in a list also None) is a reward that cannot be judged. A row of several
            is judged by those that can.
        group: completions a prompt, G, at least 2; n is a multiple of it.
        scale: "group", "batch" or "none": whose deviation the difference is divided by.
        weights: (functions,), of each reward in the sum; 1 by default.
        combine: "sum" or "normalize".

    Returns:
        (n,) float32. 0 where nothing can be judged, and where a row is the only one of its group that can.

    Raises:
        UserError: a shape that does not fit, a group of 1, a name that is not known.

    >>> advantages([1.0, 0.0, 2.0, 2.0], 2, scale="none").tolist()
    [0.5, -0.5, 0.0, 0.0]
    """
    table, how = _table(rewards), row_of(COMBINE, combine, "combine")
    group = _group_size(group, table, 2)
    deviation = row_of(SCALES, scale, "scale")
    rows = how(table, _factors(weights, table), group, deviation)
    return jnp.nan_to_num(rows.reshape(-1))


def leave_one_out(
    rewards: Any, group: int, *, weights: Sequence[float] | None = None
) -> Float[Array, " n"]:
    """A_i = R_i - mean of the others of its group: RLOO (arXiv 2402.14740).

    Arguments and errors as of `advantages`.

    >>> leave_one_out([3.0, 0.0, float("nan"), 1.0, 1.0, 1.0], 3).tolist()
    [3.0, -3.0, 0.0, 0.0, 0.0, 0.0]
    """
    table = _table(rewards)
    rows = total(table, weights).reshape(-1, _group_size(group, table, 2))
    others = jnp.sum(~jnp.isnan(rows), axis=1, keepdims=True) - 1
    rest = jnp.nansum(rows, axis=1, keepdims=True) - rows
    baseline = rest / others.astype(rows.dtype)  # of a lone judged one 0 / 0: its advantage is 0
    return jnp.nan_to_num(rows - baseline).reshape(-1)


def whitened_returns(
    rewards: Any,
    mask: Any,
    penalties: Any = None,
    *,
    group: int | None = None,
    weights: Sequence[float] | None = None,
) -> Float[Array, "n length"]:
    """What is still to come at each token, whitened over all tokens: REINFORCE++ (arXiv 2501.03262).

        R_t = r - sum over later tokens, and this one, of the penalties      A_t = (R_t - mean) / sqrt(variance + 1e-8)

    Args:
        rewards: (n,) or (n, functions), as of `advantages`.
        mask: (n, length), 1 at sampled tokens.
        penalties: (n, length): beta times a KL estimate of each token (`divergence`); None for none.
        group: with G given the mean of the group is taken off first (the paper's variant for several completions).
        weights: as of `advantages`.

    Returns:
        (n, length), 0 at masked positions and in rows that cannot be judged, which have no part in mean and variance.

    Raises:
        UserError: a shape that does not fit.
    """
    table, mask = _table(rewards), jnp.asarray(mask).astype(bool)
    if mask.ndim != 2 or mask.shape[0] != table.shape[0]:
        raise UserError(
            f"mask has shape {mask.shape}: ({table.shape[0]}, length) is expected, a row a reward"
        )
    final = total(table, weights)
    if group is not None:
        grouped = final.reshape(-1, _group_size(group, table, 2))
        final = (grouped - jnp.nanmean(grouped, axis=1, keepdims=True)).reshape(-1)
    returns = jnp.broadcast_to(final[:, None], mask.shape)
    if penalties is not None:
        costs = jnp.where(mask, jnp.asarray(penalties), 0.0)
        returns = returns - jax.lax.cumsum(costs, axis=1, reverse=True)
    return _whitened(returns, mask & ~jnp.isnan(returns))


def over_greedy(
    rewards: Any, greedy: Any, *, weights: Sequence[float] | None = None, group: int | None = None
) -> Float[Array, " n"]:
    """A = r - r(greedy answer): ReMax (arXiv 2310.10505).

    Args:
        rewards: (n,) or (n, functions), as of `advantages`.
        greedy: of the greedy answers to the same prompts: as many rewards, or one a prompt with `group` given.
        weights: as of `advantages`.
        group: completions a prompt.

    Returns:
        (n,); 0 where one of the two cannot be judged.

    >>> over_greedy([1.0, 0.0], [0.25, 0.25]).tolist()
    [0.75, -0.25]
    """
    table = _table(rewards)
    sampled, baseline = total(table, weights), total(_table(greedy), weights)
    if group is not None:
        baseline = jnp.repeat(baseline, _group_size(group, table, 1))
    if baseline.shape != sampled.shape:
        raise UserError(
            f"{counted(baseline.shape[0], 'reward')} of greedy answers for {counted(sampled.shape[0], 'completion')}"
        )
    return jnp.nan_to_num(sampled - baseline)


def total(table: Float[Array, "n functions"], weights: Any = None) -> Float[Array, " n"]:
    """The weighted sum of a row's rewards that can be judged; NaN where none can."""
    sums = jnp.nansum(table * _factors(weights, table), axis=1)
    return jnp.where(jnp.isnan(table).all(axis=1), jnp.nan, sums)


def _centred(x: Array, axis: int | None) -> Array:
    return x - jnp.nanmean(x, axis=axis, keepdims=True)


def _deviation(x: Array, axis: int | None) -> Array:
    """With n - 1 below, of those that can be judged; NaN where there are fewer than two."""
    return jnp.nanstd(x, axis=axis, keepdims=True, ddof=1) + SMALL


def _summed(table: Array, factors: Array, group: int, deviation: Any) -> Array:
    rows = jnp.where(jnp.isnan(table).all(axis=1), jnp.nan, jnp.nansum(table * factors, axis=1))
    rows = rows.reshape(-1, group)
    return _centred(rows, 1) / deviation(rows)


def _normalized(table: Array, factors: Array, group: int, deviation: Any) -> Array:
    grouped = table.reshape(-1, group, table.shape[1])
    standard = (_centred(grouped, 1) / _deviation(grouped, 1)).reshape(table.shape)
    sums = jnp.nansum(standard * factors, axis=1)
    sums = jnp.where(jnp.isnan(table).all(axis=1), jnp.nan, sums)
    return _centred(sums, None) / _deviation(sums, None)


SCALES: dict[str, Callable[[Array], Array | float]] = {
    "group": lambda rows: _deviation(rows, 1),
    "batch": lambda rows: _deviation(rows, None),
    "none": lambda rows: 1.0,
}
COMBINE: dict[str, Callable[..., Array]] = {"sum": _summed, "normalize": _normalized}


def _whitened(x: Float[Array, "n length"], seen: Bool[Array, "n length"]) -> Array:
    """(x - mean) / sqrt(variance + 1e-8) over the positions that are seen, and 0 at the others."""
    x = jnp.where(seen, x, 0.0)
    many = jnp.sum(seen).astype(x.dtype)
    away = jnp.where(seen, x - jnp.sum(x) / jnp.maximum(many, 1.0), 0.0)
    variance = jnp.sum(jnp.square(away)) / jnp.maximum(many - 1.0, 1.0)
    return away * jax.lax.rsqrt(variance + WHITE)


def _table(rewards: Any) -> Float[Array, "n functions"]:
    """The rewards as (n, functions); UserError where they are none."""
    if not isinstance(rewards, jax.Array):
        try:
            rewards = np.asarray(rewards, np.float32)  # a None becomes NaN
        except (TypeError, ValueError):
            raise UserError(
                "rewards: numbers of shape (n,) or (n, functions) are expected"
            ) from None
    table = jnp.asarray(rewards, jnp.float32)
    if table.ndim == 1:
        table = table[:, None]
    if table.ndim != 2 or not table.size:
        raise UserError(
            f"rewards have shape {table.shape}: (n,) or (n, functions) is expected, n at least 1"
        )
    return table


def _group_size(group: Any, table: Array, least: int) -> int:
    """The group as an int; UserError where it is none, is too small, or the rows are not whole groups of it."""
    try:
        size = operator.index(group)
    except TypeError:
        raise UserError(f"group is {shown(group)}: a whole number of completions is expected") from None  # fmt: skip
    if size < least:
        also = "a reward is compared with those of its group, which needs "
        raise UserError(f"group is {size}: {also}at least {counted(least, 'completion')}")
    if table.shape[0] % size:
        raise UserError(f"{counted(table.shape[0], 'reward')} are not whole groups of {size}")
    return size


def _factors(weights: Any, table: Array) -> Float[Array, "1 functions"]:
    functions = table.shape[1]
    if weights is None:
        return jnp.ones((1, functions), table.dtype)
    try:
        factors = jnp.asarray(weights, table.dtype)
    except (TypeError, ValueError):
        raise UserError(f"weights: numbers are expected, not {shown(weights)}") from None
    if factors.shape != (functions,):
        raise UserError(
            f"weights have shape {factors.shape}: ({functions},) is expected, one a reward function"
        )
    return factors[None, :]
