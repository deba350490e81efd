"""Paths and patterns over a parameter tree: the one vocabulary in which leaves are named.

A leaf's path is the names on the way to it, joined by "/": `layers/attention/q_proj/kernel`; a part of
a weight is named like a dictionary entry: `layers/attention/q_proj/kernel/a`. A pattern is a run of
glob components that stands somewhere in the path: `q_proj`, `attention/*`, `*_norm`, `q_proj/kernel/a`.
A list of (pattern, value) is read from the top, and the first match wins.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from jaxft.errors import UserError, nearest

PyTree = Any
LAYERS = ("layers", "layers_*")  # the segments of a decoder: patterns of top-level names
Patterns = Sequence[tuple[str, Any]]


def _is_hole(leaf: Any) -> bool:
    return leaf is None


def path_string(path: Sequence[Any]) -> str:
    """Joins a JAX key path by "/".

    >>> path_string((jax.tree_util.DictKey("layers"), jax.tree_util.GetAttrKey("a")))
    'layers/a'
    """
    return "/".join(
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    )


def flatten_with_paths(
    tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[str, Any]]:
    """Lists (path, leaf) in the tree's order.

    >>> flatten_with_paths({"b": 1, "a": {"kernel": 2}})
    [('a/kernel', 2), ('b', 1)]
    """
    return [
        (path_string(path), leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    ]


def map_with_paths(
    function: Callable[..., Any],
    tree: PyTree,
    *rest: PyTree,
    is_leaf: Callable[[Any], bool] | None = None,
) -> PyTree:
    """`jax.tree.map` whose function also gets the path, first."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(path_string(path), *leaves), tree, *rest, is_leaf=is_leaf
    )


def matches(pattern: str, path: str) -> bool:
    """Tells whether the pattern's components stand side by side somewhere in the path.

    >>> matches("q_proj", "layers/attention/q_proj/kernel")
    True
    >>> matches("attention/*/kernel", "layers/attention/q_proj/kernel")
    True
    >>> matches("attention/kernel", "layers/attention/q_proj/kernel")
    False
    """
    wanted, found = pattern.strip("/").split("/"), path.split("/")
    return any(
        all(map(fnmatch.fnmatchcase, found[start : start + len(wanted)], wanted))
        for start in range(len(found) - len(wanted) + 1)
    )


def in_layers(path: str, stacked: Sequence[str] = LAYERS) -> bool:
    """Whether a path leads into a segment of a decoder, whose leaves have a leading axis of layers.

    >>> [in_layers(path) for path in ("layers/mlp/a", "layers_1/mlp/a", "head/kernel")]
    [True, True, False]
    """
    return any(fnmatch.fnmatchcase(path.split("/")[0], pattern) for pattern in stacked)


def layer_starts(tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, int]:
    """{segment: the number of its first layer in the model}: segments follow one another by their number.

    >>> import numpy as np
    >>> layer_starts({"layers_1": np.ones((2, 4)), "layers_0": np.ones((3, 4)), "head": np.ones(4)})
    {'layers_0': 0, 'layers_1': 3}
    """
    counts: dict[str, int] = {}
    for path, leaf in flatten_with_paths(tree, is_leaf):
        if in_layers(path) and len(leaf.shape):
            counts.setdefault(path.split("/")[0], leaf.shape[0])
    starts, start = {}, 0
    for name in sorted(counts, key=lambda name: int(name.partition("_")[2] or 0)):
        starts[name], start = start, start + counts[name]
    return starts


def first_match(patterns: Patterns, path: str, default: Any = None) -> Any:
    """The value of the first pattern that matches the path, else `default`."""
    return next((value for pattern, value in patterns if matches(pattern, path)), default)


# Modules by Hugging Face's names, where ours is another.
HUGGING_FACE = {"embed_tokens": "embed", "wte": "embed", "lm_head": "head", "norm": "final_norm"}
HUGGING_FACE |= {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}


def require_matches(patterns: Iterable[str], paths: Sequence[str], where: str) -> None:
    """Raises UserError for a pattern that matches no path, naming the nearest components and paths."""
    for pattern in patterns:
        if not any(matches(pattern, path) for path in paths):
            last = pattern.strip("/").split("/")[-1]
            components = dict.fromkeys(part for path in paths for part in path.split("/"))
            ours = HUGGING_FACE.get(pattern.split(".")[-1], "")
            known = f"; here it is {ours!r}" if ours in components else ""
            hint = known or nearest(pattern, paths) or nearest(last, components)
            raise UserError(
                f"{where}: {pattern!r} matches nothing{hint or '; there are: ' + ', '.join(paths[:12])}"
            )


def label(tree: PyTree, patterns: Patterns, default: Any = None) -> PyTree:
    """A tree of the same structure with, for each leaf, the first matching pattern's value.

    >>> label({"norm": 0, "q_proj": {"kernel": 0}}, [("kernel", "decay")], "none")
    {'norm': 'none', 'q_proj': {'kernel': 'decay'}}
    """
    return map_with_paths(lambda path, _: first_match(patterns, path, default), tree)


def partition(tree: PyTree, patterns: Patterns) -> tuple[PyTree, PyTree]:
    """Splits a tree in two of the same shape with holes (None): where the patterns say True, and the rest.

    >>> partition({"a": 1, "w": 2}, [("a", True)])
    ({'a': 1, 'w': None}, {'a': None, 'w': 2})
    """
    chosen = label(tree, patterns, False)
    return (
        jax.tree.map(lambda keep, leaf: leaf if keep else None, chosen, tree),
        jax.tree.map(lambda keep, leaf: None if keep else leaf, chosen, tree),
    )


def combine(*trees: PyTree) -> PyTree:
    """Fills each tree's holes from the others: the inverse of `partition`.

    Raises ValueError where two trees hold a leaf, and where none does, with its path.

    >>> combine({"a": 1, "w": None}, {"a": None, "w": 2})
    {'a': 1, 'w': 2}
    """

    def fill(path: str, *leaves: Any) -> Any:
        present = [leaf for leaf in leaves if leaf is not None]
        if len(present) != 1:
            raise ValueError(
                f"combine: {len(present)} of {len(leaves)} trees hold a leaf at {path}"
            )
        return present[0]

    return map_with_paths(fill, *trees, is_leaf=_is_hole)


def filled(tree: PyTree, other: PyTree) -> PyTree:
    """The tree with its holes filled from the other; unlike under `combine`, holes in common stay and the tree wins.

    >>> filled({"a": 1, "b": None, "c": None}, {"a": 2, "b": 3, "c": None})
    {'a': 1, 'b': 3, 'c': None}
    """
    return jax.tree.map(
        lambda leaf, instead: instead if leaf is None else leaf, tree, other, is_leaf=_is_hole
    )


def count(tree: PyTree) -> int:
    """How many numbers the leaves hold. Works on abstract trees."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def size_bytes(tree: PyTree) -> int:
    """How many bytes the leaves hold, all devices together. Works on abstract trees."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
