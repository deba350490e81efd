"""Supervised fine-tuning: the cross entropy of the trained tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxft.models import Config, head_of, hidden_states
from jaxft.objectives.cross_entropy import cross_entropy

Batch = Mapping[str, Any]


def next_tokens(
    tokens: Int[Array, "batch length"],
    weights: Float[Array, "batch length"],
    segments: Int[Array, "batch length"],
) -> tuple[Int[Array, "batch length"], Float[Array, "batch length"]]:
    """What each position predicts, and its weight: those of the position after it, if in the same segment."""
    following = jnp.roll(segments, -1, axis=1) == segments
    inside = jnp.arange(tokens.shape[1]) < tokens.shape[1] - 1
    kept = following & jnp.broadcast_to(inside[None, :], following.shape)
    return jnp.roll(tokens, -1, axis=1), jnp.where(kept, jnp.roll(weights, -1, axis=1), 0.0)


def sft(
    config: Config, params: Mapping[str, Any], batch: Batch, *, label_smoothing: float = 0.0
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The sum of -log p(token | those before) over a batch's trained tokens, and their number.

    Sums and not means, so that parts of a batch add up to the batch: a token weighs the same wherever it
    stands.

    Args:
        config: the decoder's shape.
        params: the whole tree, adapted or not.
        batch: tokens, segments, positions int32 and weights float32, all (batch, length); a weight of 1
            marks a token that is trained as a target.
        label_smoothing: the share of the target's probability spread over the vocabulary.
    """
    tokens, segments = jnp.asarray(batch["tokens"]), jnp.asarray(batch["segments"])
    hidden = hidden_states(config, params, tokens, segments, jnp.asarray(batch["positions"]))
    targets, weights = next_tokens(tokens, jnp.asarray(batch["weights"]), segments)
    return cross_entropy(
        hidden,
        head_of(params),
        targets,
        jax.lax.stop_gradient(weights),
        softcap=config.logit_softcap,
        label_smoothing=label_smoothing,
    )
