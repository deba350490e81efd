"""A head that is the embedding transposed: a leaf of the tree without an array of its own."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.weights.base import (
    Weight,
    base_of,
    contract,
    contract_transposed,
    materialize,
    static,
    weight,
)


@weight
class Transposed(Weight):
    """`x W.T` for a weight W (in, out): what a tied head is once bound.

    Attributes:
        base: the embedding (vocabulary, hidden).
    """

    base: Any

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, rows, columns = self.base.shape
        return (*stack, columns, rows)

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def contract(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        return contract_transposed(x, self.base)

    def contract_transposed(self, x: Float[Array, "... out"]) -> Float[Array, "... in"]:
        return contract(x, self.base)

    def materialize(self) -> Float[Array, "... in out"]:
        return jnp.swapaxes(materialize(self.base), -1, -2)


@weight
class Tied(Weight):
    """Stands at `head/kernel` of a model whose embedding serves as its head, and holds no array.

    It gives the head a path, so that patterns, adapters and shardings name it as they name any kernel.
    An adapter on the embedding acts in the head only where it says `tie_adapters`, as in PEFT.

    Attributes:
        path: where the embedding stands in the tree, as keys.
        head_shape: (hidden, vocabulary).
        head_dtype: the embedding's.
    """

    path: tuple[str, ...] = static()
    head_shape: tuple[int, ...] = static()
    head_dtype: Any = static()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.head_shape

    @property
    def dtype(self) -> Any:
        return self.head_dtype

    def bind(self, params: Mapping[str, Any]) -> Transposed:
        embedding = self._embedding(params)
        tied = getattr(embedding, "tie_adapters", True)
        return Transposed(embedding if tied else base_of(embedding))

    def merged(self, params: Mapping[str, Any]) -> Any:
        bound = self.bind(params)
        return self if bound.base is self._embedding(params) else materialize(bound)

    def _embedding(self, params: Mapping[str, Any]) -> Any:
        return functools.reduce(lambda tree, key: tree[key], self.path, params)


def is_tied_head(leaf: Any) -> bool:
    """Whether the leaf is a head that has no array of its own."""
    return isinstance(leaf, Tied)
