"""One layer of the decoder: attention and feed-forward, their norms, and how they are added to the residual."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxft.kernels.activations import activate, gated
from jaxft.kernels.attention import Branches, joined_attention
from jaxft.kernels.heads import joined_heads, split_heads
from jaxft.kernels.norms import layer_norm, rms_norm
from jaxft.kernels.remat import FEED_FORWARD, KEPT, NARROW, SMALL
from jaxft.kernels.ring import ring_attention
from jaxft.kernels.rotary import rotary
from jaxft.kernels.splash import FOREVER
from jaxft.kernels.tensor_parallel import row_parallel_output
from jaxft.mesh import constrain, sizes_in_force
from jaxft.models.config import Config, Rotary
from jaxft.models.frequencies import long_frequencies, rope_frequencies
from jaxft.models.segments import attention_projections, original_lengths, query_key_norms
from jaxft.weights import bind, contract_each, take
from jaxft.weights.placement import gather

Params = Mapping[str, Any]
Reach = jax.Array | None


class Past(NamedTuple):
    """A cache that a layer's new keys and values are written to, and how its queries look at it.

    Attributes:
        keys, values: (layers, batch, key_heads, length, head_dim) of a segment.
        number: of the layer in it.
        column: where along the length the new ones are written: () of all rows, or (batch,) of each; a row whose
            column lies behind the cache is then not written.
        attend: (query, keys, values, number, softcap=, scale=, window=) -> (batch, heads, length, head_dim).
    """

    keys: jax.Array
    values: jax.Array
    number: jax.Array
    column: jax.Array
    attend: Callable[..., jax.Array]


class LayerData(NamedTuple):
    """What differs from layer to layer in data, each (layers, ...) and scanned; None where all layers are alike.

    Attributes:
        window: (layers,) how far a layer sees.
        frequencies: (layers, half) the angle per position of each pair of features; 0 in a layer that does not turn.
        beyond: (layers, half) those past the original length, where longrope turns a layer.
        factor: (layers,) of what is turned.
        inputs: (layers, batch, length, features) what the tokens give each layer; see `layer_inputs`.
    """

    window: jax.Array | None
    frequencies: jax.Array | None
    beyond: jax.Array | None
    factor: jax.Array | None
    inputs: jax.Array | None = None


def layer_data(config: Config) -> LayerData:
    """The data of the layers of one segment."""
    window = jnp.asarray(_reaches(config), jnp.int32) if any(config.windows) else None
    if not config.rotaries:
        return LayerData(window, None, None, None)
    angles = [_angles(config, one) for one in config.rotaries]
    frequencies, beyond, factors = (list(parts) for parts in zip(*angles, strict=True))
    far = [plain if long is None else long for plain, long in zip(frequencies, beyond, strict=True)]
    stretched = any(long is not None for long in beyond)
    return LayerData(
        window,
        jnp.asarray(np.stack(frequencies)),
        jnp.asarray(np.stack(far)) if stretched else None,
        jnp.asarray(factors, jnp.float32),
    )


def _reaches(config: Config) -> tuple[int, ...]:
    """How far each layer sees; () where the configuration names no windows."""
    return tuple(window or FOREVER for window in config.windows)


def _angles(config: Config, rotary: Rotary | None) -> tuple[np.ndarray, np.ndarray | None, float]:
    """(frequencies (half,), those past longrope's original length, factor) of one layer."""
    size = config.rotary_dim or config.head_dim
    if rotary is None:
        return np.zeros(size // 2, np.float32), None, 1.0
    scaling = dict(rotary.scaling)
    frequencies, factor = rope_frequencies(size, rotary.theta, scaling, config.max_length)
    return frequencies, long_frequencies(size, rotary.theta, scaling), factor


def original_length(config: Config) -> int | None:
    """The length up to which longrope turns by its short factors; None where no layer is turned by longrope."""
    return max(original_lengths(config), default=None)


def reach_of(
    config: Config, segments: Int[Array, "batch length"], positions: Int[Array, "batch length"]
) -> Reach:
    """The largest position, by which longrope chooses its angles for the whole batch; None where nothing asks."""
    if original_length(config) is None:
        return None
    return jnp.max(jnp.where(segments == 0, 0, positions))


def _rotation(config: Config, data: LayerData, reach: Reach) -> tuple[Any, Any]:
    """The frequencies and the factor of a layer."""
    found: tuple[Any, Any, Any] = (data.frequencies, data.beyond, data.factor)
    if data.frequencies is None:
        found = _angles(config, Rotary(config.rope_theta, config.rope_scaling))
    frequencies, beyond, factor = found
    if beyond is None:
        return frequencies, factor
    original = original_length(config)
    assert reach is not None, "`reach_of` says so before"
    assert original is not None, "there are angles beyond it"
    return jnp.where(reach >= original, beyond, frequencies), factor


def norm_of(config: Config, norm: Params, x: jax.Array) -> jax.Array:
    """The configuration's norm of x along its last axis."""
    options = {"epsilon": config.norm_epsilon, "offset": config.norm_offset}
    if config.norm == "layer":
        return layer_norm(x, norm["scale"], norm.get("bias"), **options)
    return rms_norm(x, norm["scale"], **options)


def normalized(config: Config, norm: Params, x: jax.Array) -> jax.Array:
    """What a kernel reads: where `tensor` divides the kernel, and the residual's length, all tokens of a row's part."""
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
    for index, (y, name) in enumerate(zip(outputs, names, strict=True)):
        if "bias" in layer[name]:
            outputs[index] = y + jnp.broadcast_to(layer[name]["bias"].astype(y.dtype), y.shape)
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
    past: Past | None = None,
    given: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One layer: `x + attention(norm(x))`, then `x + feed_forward(norm(x))`; and its keys and values.

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
        past: the cache that the tokens go on from.
        given: the keys and values of another layer, where this has none of its own and there is no cache.

    Returns:
        The residual; the keys and the values of the layer, or with `past` those of the cache.
    """
    layer = bind(layer, params)
    x = constrain(x, "residual")
    norm = _before(config, layer, "attention_norm")
    located = (segments, positions, reach, branches, past, given)
    y, keys, values = _attend(config, layer["attention"], norm, data, x, *located)
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
    if config.layer_inputs:
        x = x + _from_inputs(config, layer, data, x)
    if config.layer_scalars:  # which transformers holds as a buffer, and does not train
        scalar = jax.lax.stop_gradient(layer["scalar"]["scale"]).astype(x.dtype)
        x = x * jnp.broadcast_to(scalar, x.shape)
    x = constrain(x, "residual")
    return x, keys, values


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
    past: Past | None,
    given: tuple[jax.Array, jax.Array] | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    query, *own = _query_key_value(config, layer, norm, x)
    scale = config.query_scale
    if config.positions == "rotary":
        frequencies, factor = _rotation(config, data, reach)
        pairs = config.rotary_pairs
        # The rotation is computed in float32: the scale is rounded with its result, not once more.
        query, scale = rotary(query, positions, frequencies, factor, pairs, scale), 1.0
        own[:1] = [rotary(key, positions, frequencies, factor, pairs) for key in own[:1]]
    if config.query_growth:
        query = _grown(query, positions, *config.query_growth)
    settings: dict[str, Any] = {
        "softcap": config.attention_softcap,
        "scale": scale,
        "window": data.window,
    }
    if past is not None:
        keys, values = past.keys, past.values
        if own:
            keys, values = (
                _written(cache, new, past.number, past.column)
                for cache, new in zip((keys, values), own, strict=True)
            )
        y = past.attend(query, keys, values, past.number, **settings)
        y = joined_heads(constrain(y, "heads"))
    elif sizes_in_force()["context"] > 1:
        made: Any = own or given
        keys, values = made
        y = ring_attention(query, keys, values, segments, segments, branches=branches, **settings)
        y = joined_heads(constrain(y, "heads"))
    else:
        made = own or given
        keys, values = made
        settings |= {"branches": branches, "windows": tuple(sorted(set(_reaches(config))))}
        y = joined_attention(query, keys, values, segments, segments, **settings)
    y = constrain(y, "joined_heads")
    y = row_parallel_output(_project(lambda y: y, layer, ["o_proj"], y)[0])
    return y, keys, values


def _grown(query: jax.Array, positions: jax.Array, beta: float, length: float) -> jax.Array:
    """Queries times 1 + beta log(1 + floor(position / length)): sharper scores far from the beginning (llama 4)."""
    growth = 1.0 + beta * jnp.log1p(jnp.floor(positions.astype(jnp.float32) / length))
    return query * growth.astype(query.dtype)[:, None, :, None]


def _written(cache: jax.Array, new: jax.Array, layer: jax.Array, index: jax.Array) -> jax.Array:
    """The cache (layers, batch, key_heads, length, head_dim) with a layer's new keys or values at an index.

    The index is one for all rows, or (batch,).
    """
    index, zero = jnp.asarray(index, jnp.int32), jnp.zeros((), jnp.int32)
    new = new.astype(cache.dtype)
    if index.ndim == 0:
        return jax.lax.dynamic_update_slice(cache, new[None], (layer, zero, zero, index, zero))
    rows, _, length, _ = new.shape
    columns = index[:, None] + jnp.arange(length, dtype=jnp.int32)[None, :]
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    return cache.at[layer, row, :, columns].set(new.swapaxes(1, 2), mode="drop")


def _query_key_value(
    config: Config, layer: Params, norm: Any, x: jax.Array
) -> tuple[jax.Array, ...]:
    """(batch, heads, length, head_dim) each, from one fused kernel or from three, normed where the family does so.

    Queries alone, where the keys and values are another layer's.
    """
    sizes = (config.heads, config.key_heads, config.key_heads)
    if config.fused_qkv:
        ends = [config.head_dim * sum(sizes[:i]) for i in (1, 2)]
        parts = jnp.split(_project(norm, layer, ["qkv_proj"], x)[0], ends, axis=-1)
    else:
        parts = _project(norm, layer, attention_projections(config), x)
    names = query_key_norms(config)
    if config.query_key_norm == "width":
        for index, name in enumerate(names):
            parts[index] = norm_of(config, layer[name], parts[index])
    split = [
        constrain(split_heads(part, heads), "heads")
        for part, heads in zip(parts, sizes, strict=False)
    ]
    if config.keys_are_values:
        split += split[1:]
    if config.query_key_norm in ("head", "heads"):
        for index, name in enumerate(names):
            split[index] = norm_of(config, _by_head(layer[name]), split[index])
    if config.value_norm:
        split[2:] = [rms_norm(value, None, epsilon=config.norm_epsilon) for value in split[2:]]
    return tuple(split)


def _by_head(norm: Params) -> Params:
    """A norm's scale as it stands beside heads: (head_dim,), or (heads, 1, head_dim) where each has its own."""
    return {name: leaf if leaf.ndim == 1 else leaf[:, None, :] for name, leaf in norm.items()}


def layer_inputs(
    config: Config, params: Params, tokens: Int[Array, "batch length"], x: jax.Array
) -> Float[Array, "layers batch length features"] | None:
    """What the tokens give each layer: a row of a table of their own, and a projection of the embedded tokens.

    Args:
        config: the whole decoder's; None comes back where its layers take no such inputs.
        params: the whole tree.
        tokens: the ids.
        x: the embedded tokens (batch, length, hidden).
    """
    if not config.layer_inputs:
        return None
    size = config.layer_inputs
    own = take(bind(params["layer_embed"]["embedding"], params), tokens).astype(x.dtype)
    parts = bind(params["layer_inputs"], params)
    read = functools.partial(constrain, name="normalized")
    projected = _project(read, parts, ["model_proj"], x)[0]
    projected = projected * jnp.asarray(config.hidden**-0.5, x.dtype)
    shape = (*tokens.shape, config.layers, size)
    projected = norm_of(config, parts["norm"], projected.reshape(shape))
    both = projected + own.reshape(shape) * jnp.asarray(size**0.5, x.dtype)
    return (both * jnp.asarray(2.0**-0.5, x.dtype)).transpose(2, 0, 1, 3)


def _from_inputs(config: Config, layer: Params, data: LayerData, x: jax.Array) -> jax.Array:
    """What a layer adds for its inputs: `norm((act(x W) * inputs) V)`."""
    parts = layer["inputs"]
    assert data.inputs is not None, "`layer_inputs` gives them"
    gate = _project(functools.partial(constrain, name="normalized"), parts, ["gate_proj"], x)[0]
    wide = [constrain(part, "feed_forward") for part in (gate, data.inputs)]
    act = functools.partial(gated, activation=config.activation)
    y = row_parallel_output(_project(act, parts, ["output_proj"], *wide)[0])
    return norm_of(config, layer["post_inputs_norm"], y)


def _feed_forward(config: Config, layer: Params, norm: Any, x: jax.Array) -> jax.Array:
    if config.fused_gate_up:
        wide = jnp.split(_project(norm, layer, ["gate_up_proj"], x)[0], 2, axis=-1)
    else:
        names = ("gate_proj", "up_proj") if config.gated else ("up_proj",)
        wide = _project(norm, layer, names, x)
    wide = [constrain(part, "feed_forward") for part in wide]
    act = functools.partial(gated if config.gated else activate, activation=config.activation)
    y = row_parallel_output(_project(act, layer, ["down_proj"], *wide)[0])
    return checkpoint_name(y, FEED_FORWARD)
