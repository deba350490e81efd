"""One layer of the decoder: attention and feed-forward, their norms, and how they are added to the residual."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxft.kernels.activations import activate, gated
from jaxft.kernels.attention import Branches, attention_reference, joined_attention
from jaxft.kernels.heads import joined_heads, split_heads
from jaxft.kernels.norms import layer_norm, rms_norm
from jaxft.kernels.remat import KEPT, NARROW, SMALL
from jaxft.kernels.ring import ring_attention
from jaxft.kernels.rotary import rotary
from jaxft.kernels.splash import FOREVER
from jaxft.kernels.tensor_parallel import row_parallel_output
from jaxft.mesh import constrain, sizes_in_force
from jaxft.models.config import Config, Rotary
from jaxft.models.frequencies import long_frequencies, rope_frequencies
from jaxft.weights import bind, contract_each
from jaxft.weights.placement import gather

Params = Mapping[str, Any]
Reach = jax.Array | None


class LayerData(NamedTuple):
    """What differs from layer to layer in data, each (layers, ...) and scanned; None where all layers are alike.

    Attributes:
        window: (layers,) how far a layer sees.
        frequencies: (layers, half) the angle per position of each pair of features; 0 in a layer that does not turn.
        factor: (layers,) of what is turned.
    """

    window: jax.Array | None
    frequencies: jax.Array | None
    factor: jax.Array | None


def layer_data(config: Config) -> LayerData:
    """The data of the layers of one segment."""
    window = jnp.asarray(_reaches(config), jnp.int32) if any(config.windows) else None
    if not config.rotaries:
        return LayerData(window, None, None)
    frequencies, factors = zip(*(_angles(config, one) for one in config.rotaries), strict=True)
    return LayerData(window, jnp.asarray(np.stack(frequencies)), jnp.asarray(factors, jnp.float32))


def _reaches(config: Config) -> tuple[int, ...]:
    """How far each layer sees; () where the configuration names no windows."""
    return tuple(window or FOREVER for window in config.windows)


def _angles(config: Config, rotary: Rotary | None) -> tuple[np.ndarray, float]:
    """(frequencies (half,), factor) of one layer."""
    size = config.rotary_dim or config.head_dim
    if rotary is None:
        return np.zeros(size // 2, np.float32), 1.0
    return rope_frequencies(size, rotary.theta, dict(rotary.scaling), config.max_length)


def reach_of(config: Config, positions: Int[Array, "batch length"]) -> Reach:
    """The largest position, by which longrope chooses its angles for the whole batch; None where nothing asks."""
    kinds = [dict(config.rope_scaling), *(dict(one.scaling) for one in config.rotaries if one)]
    return positions.max() if any(one.get("rope_type") == "longrope" for one in kinds) else None


def _rotation(config: Config, data: LayerData, reach: Reach) -> tuple[Any, Any]:
    """The frequencies and the factor of a layer."""
    if data.frequencies is not None:
        return data.frequencies, data.factor
    rotary = Rotary(config.rope_theta, config.rope_scaling)
    frequencies, factor = _angles(config, rotary)
    size = config.rotary_dim or config.head_dim
    long = long_frequencies(size, rotary.theta, dict(rotary.scaling))
    if long is None:
        return frequencies, factor
    original, beyond = long
    assert reach is not None, "`reach_of` says so before"
    return jnp.where(reach >= original, beyond, frequencies), factor


def norm_of(config: Config, norm: Params, x: jax.Array) -> jax.Array:
    """The configuration's norm of x along its last axis."""
    options = {"epsilon": config.norm_epsilon, "offset": config.norm_offset}
    if config.norm == "layer":
        return layer_norm(x, norm["scale"], norm.get("bias"), **options)
    return rms_norm(x, norm["scale"], **options)


def normalized(config: Config, norm: Params, x: jax.Array) -> jax.Array:
    """What a kernel reads: where `tensor` divides the kernel, and the residual's length, all places of a row's part."""
    return constrain(norm_of(config, norm, x), "normalized")


def _before(config: Config, layer: Params, name: str) -> Any:
    """How attention or feed-forward reads the residual."""
    if config.norm_place == "after":
        return functools.partial(constrain, name="normalized")
    return functools.partial(normalized, config, layer[name])


def _after(config: Config, layer: Params, name: str, y: jax.Array) -> jax.Array:
    """What is added to the residual."""
    if config.norm_place in ("both", "after"):
        y = norm_of(config, layer[name], y)
    scale = config.residual_scale
    return y if scale == 1.0 else y * jnp.asarray(scale, y.dtype)


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


def block(
    config: Config,
    params: Params,
    layer: Params,
    data: LayerData,
    x: Float[Array, "batch length hidden"],
    segments: Int[Array, "batch length"],
    positions: Int[Array, "batch length"],
    reach: Reach = None,
    branches: Branches | None = None,
    past: tuple[jax.Array, ...] | None = None,
) -> Any:
    """One layer: `x + attention(norm(x))`, then `x + feed_forward(norm(x))`; with `past`, keys and values too.

    Where the configuration says so, the norms stand elsewhere, or both read one norm and are added together.

    Args:
        config: of the layer's segment.
        params: the whole tree, with what the layer's weights share.
        layer: the layer's leaves.
        data: the layer's.
        x: the residual.
        segments: (batch, length) of the tokens.
        positions: (batch, length) of the tokens.
        reach: of `reach_of`.
        branches: as of `attention_reference`.
        past: (keys, values, number of the layer, segments, index) of the cache.
    """
    layer = bind(layer, params)
    x = constrain(x, "residual")
    norm = _before(config, layer, "attention_norm")
    places = (segments, positions, reach, branches, past)
    y, *written = _attend(config, layer["attention"], norm, data, x, *places)
    after = _after(config, layer, "post_attention_norm", y)
    if config.norm_place == "parallel":
        y = _feed_forward(config, layer["mlp"], norm, x)
        x = x + after + _after(config, layer, "post_mlp_norm", y)
    else:
        x = x + after
        x = constrain(x, "residual")
        norm = _before(config, layer, "mlp_norm")
        y = _feed_forward(config, layer["mlp"], norm, x)
        x = x + _after(config, layer, "post_mlp_norm", y)
    x = constrain(x, "residual")
    return (x, *written) if written else x


def _attend(
    config: Config,
    layer: Params,
    norm: Any,
    data: LayerData,
    x: jax.Array,
    segments: jax.Array,
    positions: jax.Array,
    reach: Reach,
    branches: Branches | None,
    past: tuple[jax.Array, ...] | None,
) -> tuple[jax.Array, ...]:
    query, key, value = _query_key_value(config, layer, norm, x)
    scale = config.query_scale
    if config.positions == "rotary":
        frequencies, factor = _rotation(config, data, reach)
        pairs = config.rotary_pairs
        # The rotation is computed in float32: the scale is rounded with its result, not once more.
        query, scale = rotary(query, positions, frequencies, factor, pairs, scale), 1.0
        key = rotary(key, positions, frequencies, factor, pairs)
    if config.query_growth:
        query = _grown(query, positions, *config.query_growth)
    settings: dict[str, Any] = {
        "softcap": config.attention_softcap,
        "scale": scale,
        "window": data.window,
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


def _grown(query: jax.Array, positions: jax.Array, beta: float, length: float) -> jax.Array:
    """Queries times 1 + beta log(1 + floor(position / length)): sharper scores far from the beginning (llama 4)."""
    growth = 1.0 + beta * jnp.log1p(jnp.floor(positions.astype(jnp.float32) / length))
    return query * growth.astype(query.dtype)[:, None, :, None]


def _written(cache: jax.Array, new: jax.Array, layer: jax.Array, index: jax.Array) -> jax.Array:
    """The cache (layers, batch, key_heads, length, head_dim) with a layer's new keys or values at an index."""
    zero = jnp.zeros((), jnp.int32)
    start = (layer, zero, zero, jnp.asarray(index, jnp.int32), zero)
    return jax.lax.dynamic_update_slice(cache, new[None].astype(cache.dtype), start)


def _query_key_value(
    config: Config, layer: Params, norm: Any, x: jax.Array
) -> tuple[jax.Array, ...]:
    """(batch, heads, length, head_dim) each, from one fused kernel or from three, normed where the family does so."""
    sizes = (config.heads, config.key_heads, config.key_heads)
    if config.fused_qkv:
        ends = [config.head_dim * sum(sizes[:i]) for i in (1, 2)]
        parts = jnp.split(_project(norm, layer, ["qkv_proj"], x)[0], ends, axis=-1)
    else:
        parts = _project(norm, layer, ("q_proj", "k_proj", "v_proj"), x)
    names = ("q_norm", "k_norm") if config.query_key_norm else ()
    if config.query_key_norm == "width":
        for place, name in enumerate(names):
            parts[place] = norm_of(config, layer[name], parts[place])
    split = [constrain(part, "heads") for part in map(split_heads, parts, sizes)]
    if config.query_key_norm in ("head", "heads"):
        for place, name in enumerate(names):
            split[place] = norm_of(config, _by_head(layer[name]), split[place])
    return tuple(split)


def _by_head(norm: Params) -> Params:
    """A norm's scale as it stands beside heads: (head_dim,), or (heads, 1, head_dim) where each has its own."""
    return {name: leaf if leaf.ndim == 1 else leaf[:, None, :] for name, leaf in norm.items()}


def _feed_forward(config: Config, layer: Params, norm: Any, x: jax.Array) -> jax.Array:
    if config.fused_gate_up:
        wide = jnp.split(_project(norm, layer, ["gate_up_proj"], x)[0], 2, axis=-1)
    else:
        names = ("gate_proj", "up_proj") if config.gated else ("up_proj",)
        wide = _project(norm, layer, names, x)
    wide = [constrain(part, "feed_forward") for part in wide]
    act = functools.partial(gated if config.gated else activate, activation=config.activation)
    return row_parallel_output(_project(act, layer, ["down_proj"], *wide)[0])
