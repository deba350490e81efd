"""Adapted trees over one base given one structure, so that they can be stacked; and each its own again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.tree import PyTree, flatten_with_paths
from jaxft.weights.base import is_adapter, is_weight, replace
from jaxft.weights.saved import SAVED


def common_tree(trees: Sequence[PyTree]) -> PyTree:
    """A tree of shapes that holds each of several adapted trees of one method over one base.

    They may also be parts of such trees, with holes. A kernel is adapted where any of them adapts it, by arrays as
    large as the largest. Zeros in the rest are exact, and stay so in training: a padded entry, and an adapter of
    nothing but zeros, get a gradient of zero.
    """
    whole = lambda leaf: leaf is None or is_weight(leaf)  # noqa: E731
    trees = [{**tree} if isinstance(tree, Mapping) else tree for tree in trees]
    records = [tree.pop(SAVED) for tree in trees if isinstance(tree, dict) and SAVED in tree]
    for tree in trees if records else ():  # one for all; each has its own again by `cropped`
        tree[SAVED] = records[0]
    return jax.tree.map(lambda *leaves: _common(leaves), *trees, is_leaf=whole)


def _common(leaves: Sequence[Any]) -> Any:
    leaves = [leaf for leaf in leaves if leaf is not None]
    if not leaves:
        return None
    adapters = [leaf for leaf in leaves if is_adapter(leaf)]
    if not adapters:
        if is_weight(leaves[0]):
            return jax.tree.map(lambda part: _largest([part]), leaves[0])
        return _largest(leaves)
    first, parts = adapters[0], dict[str, Any]()
    for field in dataclasses.fields(first):
        if field.name == "base" or getattr(first, field.name) is None:
            continue
        each = [getattr(adapter, field.name) for adapter in adapters]
        if field.name == "ranks":
            parts[field.name] = tuple(max(ranks) for ranks in zip(*each, strict=True))
        elif not field.metadata.get("static"):
            parts[field.name] = _largest(each)
    base = jax.tree.map(lambda part: _largest([part]), first.base)
    return replace(first, base=base, **parts)


def _largest(arrays: Sequence[Any]) -> jax.ShapeDtypeStruct:
    shape = tuple(max(sizes) for sizes in zip(*(array.shape for array in arrays), strict=True))
    return jax.ShapeDtypeStruct(shape, arrays[0].dtype)


def padded(tree: PyTree, like: PyTree) -> PyTree:
    """A tree's arrays in the structure of `like`, zeros behind them and where the tree has none.

    Works on whole trees, on parts with holes, and on an optimizer's state over them. What fits is taken over.
    """
    own = {_bare(path): leaf for path, leaf in flatten_with_paths(tree)}

    def one(path: str, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        if path not in own:
            return jnp.zeros(shape, dtype)
        array = own[path]
        if array.shape == shape:
            return array
        more = [(0, size - known) for size, known in zip(shape, array.shape, strict=True)]
        return jnp.pad(array, more)

    leaves = [one(_bare(path), leaf.shape, leaf.dtype) for path, leaf in flatten_with_paths(like)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def cropped(tree: PyTree, like: PyTree, index: int | None = None) -> PyTree:
    """The arrays of `like` out of a tree that holds them padded: the inverse of `padded`.

    Args:
        tree: as `padded` gives it; with an `index` a stack of such.
        like: the structure and shapes that come back.
        index: in the stack.
    """
    whole = {_bare(path): leaf for path, leaf in flatten_with_paths(tree)}

    def one(path: str, shape: tuple[int, ...]) -> jax.Array:
        array = whole[path] if index is None else whole[path][index]
        return array if array.shape == shape else array[tuple(map(slice, shape))]

    leaves = [one(_bare(path), leaf.shape) for path, leaf in flatten_with_paths(like)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _bare(path: str) -> str:
    """A path in which a kernel is called the same, adapted or not."""
    return "/".join(part for part in path.split("/") if part != "base")
