"""What an objective gives beside its sum: what the sum is divided by, and further averages to report."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Sums = dict[str, tuple[jax.Array, jax.Array]]


class Counted(NamedTuple):
    """All of it sums, so that parts of a batch, and batches, add up.

    Attributes:
        weight: what the sum of losses is divided by: tokens, pairs, ...
        tokens: how many tokens are trained.
        sums: name -> (sum, weight) of each average that is reported.
    """

    weight: jax.Array
    tokens: jax.Array
    sums: Sums


def counted(beside: Any) -> Counted:
    """What an objective returned beside its sum: a `Counted`, or the number of tokens alone."""
    return beside if isinstance(beside, Counted) else Counted(beside, beside, {})


def averages(sums: Sums) -> dict[str, jax.Array]:
    """name -> average; NaN where nothing was counted. The margin of rewards is the difference of two of them.

    >>> averages({"accuracy": (jnp.asarray(3.0), jnp.asarray(4.0))})["accuracy"].item()
    0.75
    """
    named = {
        name: jnp.where(weight > 0, total / jnp.maximum(weight, 1e-30), jnp.nan)
        for name, (total, weight) in sums.items()
    }
    if {"rewards/chosen", "rewards/rejected"} <= named.keys():
        named["rewards/margins"] = named["rewards/chosen"] - named["rewards/rejected"]
    return named
