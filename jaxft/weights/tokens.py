"""Rows of a vocabulary: more of them than a base has, and some of them trained in the base's place.

A vocabulary's matrix is an embedding (vocabulary, hidden) or a head (hidden, vocabulary), of which the rows of tokens
are the columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxft.weights.base import (
    Adapter,
    Peft,
    PeftLayer,
    Weight,
    bind,
    contract,
    contract_transposed,
    materialize,
    replace,
    static,
    take,
    weight,
)
from jaxft.weights.tied import Tied

TOKENS_PART = "token_adapter.trainable_tokens_delta"


@weight
class Widened(Weight):
    """A base with rows for further tokens behind its own: what resizing a vocabulary makes, without a copy of it.

    Attributes:
        base: (vocabulary, hidden), or a head (hidden, vocabulary).
        more: (tokens, hidden), the further rows.
        head: whether the base is a head.
    """

    axes: ClassVar = {"more": ("token", "hidden")}
    base: Any
    more: Any
    head: bool = static(default=False)

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.base.shape
        more = self.more.shape[0]
        return (rows, columns + more) if self.head else (rows + more, columns)

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def take(self, ids: Int[Array, "..."]) -> Float[Array, "... hidden"]:
        size, ids = self.base.shape[0], jnp.asarray(ids)
        mine = take(self.base, ids)
        more = jnp.take(self.more, ids - size, axis=0, mode="clip").astype(mine.dtype)
        return jnp.where(_wide(ids < size, mine), mine, more)

    def contract(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        return (
            self._behind(contract(x, self.base), x)
            if self.head
            else contract(x, self.materialize())
        )

    def contract_transposed(self, x: Float[Array, "... out"]) -> Float[Array, "... in"]:
        if self.head:
            return contract_transposed(x, self.materialize())
        return self._behind(contract_transposed(x, self.base), x)

    def _behind(self, scores: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.concatenate([scores, contract_transposed(x, self.more)], axis=-1)

    def materialize(self) -> Float[Array, "in out"]:
        base = materialize(self.base)
        more = self.more.astype(base.dtype)
        return jnp.concatenate([base, more.T if self.head else more], axis=int(self.head))


@weight
class TokenRows(Adapter):
    """PEFT's `trainable_token_indices`: the rows of some tokens, trained in the place of the base's.

    Attributes:
        base: (vocabulary, hidden), or a head (hidden, vocabulary).
        rows: (tokens, hidden), the whole rows and not what they differ by.
        tokens: the ids, in the order of the rows.
        head: whether the base is a head.
        tie_adapters: on an embedding, whether a head tied to it sees these rows too.
    """

    axes: ClassVar = {"rows": ("token", "hidden")}
    trained: ClassVar = ("rows",)
    base: Any
    rows: Any
    tokens: tuple[int, ...] = static()
    head: bool = static(default=False)
    tie_adapters: bool = static(default=True)

    def take(self, ids: Int[Array, "..."]) -> Float[Array, "... hidden"]:
        ids, mine = jnp.asarray(ids), take(self.base, ids)
        order = np.argsort(np.asarray(self.tokens))
        ascending = jnp.asarray(np.asarray(self.tokens)[order], ids.dtype)
        place = jnp.searchsorted(ascending, ids, method="scan_unrolled")
        place = jnp.minimum(place, len(self.tokens) - 1)
        row = jnp.take(jnp.asarray(order, jnp.int32), place)
        found = jnp.take(self.rows, row, axis=0).astype(mine.dtype)
        return jnp.where(_wide(jnp.take(ascending, place) == ids, mine), found, mine)

    def contract(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        return (
            self._over(contract(x, self.base), x) if self.head else contract(x, self.materialize())
        )

    def contract_transposed(self, x: Float[Array, "... out"]) -> Float[Array, "... in"]:
        if self.head:
            return contract_transposed(x, self.materialize())
        return self._over(contract_transposed(x, self.base), x)

    def _over(self, scores: jax.Array, x: jax.Array) -> jax.Array:
        own = contract_transposed(x, self.rows)
        return scores.at[..., np.asarray(self.tokens)].set(own, unique_indices=True)

    def materialize(self) -> Float[Array, "in out"]:
        base, at = materialize(self.base), np.asarray(self.tokens)
        rows = self.rows.astype(base.dtype)
        return base.at[:, at].set(rows.T) if self.head else base.at[at].set(rows)

    def to_peft(self, embedding: bool = False) -> Peft | None:
        one = PeftLayer(0, 0.0, {TOKENS_PART: self.rows})
        return Peft("tokens", {0: one}, self.tokens)


def _wide(said: jax.Array, rows: jax.Array) -> jax.Array:
    """A flag a token, for each feature of its row."""
    return jnp.broadcast_to(said[..., None], rows.shape)


def widened(leaf: Any, size: int, head: bool = False) -> Any:
    """The matrix of a vocabulary with rows for `size` tokens; as it is where it has as many.

    A further row is the mean of those that are there: the logit of a token that nobody trained is then that of a
    middling one, and not the largest of all (as transformers does it, but for its noise).

    Args:
        leaf: an array or a weight (vocabulary, hidden), or a head (hidden, vocabulary), which may be tied.
        size: tokens.
        head: whether the leaf is a head.
    """
    if isinstance(leaf, Tied):
        return replace(leaf, head_shape=(leaf.shape[0], size))
    more = size - leaf.shape[1 if head else 0]
    if more <= 0:
        return leaf
    dense = materialize(leaf)
    mean = jnp.mean(dense, axis=int(head), dtype=jnp.float32).astype(dense.dtype)
    return Widened(leaf, jnp.broadcast_to(mean[None], (more, mean.shape[0])), head)


def token_rows(
    leaf: Any,
    tokens: Sequence[int],
    params: Any,
    *,
    rows: Any = None,
    dtype: Any = jnp.float32,
    head: bool = False,
    tie_adapters: bool = True,
) -> TokenRows:
    """The weight under which rows of a matrix train; they begin as they are in it.

    Args:
        leaf: as of `widened`.
        tokens: ids below the matrix's size, each once.
        params: the tree, for a head that is tied.
        rows: (tokens, hidden) in their order, in place of the base's.
        dtype: of the rows.
        head: as of `TokenRows`.
        tie_adapters: as of `TokenRows`.
    """
    if rows is None:
        at = np.asarray(tokens)
        bound = bind(leaf, params)
        rows = materialize(bound)[:, at].T if head else take(bound, jnp.asarray(at))
    rows = jnp.asarray(rows).astype(dtype)
    return TokenRows(leaf, rows, tuple(map(int, tokens)), head, tie_adapters)
