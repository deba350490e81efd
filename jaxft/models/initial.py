"""A fresh decoder: the shape of its tree, and numbers to begin with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.models.config import Config
from jaxft.models.segments import attention_projections, query_key_norms, segments_of
from jaxft.weights import Tied


def initial_params(config: Config, key: jax.Array, dtype: Any = jnp.float32) -> dict[str, Any]:
    """A fresh decoder: kernels and embeddings N(0, 0.02), projections into the residual N(0, 0.02 / sqrt(2 layers))."""
    keys = _keys(key)

    def embedding(rows: int, columns: int = config.hidden) -> dict[str, Any]:
        drawn = jax.random.normal(next(keys), (rows, columns), dtype)
        return {"embedding": drawn * jnp.asarray(0.02, dtype)}

    def drawn_from(start: int) -> Iterator[jax.Array]:
        """Keys of a segment: of one alone those that go on."""
        return _keys(jax.random.fold_in(key, start)) if config.parts else keys

    layers = {
        name: _layers(own, config.layers, drawn_from(start), dtype)
        for name, start, own in segments_of(config)
    }
    params = {
        "embed": embedding(config.vocabulary),
        **layers,
        "final_norm": _norm(config, (config.hidden,), dtype),
    }
    if config.positions == "learned":
        params["positions"] = embedding(config.max_length)
    if size := config.layers * config.layer_inputs:
        params["layer_embed"] = embedding(config.layer_vocabulary, size)
        drawn = jax.random.normal(next(keys), (config.hidden, size), dtype)
        kernel = drawn * jnp.asarray(0.02, dtype)
        norm = _norm(config, (config.layer_inputs,), dtype)
        params["layer_inputs"] = {"model_proj": {"kernel": kernel}, "norm": norm}
    head = jax.random.normal(next(keys), (config.hidden, config.vocabulary), dtype) * jnp.asarray(
        0.02, dtype
    )
    return params | {"head": {"kernel": tied_head(config, dtype) if config.tied else head}}


def _keys(key: jax.Array) -> Iterator[jax.Array]:
    return iter(jax.random.split(key, 16))


def _norm(config: Config, shape: tuple[int, ...], dtype: Any, bias: bool = True) -> dict[str, Any]:
    """A norm that changes nothing but the size."""
    scale = jnp.full(shape, 1.0 - config.norm_offset, dtype)
    biased = bias and config.norm == "layer" and config.norm_bias
    return {"scale": scale} | ({"bias": jnp.zeros_like(scale)} if biased else {})


def _layers(config: Config, depth: int, keys: Iterator[jax.Array], dtype: Any) -> dict[str, Any]:
    """The stacked leaves of one segment of a decoder with `depth` layers."""
    residual = 0.02 / math.sqrt(2 * depth)

    def kernel(rows: int, columns: int, bias: bool, deviation: float = 0.02) -> dict[str, Any]:
        drawn = jax.random.normal(next(keys), (config.layers, rows, columns), dtype)
        zeros = {"bias": jnp.zeros((config.layers, columns), dtype)} if bias else {}
        return {"kernel": drawn * jnp.asarray(deviation, dtype), **zeros}

    hidden, wide = config.hidden, config.heads * config.head_dim
    narrow = config.key_heads * config.head_dim
    bias = config.attention_bias
    if config.fused_qkv:
        attend = {"qkv_proj": kernel(hidden, wide + 2 * narrow, bias)}
    else:
        outs = {"q_proj": wide, "k_proj": narrow, "v_proj": narrow}
        names = attention_projections(config)
        attend = {name: kernel(hidden, outs[name], bias) for name in names}
    attend["o_proj"] = kernel(wide, hidden, config.output_bias, residual)
    for name, heads in zip(query_key_norms(config), (config.heads, config.key_heads), strict=False):
        shape = {
            "head": (config.head_dim,),
            "heads": (heads, config.head_dim),
            "width": (heads * config.head_dim,),
        }[config.query_key_norm]
        attend[name] = _norm(config, (config.layers, *shape), dtype, bias=False)
    wide_names = ("gate_proj", "up_proj") if config.gated else ("up_proj",)
    outs = dict.fromkeys(wide_names, config.intermediate)
    outs = {"gate_up_proj": 2 * config.intermediate} if config.fused_gate_up else outs
    mlp = {name: kernel(hidden, out, config.mlp_bias) for name, out in outs.items()}
    mlp["down_proj"] = kernel(config.intermediate, hidden, config.mlp_bias, residual)
    norms = {name: _norm(config, (config.layers, hidden), dtype) for name in norm_names(config)}
    layers = {"attention": attend, "mlp": mlp} | norms
    if size := config.layer_inputs:
        output = kernel(size, hidden, False, residual)
        layers["inputs"] = {"gate_proj": kernel(hidden, size, False), "output_proj": output}
        layers["post_inputs_norm"] = _norm(config, (config.layers, hidden), dtype)
    if config.layer_scalars:
        layers["scalar"] = {"scale": jnp.ones((config.layers, 1), dtype)}
    return layers


def norm_names(config: Config) -> tuple[str, ...]:
    """The norms of a layer beside those of its queries and keys."""
    before = ("attention_norm", "mlp_norm")
    after = ("post_attention_norm", "post_mlp_norm")
    return {
        "before": before,
        "after": after,
        "both": before + after,
        "parallel": before[:1],
    }[config.norm_place]


def tied_head(config: Config, dtype: Any) -> Tied:
    """What stands at `head/kernel` where the embedding is the head."""
    shape = (config.hidden, config.vocabulary)
    return Tied(path=("embed", "embedding"), head_shape=shape, head_dtype=jnp.dtype(dtype))
