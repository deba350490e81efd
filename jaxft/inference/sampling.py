"""The choice of the next token: temperature, then top-k, then top-p, as in transformers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def sample(
    scores: Float[Array, "batch vocabulary"],
    keys: Key[Array, " batch"],
    temperature: Float[Array, ""],
    top_k: Int[Array, ""],
    top_p: Float[Array, ""],
) -> Int[Array, " batch"]:
    """Draws a token a row from softmax(scores / temperature), among those that `restrict` leaves.

    Args:
        scores: (batch, vocabulary) logits, float32.
        keys: (batch,): a row's token depends on its own scores and key alone.
        temperature: above 0.
        top_k: as of `restrict`.
        top_p: as of `restrict`.

    Returns:
        (batch,) ids, int32.
    """
    scores = scores / temperature
    limited = (top_k > 0) | (top_p < 1.0)  # the sort is dear: not where nothing is left out
    scores = jax.lax.cond(limited, restrict, lambda scores, *_: scores, scores, top_k, top_p)
    return jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)


def restrict(
    scores: Float[Array, "batch vocabulary"], top_k: Int[Array, ""], top_p: Float[Array, ""]
) -> Float[Array, "batch vocabulary"]:
    """Scores with -inf for the tokens that top-k leaves out, then those that top-p does.

    Top-k keeps the k highest scores and what equals the lowest of them (arXiv 1805.04833). Top-p
    keeps, of what top-k left, a token if the likelier ones together have less than p (arXiv
    1904.09751); the likeliest is always kept. Departure from transformers: tokens of equal score
    are kept or left out together by top-p too, where transformers' sort decides.

    Args:
        scores: (batch, vocabulary) logits divided by the temperature, float32.
        top_k: how many are kept; 0 keeps all.
        top_p: the probability kept; 1.0 keeps all.
    """
    size = scores.shape[-1]
    ordered = jnp.sort(scores, axis=-1, descending=True)
    last = jnp.where(top_k > 0, jnp.minimum(top_k, size), size) - 1
    lowest = jnp.take(ordered, last, axis=-1)[:, None]
    ordered = jnp.where(ordered >= lowest, ordered, -jnp.inf)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    likelier = jnp.cumsum(probabilities, axis=-1) - probabilities
    # rounding may bring the sum above 1: then p = 1 must still keep everything
    inside = ((likelier < top_p) | (top_p >= 1.0)).at[:, 0].set(True)
    edge = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scores >= jnp.maximum(lowest, edge), scores, -jnp.inf)
