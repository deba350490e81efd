"""Names for what the backward pass may keep, rather than compute again.

`jax.checkpoint` around a projection saves what bears the name `KEPT`, `NARROW` or `SMALL`; remat = dots around a layer
saves `KEPT`, `ATTENTION` and `SMALL`, remat = outputs `ATTENTION`, `FEED_FORWARD` and `SMALL`, remat = full `SMALL`
alone; and of these, what the backward pass asks for: a feed-forward's output where a norm stands behind it.
"""

from __future__ import annotations

from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

KEPT, NARROW, SMALL = "weight_kept", "weight_narrow", "weight_small"
# What attention gives, before the projection behind it.
ATTENTION = ("attention_output", "attention_log_sum_exp")
FEED_FORWARD = "feed_forward_output"


def keep(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Marks what a weight would rather keep for the backward pass than compute again, its product before all."""
    return checkpoint_name(x, KEPT)


def keep_narrow(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Marks what is cheap to compute again from what remat = dots keeps, as an adapter's `x a`."""
    return checkpoint_name(x, NARROW)


def keep_small(x: Float[Array, " out"]) -> Float[Array, " out"]:
    """Marks a vector that takes a whole kernel to compute, as its columns' norms: the backward pass always keeps it."""
    return checkpoint_name(x, SMALL)
