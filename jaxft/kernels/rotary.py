"""Rotary positions: pairs of a head's features turned by an angle that grows with the position."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxft.kernels.platform import by_platform

PAIRS = ("halves", "neighbours")


def rotary(
    x: Float[Array, "batch heads length head_dim"],
    positions: Int[Array, "batch length"],
    frequencies: Float[Array, " half"] | np.ndarray,
    attention_factor: float | Float[Array, ""] = 1.0,
    pairs: str = "halves",
    scale: float = 1.0,
) -> Float[Array, "batch heads length head_dim"]:
    """Rotates pairs of features of x by position * frequencies[i] (arXiv 2104.09864), times a scale.

    The first 2 * half features of a head are rotated, the others pass. Computed in float32, returned in x's dtype.

    Args:
        x: queries or keys.
        positions: of each token.
        frequencies: the angle per position of each pair.
        attention_factor: multiplies what is rotated (yarn).
        pairs: "halves": features i and i + half, as in transformers' llama; "neighbours": 2 i and 2 i + 1.
        scale: multiplies everything.
    """
    angles = (
        positions.astype(jnp.float32)[:, None, :, None]
        * jnp.asarray(frequencies)[None, None, None, :]
    )
    factor = attention_factor * scale
    cosine, sine = jnp.cos(angles) * factor, jnp.sin(angles) * factor
    size = 2 * angles.shape[-1]
    if size == x.shape[-1]:
        return _rotated(x, cosine, sine, pairs)
    turned, rest = x[..., :size], x[..., size:]
    rest = rest if scale == 1.0 else (rest.astype(jnp.float32) * scale).astype(x.dtype)
    return jnp.concatenate([_rotated(turned, cosine, sine, pairs), rest], axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _rotated(x: Array, cosine: Array, sine: Array, pairs: str) -> Array:
    """Linear in x; its transpose is the rotation back."""
    if pairs == "neighbours":
        return by_platform(x, cosine, sine, tpu=neighbours_by_product, default=rotated_neighbours)
    return by_platform(x, cosine, sine, tpu=rotated_by_product, default=rotated_by_halves)


def _rotated_forward(
    x: Array, cosine: Array, sine: Array, pairs: str
) -> tuple[Array, tuple[Array, Array]]:
    return _rotated(x, cosine, sine, pairs), (cosine, sine)


def _rotated_backward(
    pairs: str, kept: tuple[Array, Array], cotangent: Array
) -> tuple[Array, None, None]:
    cosine, sine = kept
    return _rotated(cotangent, cosine, -sine, pairs), None, None


_rotated.defvjp(_rotated_forward, _rotated_backward)


def rotated_by_halves(x: Array, cosine: Array, sine: Array) -> Array:
    """The rotation of `rotary`, by angles (batch, 1, length, head_dim / 2)."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cosine - second * sine, second * cosine + first * sine)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def rotated_neighbours(x: Array, cosine: Array, sine: Array) -> Array:
    """The same for features that pair with their neighbour."""
    wide = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    first, second = wide[..., 0], wide[..., 1]
    rotated = (first * cosine - second * sine, second * cosine + first * sine)
    return jnp.stack(rotated, axis=-1).reshape(x.shape).astype(x.dtype)


def rotated_by_product(x: Array, cosine: Array, sine: Array) -> Array:
    """`rotated_by_halves`, bit for bit, for a TPU: halves of 64 fill half of its registers.

    The halves change places by a product with a permutation, which is exact: the rest is one pass over whole heads.
    """
    size = x.shape[-1]
    permutation = jnp.roll(jnp.eye(size, dtype=x.dtype), size // 2, axis=0)
    swapped = jnp.matmul(x, permutation, precision="highest").astype(jnp.float32)
    cosine = jnp.concatenate([cosine, cosine], axis=-1)
    sine = jnp.concatenate([-sine, sine], axis=-1)
    return (x.astype(jnp.float32) * cosine + swapped * sine).astype(x.dtype)


def neighbours_by_product(x: Array, cosine: Array, sine: Array) -> Array:
    """`rotated_neighbours`, bit for bit, for a TPU, as `rotated_by_product`."""
    size = x.shape[-1]
    order = np.arange(size) ^ 1
    permutation = jnp.eye(size, dtype=x.dtype)[order]
    swapped = jnp.matmul(x, permutation, precision="highest").astype(jnp.float32)
    signs = jnp.asarray(np.where(np.arange(size) % 2, 1.0, -1.0), jnp.float32)
    cosine, sine = (jnp.repeat(each, 2, axis=-1) for each in (cosine, sine))
    sine = sine * jnp.broadcast_to(signs, sine.shape)
    return (x.astype(jnp.float32) * cosine + swapped * sine).astype(x.dtype)
