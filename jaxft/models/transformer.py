"""One decoder for every family: a thin Flax shell around pure functions over the parameter tree.

    embed/embedding   positions/embedding (learned)   layers/...   final_norm/...   head/kernel

`layers` holds each leaf once for all layers, stacked along a leading axis, and the decoder scans over it: the program
does not grow with depth. What differs from layer to layer in data (the window) is scanned beside it. The code
asks no kernel what it is: `contract`, `take` and `bind` know.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxft.kernels.attention import Branches, attention_reference, joined_attention
from jaxft.kernels.gradient_dtype import joined, narrowed
from jaxft.kernels.heads import joined_heads, split_heads
from jaxft.kernels.remat import KEPT, NARROW, SMALL
from jaxft.kernels.ring import ring_attention
from jaxft.kernels.splash import FOREVER
from jaxft.kernels.tensor_parallel import row_parallel_output
from jaxft.mesh import constrain, sizes_in_force
from jaxft.models.config import Config
from jaxft.models.layers import (
    activate,
    gated,
    layer_norm,
    rms_norm,
    rope_frequencies,
    rotary,
)
from jaxft.weights import Tied, bind, contract, contract_each, take
from jaxft.weights.placement import gather

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
    """The decoder up to its final norm: what the head turns into logits. Arguments as of `Transformer`.

    `branches` (batch, length) tells continuations of one beginning apart, which stand in one segment: 0 is the
    beginning, which all see, and any other number is seen by its own alone. It needs `positions`.
    """
    segments = jnp.ones_like(tokens) if segments is None else segments
    positions = positions_of(segments) if positions is None else positions
    numbered = None if branches is None else Branches(branches, positions)

    def body(x: jax.Array, scanned: Any) -> tuple[jax.Array, None]:
        layer, taps, window = scanned
        layer = joined(layer, taps)
        return _block(config, params, layer, window, x, segments, positions, numbered), None

    x = _embed(config, params, tokens, positions)
    layers, taps = narrowed(params["layers"], config.dtype)
    x, _ = jax.lax.scan(_rematerialized(body, config.remat), x, (layers, taps, _windows(config)))
    return _normalized(config, params["final_norm"], x)


def cached_hidden_states(
    config: Config,
    params: Params,
    tokens: Int[Array, "batch length"],
    segments: Int[Array, "batch length"],
    positions: Int[Array, "batch length"],
    cache: dict[str, jax.Array],
    index: Int[Array, ""],
) -> tuple[Float[Array, "batch length hidden"], dict[str, jax.Array]]:
    """The decoder over tokens that go on from a cache; returns the cache with them written at `index`."""
    seen = jax.lax.dynamic_update_slice_in_dim(cache["segments"], segments, index, axis=1)

    def body(carry: Any, scanned: Any) -> tuple[Any, None]:
        # The cache is carried, and written in place, rather than scanned, which would copy it whole.
        x, keys, values = carry
        layer, window, number = scanned
        past = (keys, values, number, seen, index)
        return _block(config, params, layer, window, x, segments, positions, None, past), None

    x = _embed(config, params, tokens, positions)
    numbers = jnp.arange(config.layers, dtype=jnp.int32)
    start = (x, cache["key"], cache["value"])
    (x, keys, values), _ = jax.lax.scan(body, start, (params["layers"], _windows(config), numbers))
    hidden = _normalized(config, params["final_norm"], x)
    return hidden, {"key": keys, "value": values, "segments": seen}


def empty_cache(config: Config, batch: int, length: int) -> dict[str, jax.Array]:
    """A cache of keys and values (layers, batch, key_heads, length, head_dim), all of it padding."""
    shape = (config.layers, batch, config.key_heads, length, config.head_dim)
    return {
        "key": jnp.zeros(shape, config.dtype),
        "value": jnp.zeros(shape, config.dtype),
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
    """The head's product in float32, capped where the family caps it."""
    scores = contract(hidden, head_of(params)).astype(jnp.float32)
    cap = config.logit_softcap
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def positions_of(segments: Int[Array, "batch length"]) -> Int[Array, "batch length"]:
    """Each token's place in its sequence: 0 where a segment begins."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
    before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    start = jax.lax.cummax(jnp.where(segments != before, index, 0), axis=1)
    return index - start


def _reaches(config: Config) -> tuple[int, ...]:
    """How far each layer sees; () where the configuration names no windows."""
    return tuple(window or FOREVER for window in config.windows)


def _windows(config: Config) -> jax.Array | None:
    """(layers,): how far each layer sees, scanned as data; None where all see everything."""
    if not any(config.windows):
        return None
    return jnp.asarray(_reaches(config), jnp.int32)


def _rematerialized(body: Any, remat: str) -> Any:
    if remat == "none":
        return body
    kept = {"full": (), "dots": (KEPT, "attention_output", "attention_log_sum_exp")}[remat]
    policy = jax.checkpoint_policies.save_only_these_names(SMALL, *kept)
    return jax.checkpoint(body, prevent_cse=False, policy=policy)


def _embed(config: Config, params: Params, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    x = take(bind(params["embed"]["embedding"], params), tokens).astype(config.dtype)
    if config.embedding_scale != 1.0:
        x = x * jnp.asarray(config.embedding_scale, x.dtype)
    if config.positions == "learned":
        x = x + take(bind(params["positions"]["embedding"], params), positions).astype(x.dtype)
    return constrain(x, "residual")


def _norm(config: Config, norm: Params, x: jax.Array) -> jax.Array:
    if config.norm == "layer":
        return layer_norm(x, norm["scale"], norm["bias"], epsilon=config.norm_epsilon)
    return rms_norm(x, norm["scale"], epsilon=config.norm_epsilon, offset=config.norm_offset)


def _normalized(config: Config, norm: Params, x: jax.Array) -> jax.Array:
    """What a kernel reads: where `tensor` divides the kernel, and the residual's length, all places of a row's part."""
    return constrain(_norm(config, norm, x), "normalized")


def _project(
    prepare: Any, layer: Params, names: Sequence[str], *inputs: jax.Array
) -> list[jax.Array]:
    """`prepare(*inputs) @ kernel + bias` for each named projection of the layer.

    Kept for the backward pass are the inputs and, of what the weights mark by `keep`, what it asks for: not the
    products, as a rule. What `prepare` gives (a norm's or an activation's output) is made again there. Kernels
    are gathered from their shards in here, so that they are gathered again rather than kept whole, layer by layer.
    """

    def products(*inputs: jax.Array) -> list[jax.Array]:
        kernels = gather({name: {"kernel": layer[name]["kernel"]} for name in names})
        return contract_each(prepare(*inputs), [kernels[name]["kernel"] for name in names])

    policy = jax.checkpoint_policies.save_only_these_names(KEPT, NARROW, SMALL)
    outputs = jax.checkpoint(products, prevent_cse=False, policy=policy)(*inputs)
    for place, (y, name) in enumerate(zip(outputs, names, strict=True)):
        if "bias" in layer[name]:
            outputs[place] = y + jnp.broadcast_to(layer[name]["bias"].astype(y.dtype), y.shape)
    return outputs


def _block(
    config: Config,
    params: Params,
    layer: Params,
    window: jax.Array | None,
    x: jax.Array,
    segments: jax.Array,
    positions: jax.Array,
    branches: Branches | None = None,
    past: tuple[jax.Array, ...] | None = None,
) -> Any:
    """One layer: `x + attention(norm(x))`, then `x + feed_forward(norm(x))`; with `past`, keys and values too."""
    layer = bind(layer, params)
    x = constrain(x, "residual")
    norm = functools.partial(_normalized, config, layer["attention_norm"])
    places = (segments, positions, branches, past)
    y, *written = _attend(config, layer["attention"], norm, window, x, *places)
    x = x + (_norm(config, layer["post_attention_norm"], y) if config.post_norms else y)
    x = constrain(x, "residual")
    norm = functools.partial(_normalized, config, layer["mlp_norm"])
    y = _feed_forward(config, layer["mlp"], norm, x)
    x = x + (_norm(config, layer["post_mlp_norm"], y) if config.post_norms else y)
    x = constrain(x, "residual")
    return (x, *written) if written else x


def _attend(
    config: Config,
    layer: Params,
    norm: Any,
    window: jax.Array | None,
    x: jax.Array,
    segments: jax.Array,
    positions: jax.Array,
    branches: Branches | None,
    past: tuple[jax.Array, ...] | None,
) -> tuple[jax.Array, ...]:
    query, key, value = _query_key_value(config, layer, norm, x)
    scale = config.query_scale
    if config.positions == "rotary":
        scaling = dict(config.rope_scaling)
        frequencies, factor = rope_frequencies(
            config.head_dim, config.rope_theta, scaling, config.max_length
        )
        # The rotation is computed in float32: the scale is rounded with its result, not once more.
        query, scale = rotary(query, positions, frequencies, factor * scale), 1.0
        key = rotary(key, positions, frequencies, factor)
    settings: dict[str, Any] = {
        "softcap": config.attention_softcap,
        "scale": scale,
        "window": window,
    }
    written: tuple[jax.Array, ...] = ()
    if past is not None:
        keys, values, number, seen, index = past
        keys = _written(keys, key, number, index)
        values = _written(values, value, number, index)
        written = (keys, values)
        key, value = keys[number], values[number]
        y = attention_reference(query, key, value, segments, seen, offset=index, **settings)
        y = joined_heads(constrain(y, "heads"))
    elif sizes_in_force()["context"] > 1:
        y = ring_attention(query, key, value, segments, segments, branches=branches, **settings)
        y = joined_heads(constrain(y, "heads"))
    else:
        settings |= {"branches": branches, "windows": tuple(sorted(set(_reaches(config))))}
        y = joined_attention(query, key, value, segments, segments, **settings)
    y = constrain(y, "joined_heads")
    return (row_parallel_output(_project(lambda y: y, layer, ["o_proj"], y)[0]), *written)


def _written(cache: jax.Array, new: jax.Array, layer: jax.Array, index: jax.Array) -> jax.Array:
    """The cache (layers, batch, key_heads, length, head_dim) with a layer's new keys or values at an index."""
    zero = jnp.zeros((), jnp.int32)
    start = (layer, zero, zero, jnp.asarray(index, jnp.int32), zero)
    return jax.lax.dynamic_update_slice(cache, new[None].astype(cache.dtype), start)


def _query_key_value(
    config: Config, layer: Params, norm: Any, x: jax.Array
) -> tuple[jax.Array, ...]:
    """(batch, heads, length, head_dim) each, from one fused kernel or from three."""
    sizes = (config.heads, config.key_heads, config.key_heads)
    if config.fused_qkv:
        ends = [config.head_dim * sum(sizes[:i]) for i in (1, 2)]
        parts = jnp.split(_project(norm, layer, ["qkv_proj"], x)[0], ends, axis=-1)
    else:
        parts = _project(norm, layer, ("q_proj", "k_proj", "v_proj"), x)
    split = map(split_heads, parts, sizes)
    return tuple(constrain(part, "heads") for part in split)


def _feed_forward(config: Config, layer: Params, norm: Any, x: jax.Array) -> jax.Array:
    names = ("gate_proj", "up_proj") if config.gated else ("up_proj",)
    wide = _project(norm, layer, names, x)
    wide = [constrain(part, "feed_forward") for part in wide]
    act = functools.partial(gated if config.gated else activate, activation=config.activation)
    return row_parallel_output(_project(act, layer, ["down_proj"], *wide)[0])


def initial_params(config: Config, key: jax.Array, dtype: Any = jnp.float32) -> dict[str, Any]:
    """A fresh decoder: kernels and embeddings N(0, 0.02), projections into the residual N(0, 0.02 / sqrt(2 layers))."""
    keys = iter(jax.random.split(key, 16))
    residual = 0.02 / math.sqrt(2 * config.layers)

    def kernel(rows: int, columns: int, bias: bool, deviation: float = 0.02) -> dict[str, Any]:
        drawn = jax.random.normal(next(keys), (config.layers, rows, columns), dtype)
        zeros = {"bias": jnp.zeros((config.layers, columns), dtype)} if bias else {}
        return {"kernel": drawn * jnp.asarray(deviation, dtype), **zeros}

    def norm(*stack: int) -> dict[str, Any]:
        scale = jnp.full((*stack, config.hidden), 1.0 - config.norm_offset, dtype)
        return {"scale": scale} | (
            {"bias": jnp.zeros_like(scale)} if config.norm == "layer" else {}
        )

    def embedding(rows: int) -> dict[str, Any]:
        drawn = jax.random.normal(next(keys), (rows, config.hidden), dtype)
        return {"embedding": drawn * jnp.asarray(0.02, dtype)}

    hidden, wide = config.hidden, config.heads * config.head_dim
    narrow = config.key_heads * config.head_dim
    bias = config.attention_bias
    if config.fused_qkv:
        attend = {"qkv_proj": kernel(hidden, wide + 2 * narrow, bias)}
    else:
        outs = {"q_proj": wide, "k_proj": narrow, "v_proj": narrow}
        attend = {name: kernel(hidden, out, bias) for name, out in outs.items()}
    attend["o_proj"] = kernel(wide, hidden, config.output_bias, residual)
    wide_names = ("gate_proj", "up_proj") if config.gated else ("up_proj",)
    mlp = {name: kernel(hidden, config.intermediate, config.mlp_bias) for name in wide_names}
    mlp["down_proj"] = kernel(config.intermediate, hidden, config.mlp_bias, residual)
    norms = ["attention_norm", "mlp_norm"]
    norms += ["post_attention_norm", "post_mlp_norm"] if config.post_norms else []
    layers = {"attention": attend, "mlp": mlp} | {name: norm(config.layers) for name in norms}
    params = {"embed": embedding(config.vocabulary), "layers": layers, "final_norm": norm()}
    if config.positions == "learned":
        params["positions"] = embedding(config.max_length)
    head = jax.random.normal(next(keys), (hidden, config.vocabulary), dtype) * jnp.asarray(
        0.02, dtype
    )
    return params | {"head": {"kernel": tied_head(config, dtype) if config.tied else head}}


def tied_head(config: Config, dtype: Any) -> Tied:
    """What stands at `head/kernel` where the embedding is the head."""
    shape = (config.hidden, config.vocabulary)
    return Tied(path=("embed", "embedding"), head_shape=shape, head_dtype=jnp.dtype(dtype))
