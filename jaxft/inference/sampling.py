"""The choice of the next token: temperature, then top-k, then top-p, as in transformers."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Num, UInt32


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
    limited = (top_k > 0) | (top_p < 1.0)  # this is dear: not where nothing is left out
    scores = jax.lax.cond(limited, restrict, lambda scores, *_: scores, scores, top_k, top_p)
    return jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)


class Drawn(NamedTuple):
    """A token a row, and how likely it was.

    Attributes:
        token: (batch,) int32.
        log_probability: (batch,) its log-probability among the tokens that could be drawn, at the temperature; of a
            row of temperature 0, which draws nothing, at temperature 1.
        log_mass: (batch,) the log of what those tokens have together among all: 0 without top-k and top-p. The two
            added are the token's log-probability among all tokens.
    """

    token: Int[Array, " batch"]
    log_probability: Float[Array, " batch"]
    log_mass: Float[Array, " batch"]


def draw(
    scores: Float[Array, "batch vocabulary"],
    keys: Key[Array, " batch"],
    temperature: Float[Array, " batch"],
    top_k: Int[Array, " batch"],
    top_p: Float[Array, " batch"],
    told: Int[Array, " batch"] | None = None,
) -> Drawn:
    """argmax(restrict(scores / temperature) + Gumbel(key)): the tokens that `sample` draws, each row by its own rules.

    The same scores and keys give the same token wherever they are asked: so a program can be told what another one,
    whose scores differ by rounding, would have drawn.

    Args:
        scores: (batch, vocabulary) logits, float32.
        keys: (batch,).
        temperature: (batch,); 0 takes the likeliest token of all.
        top_k: (batch,), as of `restrict`.
        top_p: (batch,), as of `restrict`.
        told: (batch,) tokens whose log-probabilities are given instead of those of the drawn ones.
    """
    warm = (temperature > 0)[:, None]
    scores = scores / jnp.where(warm, temperature[:, None], 1.0)
    limited = warm[:, 0] & ((top_k > 0) | (top_p < 1.0))

    def narrowed(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        kept = jnp.where(limited[:, None], restrict(scores, top_k, top_p), scores)
        return kept, jnp.where(limited, jax.nn.logsumexp(kept, axis=-1), whole)

    whole = jax.nn.logsumexp(scores, axis=-1)
    kept, total = jax.lax.cond(jnp.any(limited), narrowed, lambda scores: (scores, whole), scores)

    def noisy(kept: jax.Array) -> jax.Array:
        noise = jax.vmap(lambda key: jax.random.gumbel(key, kept.shape[1:], kept.dtype))(keys)
        return kept + jnp.where(warm, noise, 0.0)

    noised = jax.lax.cond(jnp.any(warm), noisy, lambda kept: kept, kept)
    token = likeliest(noised)
    asked = token if told is None else told
    chosen = jnp.take_along_axis(scores, asked[:, None], axis=-1, mode="clip")[:, 0]
    return Drawn(token, chosen - total, total - whole)


def likeliest(scores: Float[Array, "batch vocabulary"]) -> Int[Array, " batch"]:
    """The argmax of each row, int32: the first where several are equal; of a row with NaN the last token.

    `jnp.argmax` takes four times as long on a CPU, whose compiler makes no vectors of it.
    """
    size = scores.shape[-1]
    highest = scores.max(axis=-1, keepdims=True)
    numbers = jnp.arange(size, dtype=jnp.int32)[None, :]
    return jnp.min(jnp.where(scores == highest, numbers, size - 1), axis=-1)


def restrict(
    scores: Float[Array, "batch vocabulary"],
    top_k: Int[Array, "*batch"],
    top_p: Float[Array, "*batch"],
) -> Float[Array, "batch vocabulary"]:
    """Scores with -inf for the tokens that top-k leaves out, then those that top-p does.

    Top-k keeps the k highest scores and what equals the lowest of them (arXiv 1805.04833). Top-p
    keeps, of what top-k left, a token if the likelier ones together have less than p (arXiv
    1904.09751); the likeliest is always kept. Departure from transformers: tokens of equal score
    are kept or left out together by top-p too, where transformers' sort decides.

    Args:
        scores: (batch, vocabulary) logits divided by the temperature, float32.
        top_k: how many are kept, of all rows or of each; 0 keeps all.
        top_p: the probability kept, of all rows or of each; 1.0 keeps all.
    """
    top_k, top_p = (jnp.broadcast_to(x, scores.shape[:1])[:, None] for x in (top_k, top_p))
    ranks = _ranks(scores)
    lowest = _threshold(ranks, jnp.ones_like(scores), jnp.where(top_k > 0, top_k, scores.shape[-1]))
    probabilities = jax.nn.softmax(jnp.where(ranks >= lowest, scores, -jnp.inf), axis=-1)
    edge = _threshold(ranks, probabilities, top_p)
    # rounding may leave the sum below 1: p = 1 must still keep everything
    edge = jnp.where(top_p >= 1.0, 0, jnp.minimum(edge, ranks.max(axis=-1, keepdims=True)))
    return jnp.where(ranks >= jnp.maximum(lowest, edge), scores, -jnp.inf)


def _ranks(scores: Float[Array, "batch vocabulary"]) -> UInt32[Array, "batch vocabulary"]:
    """Numbers in the order of the scores, equal where these are: the bits of float32, made to ascend."""
    bits = jax.lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.uint32)  # -0.0 too
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _threshold(
    ranks: UInt32[Array, "batch vocabulary"],
    weights: Float[Array, "batch vocabulary"],
    least: Num[Array, "batch 1"],
) -> UInt32[Array, "batch 1"]:
    """The largest number t such that the weights of all ranks >= t sum to at least `least`; 0 if there is none.

    t is found bit by bit, which takes far less time than sorting the vocabulary.
    """
    least = least.astype(weights.dtype)

    def bit(number: jax.Array, found: jax.Array) -> jax.Array:
        higher = found | (jnp.uint32(1 << 31) >> number.astype(jnp.uint32))
        weight = jnp.sum(jnp.where(ranks >= higher, weights, 0.0), axis=-1, keepdims=True)
        return jnp.where(weight >= least, higher, found)

    return jax.lax.fori_loop(0, 32, bit, jnp.zeros_like(ranks[:, :1]))
