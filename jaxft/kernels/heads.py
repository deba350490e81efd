"""Heads split from one width, and concatenated into one."""

from __future__ import annotations

from jax.lax import optimization_barrier
from jaxtyping import Array, Float

from jaxft.kernels.platform import by_platform

TILE = 8  # rows that a TPU keeps together


def split_heads(
    x: Float[Array, "batch length width"], heads: int
) -> Float[Array, "batch heads length head_dim"]:
    """The heads of a width of heads * head_dim, one after the other.

    A TPU keeps 8 rows of 128 numbers together. Rows are cut into eights there, so that this moves such tiles once;
    the compiler else transposes tiles, and again back.
    """
    batch, length, width = x.shape

    def plain(x: Array) -> Array:
        return x.reshape(batch, length, heads, width // heads).transpose(0, 2, 1, 3)

    def by_tiles(x: Array) -> Array:
        tiles = x.reshape(batch, length // TILE, TILE, heads, width // heads)
        tiles = optimization_barrier(tiles).transpose(0, 3, 1, 2, 4)
        return tiles.reshape(batch, heads, length, width // heads)

    return plain(x) if length % TILE else by_platform(x, tpu=by_tiles, default=plain)


def joined_heads(
    x: Float[Array, "batch heads length head_dim"],
) -> Float[Array, "batch length width"]:
    """The inverse of `split_heads`."""
    batch, heads, length, head_dim = x.shape

    def plain(x: Array) -> Array:
        return x.transpose(0, 2, 1, 3).reshape(batch, length, heads * head_dim)

    def by_tiles(x: Array) -> Array:
        tiles = x.reshape(batch, heads, length // TILE, TILE, head_dim).transpose(0, 2, 3, 1, 4)
        return optimization_barrier(tiles).reshape(batch, length, heads * head_dim)

    return plain(x) if length % TILE else by_platform(x, tpu=by_tiles, default=plain)
