"""Slots of a cache, each with a sequence of its own: reading a prompt into one, a token for all, a copy of one.

A slot is a row of the cache. Its sequence begins at the first position and goes on where it stands, so that rows of
any length, age, adapter and rule of drawing share one program. What is free or waits is written by no step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from jaxft.inference.sampling import draw
from jaxft.kernels.attention import attention_reference
from jaxft.models.config import Config
from jaxft.models.transformer import Params, continued, logits

Cache = dict[str, Any]
Bound = Callable[
    [Params, Int[Array, " rows"]], Params
]  # parameters, as each row's adapter has them


class Rows(NamedTuple):
    """Where each slot stands.

    Attributes:
        tokens: (slots,) the last token of each, which is not in the cache yet.
        positions: (slots,) at which position of the cache it will stand.
        drawn: (slots,) how many tokens were drawn for it.
        left: (slots,) how many are still to be drawn; 0: the slot waits or is free.
        adapters: (slots,) the adapter that reads it, of the bank.
    """

    tokens: Int[Array, " slots"]
    positions: Int[Array, " slots"]
    drawn: Int[Array, " slots"]
    left: Int[Array, " slots"]
    adapters: Int[Array, " slots"]


class Rules(NamedTuple):
    """How the tokens of each slot are drawn.

    Attributes:
        temperature: (slots,) 0 takes the likeliest.
        top_k, top_p: (slots,) as of `restrict`.
        seeds, streams: (slots,) token number n of a slot is drawn by the key of its seed, stream and n alone.
        ends: (slots, most) the ids that end it; -1 for none.
    """

    temperature: Float[Array, " slots"]
    top_k: Int[Array, " slots"]
    top_p: Float[Array, " slots"]
    seeds: UInt32[Array, " slots"]
    streams: UInt32[Array, " slots"]
    ends: Int[Array, "slots most"]


class Drawn(NamedTuple):
    """What is known of tokens, (...,) each.

    Attributes:
        ids: the token; -1 where none was drawn.
        log_probability: its logarithm, by the scores as they are; None where it is not asked.
        likeliest: (..., alternatives) ids of the likeliest tokens; None where they are not asked.
        log_probabilities: (..., alternatives) of these.
    """

    ids: Int[Array, "..."]
    log_probability: Float[Array, "..."] | None = None
    likeliest: Int[Array, "... alternatives"] | None = None
    log_probabilities: Float[Array, "... alternatives"] | None = None


@functools.partial(
    jax.jit,
    static_argnames=("config", "bound", "steps", "most", "alternatives"),
    donate_argnames="cache",
)
def step(
    config: Config,
    params: Params,
    cache: Cache,
    rows: Rows,
    rules: Rules,
    *,
    bound: Bound,
    steps: int,
    most: int,
    alternatives: int,
) -> tuple[Cache, Drawn]:
    """The next tokens of all slots that are not done, up to `steps` of them each.

    Args:
        config: the decoder's shape.
        params: its tree.
        cache: of `empty_cache`, which is given away.
        rows: where each slot stands.
        rules: how its tokens are drawn.
        bound: gives the parameters by which each row is read.
        steps: how many tokens at most; a slot that reaches its end earlier waits.
        most: positions of the cache that are read; no slot stands behind them when it is done.
        alternatives: how many of the likeliest tokens are told; 0: no probability is computed.

    Returns:
        The cache, and what was drawn (steps, slots).
    """
    params = bound(params, rows.adapters)
    length = cache["segments"].shape[1]

    def advance(carry: tuple[Cache, Rows], _: None) -> tuple[tuple[Cache, Rows], Drawn]:
        cache, rows = carry
        going = rows.left > 0
        index = jnp.where(going, rows.positions, length)
        seen = going.astype(jnp.int32)[:, None]
        given = (rows.tokens[:, None], seen, jnp.where(going, rows.positions, 0)[:, None])
        hidden, cache = _continued(config, params, *given, cache, index, most)
        scores = logits(config, params, hidden)[:, -1]
        keys = jax.vmap(_key)(rules.seeds, rules.streams, rows.drawn)
        heat = jnp.where(going, rules.temperature, 0.0)
        chosen = draw(scores, keys, heat, rules.top_k, rules.top_p).token
        told = _told(scores, chosen, alternatives)
        ended = jnp.any(chosen[:, None] == rules.ends, axis=1)
        after = rows._replace(
            tokens=jnp.where(going, chosen, rows.tokens),
            positions=rows.positions + seen[:, 0],
            drawn=rows.drawn + seen[:, 0],
            left=jnp.where(ended, 0, rows.left - seen[:, 0]),
        )
        return (cache, after), told._replace(ids=jnp.where(going, chosen, -1))

    (cache, _), drawn = jax.lax.scan(advance, (cache, rows), None, length=steps)
    return cache, drawn


@functools.partial(
    jax.jit,
    static_argnames=("config", "bound", "most", "alternatives"),
    donate_argnames="cache",
)
def read(
    config: Config,
    params: Params,
    cache: Cache,
    slot: Int[Array, ""],
    adapter: Int[Array, ""],
    start: Int[Array, ""],
    tokens: Int[Array, " length"],
    count: Int[Array, ""],
    targets: Int[Array, " length"],
    *,
    bound: Bound,
    most: int,
    alternatives: int,
) -> tuple[Cache, Drawn]:
    """Reads the first `count` of some tokens into a slot, from its position `start` on.

    Args:
        config: the decoder's shape.
        params: its tree.
        cache: of `empty_cache`, which is given away.
        slot: which row of it.
        adapter: by which adapter of the bank.
        start: the position of the first token. What stands behind the tokens is forgotten.
        tokens: (length,) padded behind.
        count: how many there are.
        targets: (length,) the token behind each, whose probability is told.
        bound: as of `step`.
        most: as of `step`; at least start + length, or the cache's length.
        alternatives: as of `step`.

    Returns:
        The cache, and what is known of the targets (length,).
    """
    params = bound(params, adapter[None])
    length = tokens.shape[0]
    inside = jnp.arange(length, dtype=jnp.int32) < count
    positions = start + jnp.arange(length, dtype=jnp.int32)
    own = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, slot, 1, axis=_axis(x)), cache)
    kept = jnp.arange(own["segments"].shape[1], dtype=jnp.int32)[None, :] < start
    own["segments"] = own["segments"] * kept.astype(jnp.int32)
    given = (tokens[None], inside.astype(jnp.int32)[None], jnp.where(inside, positions, 0)[None])
    hidden, own = _continued(config, params, *given, own, start[None], most)
    cache = jax.tree.map(
        lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, slot, axis=_axis(x)), cache, own
    )
    if not alternatives:
        return cache, Drawn(targets)
    return cache, _told(logits(config, params, hidden)[0], targets, alternatives)


@functools.partial(jax.jit, donate_argnames="cache")
def copy(
    cache: Cache, source: Int[Array, ""], target: Int[Array, ""], count: Int[Array, ""]
) -> Cache:
    """The cache with the first `count` positions of a slot in another one, which holds nothing else."""

    def copied(x: jax.Array) -> jax.Array:
        own = jax.lax.dynamic_slice_in_dim(x, source, 1, axis=_axis(x))
        if x.ndim == 2:
            kept = jnp.arange(x.shape[1], dtype=jnp.int32)[None, :] < count
            own = own * kept.astype(own.dtype)
        return jax.lax.dynamic_update_slice_in_dim(x, own, target, axis=_axis(x))

    return jax.tree.map(copied, cache)


def _continued(
    config: Config,
    params: Params,
    tokens: Int[Array, "rows length"],
    segments: Int[Array, "rows length"],
    positions: Int[Array, "rows length"],
    cache: Cache,
    index: Int[Array, " rows"],
    most: int,
) -> tuple[Float[Array, "rows length hidden"], Cache]:
    """The decoder over tokens that go on where each row stands, and the cache with them.

    A row whose index lies behind the cache is not written. Of the cache the first `most` positions are read.
    """
    rows, length = tokens.shape
    columns = index[:, None] + jnp.arange(length, dtype=jnp.int32)[None, :]
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    seen = cache["segments"].at[row, columns].set(segments, mode="drop")

    def attend(
        query: jax.Array, keys: jax.Array, values: jax.Array, number: Any, **settings: Any
    ) -> jax.Array:
        key, value = (_first(x, number, most) for x in (keys, values))
        masks = (segments, seen[:, :most])
        return attention_reference(query, key, value, *masks, offset=index, **settings)

    given = (tokens, segments, positions, cache, index)
    hidden, written = continued(config, params, *given, lambda _: attend)
    return hidden, {**written, "segments": seen}


def _first(cache: jax.Array, layer: jax.Array, most: int) -> jax.Array:
    """The first positions of a layer's keys or values, (rows, key_heads, most, head_dim)."""
    _, rows, heads, _, size = cache.shape
    zero = jnp.zeros((), jnp.int32)
    start = (layer, zero, zero, zero, zero)
    return jax.lax.dynamic_slice(cache, start, (1, rows, heads, most, size))[0]


def _axis(x: jax.Array) -> int:
    """The axis of the slots: of segments (slots, length), or of keys (layers, slots, ...)."""
    return 0 if x.ndim == 2 else 1


def _key(seed: jax.Array, stream: jax.Array, number: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), number)


def _told(
    scores: Float[Array, "rows vocabulary"], chosen: Int[Array, " rows"], alternatives: int
) -> Drawn:
    if not alternatives:
        return Drawn(chosen)
    logs = jax.nn.log_softmax(scores, axis=-1)
    own = jnp.take_along_axis(logs, chosen[:, None], axis=-1)[:, 0]
    highest, ids = jax.lax.top_k(logs, alternatives)
    return Drawn(chosen, own, ids, highest)
