"""Token ids from token ids: the prompts into a cache, then a token at a time in one compiled loop.

Prompts, new tokens and rows are padded to a few sizes (`bucket`), and everything else is data, so
that one program serves all requests of a size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32, Key

from jaxft.inference.sampling import likeliest, sample
from jaxft.mesh import BATCH
from jaxft.models.block import original_length
from jaxft.models.config import Config
from jaxft.models.transformer import (
    Params,
    cached_hidden_states,
    empty_cache,
    hidden_states,
    logits,
    positions_of,
)
from jaxft.runtime.processes import to_host
from jaxft.weights import bind_groups

LEAST_LENGTH = 32  # shorter prompts and answers share one program
CHUNK = 256  # tokens of a prompt taken at once: bounds the scores in memory to CHUNK x length


def bucket(size: int, least: int) -> int:
    """The power of two, from `least` on, that holds `size`.

    >>> [bucket(size, 32) for size in (1, 32, 33, 200)]
    [32, 32, 64, 256]
    """
    return max(least, 1 << (size - 1).bit_length())


class Rules(NamedTuple):
    """What decides the tokens and when to end; see `generate_tokens`. All of it is data."""

    key: Key[Array, ""]
    streams: Int[Array, " batch"]
    eos_ids: Int[Array, " ends"]
    limit: Int[Array, ""]
    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]


State = dict[str, Any]


def generate_tokens(
    config: Config,
    params: Params,
    tokens: Int[np.ndarray, "batch length"],
    segments: Int[np.ndarray, "batch length"],
    key: Key[Array, ""],
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    eos_ids: Sequence[int],
    streams: Int[np.ndarray, " batch"] | None = None,
    groups: Int[np.ndarray, " batch"] | None = None,
) -> tuple[Int32[np.ndarray, "batch new"], Int32[np.ndarray, " batch"]]:
    """Continues each row's prompt by at most `max_new_tokens` tokens, up to and with its first EOS.

    Args:
        config: the decoder's shape.
        params: its tree, with adapters of any kind; dropout is off, as it has no key.
        tokens: (batch, length) ids of the prompts, padded on either side.
        segments: (batch, length): 1 where a prompt's token stands, 0 where there is padding.
        key: of the draws; row i draws from `fold_in(key, streams[i])`, whatever the other rows are.
        max_new_tokens: at least 1.
        temperature: 0 takes the likeliest token; else see `jaxft.inference.sampling.sample`.
        top_k: how many of the likeliest tokens are drawn from; 0 for all.
        top_p: the probability that they have together; 1.0 for all.
        eos_ids: the ids after which a row ends; () for none.
        streams: (batch,) uint32, by default 0, 1, ...
        groups: (batch,) of a bank: the adapter of each row, -1 for none.

    Returns:
        ids (batch, max_new_tokens), 0 behind a row's end, and how many of them each row has
        (batch,), its EOS counted.
    """
    rows, length = tokens.shape
    streams = np.arange(rows) if streams is None else streams
    more = _rows(rows) - rows
    if groups is not None:
        params = bind_groups(params, jnp.asarray(np.pad(groups, (0, more)), jnp.int32))
    to_size = ((0, more), (bucket(length, LEAST_LENGTH) - length, 0))
    rules = Rules(
        key=key,
        streams=jnp.asarray(np.pad(np.asarray(streams, np.uint32), (0, more))),
        eos_ids=jnp.asarray(np.asarray(eos_ids, np.int32)),
        limit=jnp.asarray(max_new_tokens, jnp.int32),
        temperature=jnp.asarray(temperature, jnp.float32),
        top_k=jnp.asarray(top_k, jnp.int32),
        top_p=jnp.asarray(top_p, jnp.float32),
    )
    ids, lengths = decode(
        config,
        params,
        np.pad(np.asarray(tokens, np.int32), to_size),
        np.pad(np.asarray(segments, np.int32), to_size),
        rules,
        room=bucket(max_new_tokens, LEAST_LENGTH),
        greedy=temperature == 0,
    )
    return to_host(ids)[:rows, :max_new_tokens], to_host(lengths)[:rows]


def _rows(rows: int) -> int:
    """A power of two, in parts that the mesh in force can divide it into."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH if axis in mesh.shape)
    return parts * bucket(-(-rows // parts), 1)


@functools.partial(jax.jit, static_argnames=("config", "room", "greedy"))
def decode(
    config: Config,
    params: Params,
    tokens: Int[Array, "batch length"],
    segments: Int[Array, "batch length"],
    rules: Rules,
    *,
    room: int,
    greedy: bool,
) -> tuple[Int[Array, "batch room"], Int[Array, " batch"]]:
    """`generate_tokens` for shapes as they are: `rules` are data, and `rules.limit` <= `room`."""
    tokens, segments = left_padded(tokens, segments)
    rows, length = tokens.shape
    known = segments.sum(axis=1, dtype=jnp.int32)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rules.key, rules.streams)

    def record(state: State, hidden: jax.Array, cache: dict[str, jax.Array]) -> State:
        step, done = state["step"], state["done"]
        scores = logits(config, params, hidden)[:, -1]
        token = jnp.where(done, 0, _choose(rules, scores, keys, step, greedy))
        written = jax.lax.dynamic_update_slice_in_dim(state["ids"], token[:, None], step, axis=1)
        return {
            "step": step + 1,
            "token": token,
            "ids": written,
            "lengths": state["lengths"] + (~done).astype(jnp.int32),
            "done": done | jnp.any(token[:, None] == rules.eos_ids[None, :], axis=1),
            "cache": cache,
        }

    def going(state: State) -> jax.Array:
        return (state["step"] < rules.limit) & ~jnp.all(state["done"])

    def advance(state: State) -> State:
        token, before = state["token"][:, None], state["step"] - 1
        place = (known + before)[:, None]
        cache, seen, index = state["cache"], jnp.ones_like(token), length + before
        places = (token, seen, place)
        reach = None
        if (original := original_length(config)) is not None:
            reach = place.max()
            read = functools.partial(_read_again, config, params, tokens, segments, reach)
            cache = jax.lax.cond(
                reach == original, read, lambda _, before, cache: cache, state["ids"], before, cache
            )
        return record(state, *cached_hidden_states(config, params, *places, cache, index, reach))

    start = {
        "step": jnp.int32(0),
        "ids": jnp.zeros((rows, room), jnp.int32),
        "lengths": jnp.zeros(rows, jnp.int32),
        "done": known == 0,  # a row that only fills the batch
    }
    cache = empty_cache(config, rows, length + room)
    reach = known.max() - 1
    state = record(start, *read_prompts(config, params, tokens, segments, cache, reach))
    state = jax.lax.while_loop(going, advance, state)
    return state["ids"], state["lengths"]


def _choose(
    rules: Rules, scores: jax.Array, keys: jax.Array, step: jax.Array, greedy: bool
) -> Int[Array, " batch"]:
    if greedy:
        return likeliest(scores)
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
    return sample(scores, keys, rules.temperature, rules.top_k, rules.top_p)


def left_padded(tokens: jax.Array, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The padding behind a row's last token moved to its front: all rows go on at one index."""
    length = tokens.shape[1]
    places = jnp.arange(length, dtype=jnp.int32)[None, :]
    last = jnp.max(jnp.where(segments != 0, places, -1), axis=1, keepdims=True)
    source = (places + last + 1) % length
    tokens, segments = (jnp.take_along_axis(x, source, axis=1) for x in (tokens, segments))
    return tokens, segments


def read_prompts(
    config: Config,
    params: Params,
    tokens: jax.Array,
    segments: jax.Array,
    cache: dict[str, jax.Array],
    reach: Int[Array, ""],
) -> tuple[Float[Array, "batch 1 hidden"], dict[str, jax.Array]]:
    """The hidden state of the prompts' last token, and the cache with the prompts in it.

    `reach` is the largest position of all of them, of which a chunk alone does not know.
    """
    rows, length = tokens.shape
    chunk = math.gcd(length, CHUNK)
    count = length // chunk if chunk >= LEAST_LENGTH else 1

    def chunks(x: jax.Array) -> jax.Array:
        return x.reshape(rows, count, -1).swapaxes(0, 1)

    def body(cache: dict[str, jax.Array], chunk: Any) -> tuple[dict[str, jax.Array], jax.Array]:
        tokens, segments, positions, start = chunk
        hidden, cache = cached_hidden_states(
            config, params, tokens, segments, positions, cache, start, reach
        )
        return cache, hidden[:, -1:]

    starts = jnp.arange(count, dtype=jnp.int32) * (length // count)
    parts = (chunks(tokens), chunks(segments), chunks(positions_of(segments)), starts)
    cache, last = jax.lax.scan(body, cache, parts)
    return last[-1], cache


def _read_again(
    config: Config,
    params: Params,
    tokens: Int[Array, "batch length"],
    segments: Int[Array, "batch length"],
    reach: Int[Array, ""],
    ids: Int[Array, "batch room"],
    count: Int[Array, ""],
    cache: dict[str, jax.Array],
) -> dict[str, jax.Array]:
    """The cache of the prompts and the first `count` of their new tokens, as if all had been read at once.

    Longrope turns all positions by other angles once there is one beyond its original length, as transformers does.
    """
    rows, room = ids.shape
    new = jnp.broadcast_to(jnp.arange(room, dtype=jnp.int32) < count, ids.shape)
    tokens = jnp.concatenate([tokens, ids], axis=1)
    segments = jnp.concatenate([segments, new.astype(jnp.int32)], axis=1)
    empty = empty_cache(config, rows, tokens.shape[1])
    return read_prompts(config, params, tokens, segments, empty, reach)[1]


def greedy_reference(
    config: Config, params: Params, tokens: Int[Array, "batch length"], max_new_tokens: int
) -> Int[Array, "batch new"]:
    """Greedy decoding by its definition: a whole forward pass a token; no padding, no EOS."""
    for _ in range(max_new_tokens):
        scores = logits(config, params, hidden_states(config, params, tokens))
        likeliest = jnp.argmax(scores[:, -1:], axis=-1).astype(tokens.dtype)
        tokens = jnp.concatenate([tokens, likeliest], axis=1)
    return tokens[:, -max_new_tokens:]
