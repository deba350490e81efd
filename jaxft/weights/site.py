"""Where an adapter goes: all that a weight needs to know to be made there."""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.weights.base import is_encoded


@dataclasses.dataclass(frozen=True)
class Site:
    """A kernel that a method adapts, and the settings that hold there.

    Attributes:
        path: the kernel's path in the tree.
        base: the weight that stands there, (in, out) or (layers, in, out).
        bound: the same with what it shares with the tree filled in, so that it can be materialized.
        key: a random key of this path's own.
        ranks: the rank of each layer of a stacked kernel (0: not adapted), or one rank.
        scales: the factor s of each layer, alpha / rank or what the method makes of them.
        stacked: whether the base's first axis is that of the layers.
        contracted: how many axes of an unstacked base are contracted (1, but for other libraries' kernels).
        embedding: whether the weight is looked up rather than multiplied.
        dtype: that of the adapter's arrays.
        dropout: the rate on the adapter's input.
        tie_adapters: whether an embedding's adapter also acts in the head tied to it.
        start: the adapter's a and b, where they do not begin at random and zero.
    """

    path: str
    base: Any
    bound: Any
    key: jax.Array
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    stacked: bool
    contracted: int = 1
    embedding: bool = False
    dtype: Any = jnp.float32
    dropout: float = 0.0
    tie_adapters: bool = False
    start: tuple[Any, Any] | None = None

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(in, out) of one layer, axes flattened."""
        shape = self.base.shape[1:] if self.stacked else self.base.shape
        return math.prod(shape[: self.contracted]), math.prod(shape[self.contracted :])

    @property
    def quantized(self) -> bool:
        """Whether codes stand there."""
        return is_encoded(self.base)

    @property
    def rank(self) -> int:
        """The largest rank: that of the arrays, in which smaller ranks are padded with zeros."""
        return max(self.ranks)

    def scale(self) -> Float[Array, "*layers"]:
        """The factors as a leaf: (layers,), or () where the kernel is not stacked."""
        scales = jnp.asarray(self.scales, jnp.float32)
        return scales if self.stacked else scales[0]

    def stack(self, *shape: int) -> tuple[int, ...]:
        """`shape`, with the axis of the layers in front where the kernel is stacked."""
        return (len(self.ranks), *shape) if self.stacked else shape

    def mask(self, size: int) -> Float[Array, "*layers size"]:
        """1 at the first `rank` indices of each layer, 0 in the padding."""
        inside = jnp.arange(size)[None, :] < jnp.asarray(self.ranks)[:, None]
        return inside.astype(self.dtype) if self.stacked else inside[0].astype(self.dtype)


def key_of(key: jax.Array, path: str) -> jax.Array:
    """A key for one path, whatever other paths are drawn: adding a target changes no other's draw."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))
