"""Norms. Each keeps only its inputs for the backward pass and computes the rest again there.

What lies between is cheap to compute and as large as the hidden states.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(2, 3))
def _rms_norm(x: Array, scale: Array | None, epsilon: float, offset: float) -> Array:
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    if scale is None:
        return (wide * inverse).astype(x.dtype)
    factor = scale.astype(jnp.float32) + offset
    return (wide * inverse * jnp.broadcast_to(factor, x.shape)).astype(x.dtype)


def rms_norm(
    x: Float[Array, "*batch hidden"],
    scale: Float[Array, "... hidden"] | None,
    *,
    epsilon: float,
    offset: float = 0.0,
) -> Float[Array, "*batch hidden"]:
    """Root mean square norm: x / sqrt(mean(x^2) + epsilon) * (offset + scale).

    Computed in float32, returned in x's dtype. A scale of None is 1.
    `offset` is 1.0 for gemma, whose scale is stored less 1 (arXiv 1910.07467).
    """
    return _rms_norm(x, scale, epsilon, offset)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(3, 4))
def _layer_norm(x: Array, scale: Array, bias: Array | None, epsilon: float, offset: float) -> Array:
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + epsilon)
    factor = scale.astype(jnp.float32)
    factor = factor + offset if offset else factor
    scaled = centred * inverse * jnp.broadcast_to(factor, x.shape)
    if bias is None:
        return scaled.astype(x.dtype)
    return (scaled + jnp.broadcast_to(bias.astype(jnp.float32), x.shape)).astype(x.dtype)


def layer_norm(
    x: Float[Array, "*batch hidden"],
    scale: Float[Array, "... hidden"],
    bias: Float[Array, " hidden"] | None,
    *,
    epsilon: float,
    offset: float = 0.0,
) -> Float[Array, "*batch hidden"]:
    """(x - mean) / sqrt(variance + epsilon) * (offset + scale) + bias, in float32, returned in x's dtype.

    A bias of None is 0; `offset` is 1.0 for nemotron, whose scale is stored less 1.
    """
    return _layer_norm(x, scale, bias, epsilon, offset)
