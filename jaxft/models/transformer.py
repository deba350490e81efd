"""One decoder for every family: a thin Flax shell around pure functions over the parameter tree.

    embed/embedding   positions/embedding (learned)   layers/...   final_norm/...   head/kernel

`layers` holds each leaf once for all layers, stacked along a leading axis, and the decoder scans over it: the program
does not grow with depth. What differs from layer to layer in data (the window, the rotary) is scanned beside it; layers
that differ in structure are segments, `layers_0`, `layers_1`, ..., with a scan each. The code asks no kernel what it
is: `contract`, `take` and `bind` know.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxft.kernels.attention import Branches, attention_reference
from jaxft.kernels.cached import over_layer
from jaxft.kernels.gradient_dtype import joined, narrowed
from jaxft.kernels.remat import ATTENTION, FEED_FORWARD, KEPT, SMALL
from jaxft.mesh import constrain
from jaxft.models.block import (
    LayerData,
    Past,
    Reach,
    block,
    layer_data,
    layer_inputs,
    normalized,
    reach_of,
)
from jaxft.models.config import Config
from jaxft.models.initial import initial_params, tied_head
from jaxft.models.segments import Segment, segments_of
from jaxft.vocabulary import size_of
from jaxft.weights import bind, contract, take
from jaxft.weights.placement import gather

__all__ = [
    "Params",
    "Transformer",
    "cached_hidden_states",
    "continued",
    "empty_cache",
    "fitted",
    "head_of",
    "hidden_states",
    "initial_params",
    "logits",
    "positions_of",
    "tied_head",
]

Params = Mapping[str, Any]


class Transformer(nn.Module):
    """The decoder as a Flax module: `model.apply({"params": params}, tokens)` gives the logits.

    Attributes:
        config: the shape.
    """

    config: Config

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        segments: Int[Array, "batch length"] | None = None,
        positions: Int[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length vocabulary"]:
        """Logits of the next token in float32, (batch, length, vocabulary).

        Args:
            tokens: (batch, length) ids.
            segments: (batch, length): 0 is padding, on either side; other numbers are sequences packed in a row that
                do not see each other. A mask of 0 and 1 is one such. By default each row is one sequence.
            positions: (batch, length) of each token in its sequence; by default counted from its start.
        """
        if self.is_initializing():
            for name, child in initial_params(self.config, self.make_rng("params")).items():
                self.put_variable("params", name, child)
        params = self.variables["params"]
        hidden = hidden_states(self.config, params, tokens, segments, positions)
        return logits(self.config, params, hidden)


def hidden_states(
    config: Config,
    params: Params,
    tokens: Int[Array, "batch length"],
    segments: Int[Array, "batch length"] | None = None,
    positions: Int[Array, "batch length"] | None = None,
    branches: Int[Array, "batch length"] | None = None,
) -> Float[Array, "batch length hidden"]:
    """What the head turns into logits: behind the final norm and the logits' scale. Arguments as of `Transformer`.

    `branches` (batch, length) tells continuations of one beginning apart, which stand in one segment: 0 is the
    beginning, which all see, and any other number is seen by its own alone. It needs `positions`.
    """
    segments = jnp.ones_like(tokens) if segments is None else segments
    positions = positions_of(segments) if positions is None else positions
    numbered = None if branches is None else Branches(branches, positions)

    located = (segments, positions, reach_of(config, segments, positions), numbered)
    x = _embed(config, params, tokens, positions)
    inputs = layer_inputs(config, params, tokens, x)
    parts = segments_of(config)
    lenders = {part.config.keys_from for part in parts}
    lent: dict[int, Any] = {}  # keys and values of segments' last layers
    for number, segment in enumerate(parts):
        own, given = segment.config, lent.get(segment.config.keys_from)
        lends = number in lenders

        def body(
            carry: Any, scanned: Any, own: Config = own, given: Any = given, lends: bool = lends
        ) -> tuple[Any, None]:
            layer, taps, data = scanned
            layer = joined(layer, taps)
            x = carry[0] if lends else carry
            x, *made = block(own, params, layer, data, x, *located, given=given)
            return ((x, made) if lends else x), None

        layers, taps = narrowed(params[segment.name], config.dtype)
        scanned = (layers, taps, _data_of(segment, inputs))
        carry: Any = (x, _no_keys(own, tokens)) if lends else x
        carry, _ = jax.lax.scan(_rematerialized(body, config.remat), carry, scanned)
        x, lent[number] = carry if lends else (carry, None)
    return _ended(config, params, x)


def cached_hidden_states(
    config: Config,
    params: Params,
    tokens: Int[Array, "batch length"],
    segments: Int[Array, "batch length"],
    positions: Int[Array, "batch length"],
    cache: dict[str, Any],
    index: Int[Array, ""],
    reach: Reach = None,
) -> tuple[Float[Array, "batch length hidden"], dict[str, Any]]:
    """The decoder over tokens that go on from a cache; returns the cache with them written at `index`.

    `reach` (), of `reach_of`, is that of the whole prompt where these tokens are a part of it.
    """
    seen = jax.lax.dynamic_update_slice_in_dim(cache["segments"], segments, index, axis=1)

    used = index + tokens.shape[1]

    def attend(
        query: jax.Array, keys: jax.Array, values: jax.Array, number: Any, **settings: Any
    ) -> jax.Array:
        def look(key: Any, value: Any, *rows: Any) -> jax.Array:
            query, segments, seen = rows
            places = (segments, seen[:, : key.shape[2]])
            return attention_reference(query, key, value, *places, offset=index, **settings)

        return over_layer(look, keys, values, number, used, query, segments, seen)

    places = (tokens, segments, positions)
    hidden, written = continued(config, params, *places, cache, index, lambda _: attend, reach)
    return hidden, {**written, "segments": seen}


def continued(
    config: Config,
    params: Params,
    tokens: Int[Array, "batch length"],
    segments: Int[Array, "batch length"],
    positions: Int[Array, "batch length"],
    cache: Mapping[str, Any],
    index: Int[Array, ""] | Int[Array, " batch"],
    attend: Callable[[str], Callable[..., jax.Array]],
    reach: Reach = None,
) -> tuple[Float[Array, "batch length hidden"], dict[str, Any]]:
    """The decoder over tokens whose keys and values are written to a cache at `index`, and that cache.

    Args:
        config: the decoder's.
        params: its tree.
        tokens: (batch, length) ids of what is read.
        segments: (batch, length) of them.
        positions: (batch, length) of them.
        cache: "key" and "value", each by the name of a segment.
        index: where along the cache's length the tokens are written, () or (batch,); see `Past`.
        attend: by the name of the segment whose cache is looked at, how: see `Past`.
        reach: as of `cached_hidden_states`.
    """
    reach = reach_of(config, segments, positions) if reach is None else reach
    x = _embed(config, params, tokens, positions)
    inputs = layer_inputs(config, params, tokens, x)
    written: dict[str, Any] = {"key": {}, "value": {}}
    parts = segments_of(config)
    for segment in parts:
        own, name = segment.config, segment.name
        # a segment without keys of its own looks at another's last layer, which is not written again
        lender = segment if own.keys_from < 0 else parts[own.keys_from]
        look = attend(lender.name)

        def body(carry: Any, scanned: Any, own: Config = own, look: Any = look) -> tuple[Any, None]:
            # The cache is carried, and written in place, rather than scanned, which would copy it whole.
            x, keys, values = carry
            layer, data, number = scanned
            past = Past(keys, values, number, index, look)
            return block(own, params, layer, data, x, segments, positions, reach, None, past), None

        if own.keys_from < 0:
            numbers = jnp.arange(own.layers, dtype=jnp.int32)
            start = (x, cache["key"][name], cache["value"][name])
        else:
            numbers = jnp.full(own.layers, lender.config.layers - 1, jnp.int32)
            start = (x, written["key"][lender.name], written["value"][lender.name])
        scanned = (params[name], _data_of(segment, inputs), numbers)
        (x, keys, values), _ = jax.lax.scan(body, start, scanned)
        if own.keys_from < 0:
            written["key"][name], written["value"][name] = keys, values
    return _ended(config, params, x), written


def _ended(
    config: Config, params: Params, x: Float[Array, "batch length hidden"]
) -> Float[Array, "batch length hidden"]:
    """Behind the final norm, times the scale of the logits: a loss that never forms them sees it too."""
    x = normalized(config, params["final_norm"], x)
    return x if config.logit_scale == 1.0 else x * jnp.asarray(config.logit_scale, x.dtype)


def empty_cache(config: Config, batch: int, length: int) -> dict[str, Any]:
    """A cache of keys and values (layers, batch, key_heads, length, head_dim) a segment, all of it padding."""

    def zeros(own: Config) -> jax.Array:
        shape = (own.layers, batch, own.key_heads, length, own.head_dim)
        return constrain(jnp.zeros(shape, config.dtype), "cache")

    own = [segment for segment in segments_of(config) if segment.config.keys_from < 0]
    return {
        "key": {segment.name: zeros(segment.config) for segment in own},
        "value": {segment.name: zeros(segment.config) for segment in own},
        "segments": jnp.zeros((batch, length), jnp.int32),
    }


def head_of(params: Params) -> Any:
    """The head (hidden, vocabulary) as a weight, whether it is an array, adapted, or the tied embedding.

    On a mesh it is gathered here, once for all that is computed from it.
    """
    params = {**params, **gather({name: params[name] for name in ("embed", "head")})}
    return bind(params["head"]["kernel"], params)


def logits(
    config: Config, params: Params, hidden: Float[Array, "batch length hidden"]
) -> Float[Array, "batch length vocabulary"]:
    """The head's product in float32, capped where the family does so."""
    scores = contract(hidden, head_of(params)).astype(jnp.float32)
    cap = config.logit_softcap
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def fitted(config: Config, params: Params) -> Config:
    """The shape of a decoder whose tree may have rows for more or fewer tokens than `config` says."""
    return dataclasses.replace(config, vocabulary=size_of(params))


def positions_of(segments: Int[Array, "batch length"]) -> Int[Array, "batch length"]:
    """Each token's position in its sequence: 0 where a segment begins."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
    before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    start = jax.lax.cummax(jnp.where(segments != before, index, 0), axis=1)
    return index - start


def _rematerialized(body: Any, remat: str) -> Any:
    if remat == "none":
        return body
    kept = {"full": (), "outputs": (*ATTENTION, FEED_FORWARD), "dots": (*ATTENTION, KEPT)}[remat]
    policy = jax.checkpoint_policies.save_only_these_names(SMALL, *kept)
    return jax.checkpoint(body, prevent_cse=False, policy=policy)


def _data_of(segment: Segment, inputs: jax.Array | None) -> LayerData:
    """The data of a segment's layers, with what the tokens give them."""
    data = layer_data(segment.config)
    if inputs is None:
        return data
    return data._replace(inputs=inputs[segment.start : segment.start + segment.config.layers])


def _no_keys(own: Config, tokens: jax.Array) -> list[jax.Array]:
    """Keys and values of a segment's layer, before there are any."""
    rows, length = tokens.shape
    empty = jnp.zeros((rows, own.key_heads, length, own.head_dim), own.dtype)
    return [empty, empty]


def _embed(config: Config, params: Params, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    x = take(bind(params["embed"]["embedding"], params), tokens).astype(config.dtype)
    if config.embedding_scale != 1.0:
        x = x * jnp.asarray(config.embedding_scale, x.dtype)
    if config.positions == "learned":
        x = x + take(bind(params["positions"]["embedding"], params), positions).astype(x.dtype)
    return constrain(x, "residual")
