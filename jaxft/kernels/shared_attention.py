"""Attention of continuations that share what they go on from: one softmax over [shared keys | own keys].

Each slot holds one continuation's own keys, in a ring of columns that all slots write together, one column a step. The
keys that it shares with others stand once, in the row of its prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxft.kernels.attention import FLOOR, MASKED, _capped, attention_reference
from jaxft.kernels.cached import over_layer


class Sharing(NamedTuple):
    """Which slot goes on from which prompt, and what of both it sees.

    The rows of prompts, and the slots, are divided into `parts`, as a mesh divides a batch; a slot's prompt stands in
    its own part. A continuation's number in its part is prompt * group + its number in the group.

    Attributes:
        continuation: (parts, slots) the number of each slot's continuation in its part.
        slot: (parts, prompts * group) its inverse; anything for a continuation that stands in no slot.
        shared: (parts, prompts, length): whether a token stands there. The last ones do: rows are padded in front.
        before: (parts * slots,) own tokens of each slot before the newest.
        age: (columns,) how many steps ago a column was written; 0 for the newest.
        used: () how many columns are written, the first ones.
    """

    continuation: Int[Array, "parts slots"]
    slot: Int[Array, "parts continuations"]
    shared: Bool[Array, "parts prompts length"]
    before: Int[Array, " all_slots"]
    age: Int[Array, " columns"]
    used: Int[Array, ""]


def shared_attention_reference(
    query: Float[Array, "slots heads 1 head_dim"],
    shared_key: Float[Array, "rows key_heads length head_dim"],
    shared_value: Float[Array, "rows key_heads length head_dim"],
    key: Float[Array, "slots key_heads columns head_dim"],
    value: Float[Array, "slots key_heads columns head_dim"],
    sharing: Sharing,
    **settings: Any,
) -> Float[Array, "slots heads 1 head_dim"]:
    """`shared_attention` by its definition: each slot's prompt is copied before its own keys, in their order."""
    parts = sharing.continuation.shape[0]
    prompts = sharing.shared.shape[1]
    group = sharing.slot.shape[1] // prompts
    row = sharing.continuation // group + jnp.arange(parts)[:, None] * prompts
    row, order = row.reshape(-1), jnp.argsort(-sharing.age)
    keys, values = (
        jnp.concatenate([x[row], own[:, :, order]], axis=2)
        for x, own in ((shared_key, key), (shared_value, value))
    )
    own = sharing.age[order][None, :] <= sharing.before[:, None]
    seen = jnp.concatenate([sharing.shared.reshape(-1, sharing.shared.shape[-1])[row], own], 1)
    # own tokens follow the prompt's last: what is not written yet must lie between neither them nor the window
    places = jnp.argsort(seen, axis=1, stable=True)
    keys, values = (jnp.take_along_axis(x, places[:, None, :, None], 2) for x in (keys, values))
    seen = jnp.take_along_axis(seen, places, 1).astype(jnp.int32)
    ones = jnp.ones_like(seen[:, :1])
    last = seen.shape[1] - 1
    return attention_reference(query, keys, values, ones, seen, offset=last, **settings)


def shared_attention(
    query: Float[Array, "slots heads 1 head_dim"],
    shared_key: Float[Array, "rows key_heads length head_dim"],
    shared_value: Float[Array, "rows key_heads length head_dim"],
    keys: Float[Array, "layers slots key_heads columns head_dim"],
    values: Float[Array, "layers slots key_heads columns head_dim"],
    number: Int[Array, ""],
    sharing: Sharing,
    *,
    window: int | Int[Array, ""] | None = None,
    softcap: float | None = None,
    scale: float,
) -> Float[Array, "slots heads 1 head_dim"]:
    """softmax(scale q [shared | own]^T) [shared | own], where the keys of a prompt are read once for its whole group.

    The two parts of the softmax are computed apart, each with its highest score and its sum, and joined by these
    (FlashAttention 2, arXiv 2307.08691, section 3.1; shared beginnings as in Hydragen, arXiv 2402.05099). For the
    shared part the queries stand by continuation, so that a product a prompt serves all of its group; rows of
    continuations that stand in no slot hold anything, and are not read.

    Args:
        query: one token a slot.
        shared_key: of the prompts, parts * prompts rows.
        shared_value: the same.
        keys: of each slot's own tokens in every layer, the newest written.
        values: the same.
        number: of the layer.
        sharing: who shares what.
        window: how far a token sees; None for everything.
        softcap: as of `attention_reference`.
        scale: on the scores.

    Returns:
        (slots, heads, 1, head_dim) in the dtype of `query`; computed in float32.
    """
    parts, prompts, length = sharing.shared.shape
    group = sharing.slot.shape[1] // prompts
    all_slots, heads, _, head_dim = query.shape
    key_heads = keys.shape[2]
    grouped = query.reshape(all_slots, key_heads, heads // key_heads, head_dim)

    def by_prompt(x: jax.Array) -> jax.Array:
        """(slots, ...) -> (rows, group, ...)."""
        x = _taken(x, sharing.slot)
        return x.reshape(parts * prompts, group, *x.shape[1:])

    queries = jnp.moveaxis(by_prompt(grouped), 1, 2)  # (rows, key_heads, group, queries, head_dim)
    seen = sharing.shared.reshape(parts * prompts, 1, length)
    if window is not None:
        ahead = by_prompt(sharing.before)[:, :, None] + length
        seen = seen & (ahead - jnp.arange(length, dtype=jnp.int32)[None, None, :] < window)
    seen = jnp.broadcast_to(seen, (parts * prompts, group, length))
    by_row = _softmax_part(queries, shared_key, shared_value, seen, softcap, scale)
    first = [
        _taken(jnp.moveaxis(x, 2, 1).reshape(-1, *x.shape[1:2], *x.shape[3:]), sharing.continuation)
        for x in by_row
    ]
    own = sharing.age[None, :] <= sharing.before[:, None]
    own = own if window is None else own & (sharing.age < window)[None, :]

    def look(key: Array, value: Array, query: Array, seen: Array) -> tuple[Array, ...]:
        return _softmax_part(query, key, value, seen[..., : key.shape[2]], softcap, scale)

    rest = (grouped[:, :, None], own[:, None])
    second = over_layer(look, keys, values, number, sharing.used, *rest)
    output = _joined(first, [x[:, :, 0] for x in second])
    return output.reshape(query.shape).astype(query.dtype)


def _taken(x: Array, index: Int[Array, "parts many"]) -> Array:
    """(parts * n, ...) -> (parts * many, ...): rows of each part by their index in it."""
    parts, many = index.shape
    taken = jax.vmap(lambda rows, index: rows[index])(x.reshape(parts, -1, *x.shape[1:]), index)
    return taken.reshape(parts * many, *x.shape[1:])


def _softmax_part(
    queries: Float[Array, "rows key_heads group queries head_dim"],
    key: Float[Array, "rows key_heads length head_dim"],
    value: Float[Array, "rows key_heads length head_dim"],
    seen: Bool[Array, "rows group length"],
    softcap: float | None,
    scale: float,
) -> tuple[Array, Array, Array]:
    """What a part of the keys adds to a softmax: the sum of the weighed values, the weights' sum, the highest score."""
    rows, key_heads, group, size, head_dim = queries.shape
    flat = queries.reshape(rows, key_heads, group * size, head_dim)
    scores = jnp.einsum("BKQH,BKSH->BKQS", flat, key, preferred_element_type=jnp.float32)
    scores = _capped(scores * scale, softcap)[0]
    mask = jnp.repeat(seen, size, axis=1)[:, None]
    scores = jnp.where(mask, scores, MASKED)
    highest = jnp.maximum(scores.max(axis=-1, keepdims=True), FLOOR)
    weights = jnp.exp(scores - highest)
    sums = weights.sum(axis=-1, keepdims=True)
    weights = weights.astype(value.dtype)
    output = jnp.einsum("BKQS,BKSH->BKQH", weights, value, preferred_element_type=jnp.float32)
    return tuple(x.reshape(rows, key_heads, group, size, -1) for x in (output, sums, highest))  # type: ignore[return-value]


def _joined(first: Sequence[Array], second: Sequence[Array]) -> Array:
    """The softmax over both parts: (slots, key_heads, queries, head_dim)."""
    highest = jnp.maximum(first[2], second[2])
    factors = [jnp.exp(part[2] - highest) for part in (first, second)]
    total = first[1] * factors[0] + second[1] * factors[1]
    return (first[0] * factors[0] + second[0] * factors[1]) / total
