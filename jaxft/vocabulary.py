"""The vocabulary of a tree: how many tokens it has, room for further ones, and the tokens whose rows train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxft.errors import UserError, nearest
from jaxft.tree import PyTree, flatten_with_paths, map_with_paths, matches
from jaxft.weights import (
    bare,
    is_adapter,
    is_tied_head,
    is_weight,
    materialize,
    token_rows,
    widened,
)

EMBEDDING, HEAD = "embed/embedding", "head/kernel"
LAYER_INPUTS = "layer_embed"
WHERE = "method.trainable_token_indices"
Tokens = Sequence[int] | Mapping[str, Sequence[int]]


def size_of(params: PyTree) -> int:
    """How many tokens the tree's embedding has rows for. Works on abstract trees."""
    return int(_matrices(params)[EMBEDDING].shape[0])


def with_room(params: PyTree, size: int, *, dense: bool = False) -> PyTree:
    """The tree with rows for `size` tokens in embedding and head, the new ones the mean of the others.

    Args:
        params: a tree without adapters there.
        size: tokens; a tree that has as many stays as it is.
        dense: make plain arrays, which train as a whole, rather than a base that stays and rows behind it.

    Raises:
        UserError: the layers have inputs of each token of their own, of which a new token has none.
    """
    before = size_of(params)
    size = max(size, before)
    if size > before and LAYER_INPUTS in params:
        raise UserError(
            f"{LAYER_INPUTS}: the layers of this model have inputs of their own for each of its {before} tokens, and a "
            "new token would have none: take tokens that are there (method.trainable_token_indices)"
        )
    made = {path: widened(leaf, size, path == HEAD) for path, leaf in _matrices(params).items()}
    if dense:
        made = {
            path: leaf if is_tied_head(leaf) else materialize(leaf) for path, leaf in made.items()
        }
    return _put(params, made)


def by_path(tokens: Tokens, params: PyTree) -> dict[str, tuple[int, ...]]:
    """{path of the embedding or the head: the tokens whose rows train there}.

    Args:
        tokens: ids, of the embedding (and of a head tied to it, as in PEFT); or {pattern: ids}.
        params: the tree.

    Raises:
        UserError: a pattern that means neither, or an id that the tree has no row for.
    """
    if not isinstance(tokens, Mapping):
        tokens = {EMBEDDING: tokens} if tokens else {}
    there = _matrices(params)
    found: dict[str, tuple[int, ...]] = {}
    for pattern, ids in tokens.items():
        meant = [path for path in there if matches(pattern, path)]
        if not meant:
            raise UserError(
                f"{WHERE}: {pattern!r} is neither the embedding nor the head{nearest(pattern, there)}"
            )
        found |= dict.fromkeys(meant, checked(ids, WHERE))
    size = size_of(params)
    for ids in found.values():
        if max(ids, default=0) >= size:
            raise UserError(
                f"{WHERE}: {max(ids)} is no token of the model, which has rows for {size}: config.data.add_tokens adds "
                "tokens"
            )
    return {path: ids for path, ids in found.items() if ids}


def checked(ids: Sequence[int], where: str) -> tuple[int, ...]:
    """The ids of tokens. Raises UserError for a negative one, and for one that is named twice."""
    for token in ids:
        if token < 0:
            raise UserError(f"{where}: {token} is no token: ids begin at 0")
    if len(set(ids)) < len(ids):
        twice = next(token for token in ids if list(ids).count(token) > 1)
        raise UserError(f"{where}: the token {twice} is named twice")
    return tuple(ids)


def training_tokens(
    params: PyTree,
    tokens: Mapping[str, Sequence[int]],
    *,
    rows: Mapping[str, Any] | None = None,
    dtype: Any = jnp.float32,
) -> PyTree:
    """The tree in which the rows of these tokens are parts of their own, which train (`TokenRows`).

    Where the head is the embedding transposed the embedding's rows act there too, as in PEFT, unless the head has rows
    of its own for other tokens.

    Args:
        params: a tree that has room for them.
        tokens: of `by_path`.
        rows: {path: (tokens, hidden)}, by default those that stand there.
        dtype: of the rows.

    Raises:
        UserError: the matrix has an adapter.
    """
    leaves, wanted = _matrices(params), dict(tokens)
    tied = is_tied_head(bare(leaves.get(HEAD)))
    same = EMBEDDING in wanted and sorted(wanted[EMBEDDING]) == sorted(wanted.get(HEAD, ()))
    if tied and same:
        del wanted[HEAD]
    made = {}
    for path, ids in wanted.items():
        if is_adapter(leaves[path]):
            raise UserError(
                f"{WHERE}: {path} is adapted; PEFT's format holds its adapter or the rows of tokens, not both: leave "
                "it out of the targets"
            )
        made[path] = token_rows(
            leaves[path],
            ids,
            params,
            rows=None if rows is None else rows[path],
            dtype=dtype,
            head=path == HEAD,
            tie_adapters=not (tied and HEAD in wanted),
        )
    return _put(params, made)


def _matrices(params: PyTree) -> dict[str, Any]:
    """The embedding and the head, each by its path, whatever stands there."""
    found = {
        path: leaf
        for path, leaf in flatten_with_paths(params, is_leaf=is_weight)
        if path in (EMBEDDING, HEAD)
    }
    if EMBEDDING not in found:
        raise UserError(f"{WHERE}: the tree has no {EMBEDDING}, whose rows are those of tokens")
    return found


def _put(params: PyTree, made: Mapping[str, Any]) -> PyTree:
    return map_with_paths(lambda path, leaf: made.get(path, leaf), params, is_leaf=is_weight)
