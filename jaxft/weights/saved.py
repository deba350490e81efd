"""What an adapter's folder holds besides the adapters, remembered by the tree itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax

SAVED = "saved"
SHARED = ("vera", SAVED, "bank")
"""The names at the top of a tree that stand for all of it, and that no model has of itself."""

Places = tuple[tuple[str, tuple[int, ...]], ...]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Saved:
    """Says which leaves belong to the adapter though they are none: a record at `params["saved"]`, without an array.

    It is part of the tree's structure, and so goes along wherever the tree goes: through `jit`, `partition`,
    `combine`, an optimizer, a mesh. The leaves themselves stay the plain arrays that a model reads.

    Attributes:
        whole: (path, layers) of leaves saved whole, as PEFT's `modules_to_save`; () means all layers.
        beside: (path, layers) of the base's own leaves that stand in the folder too, as PEFT keeps embeddings.
        bias: which biases are saved: none, all, or only those of adapted modules.
        family: of the model, where the leaves alone do not tell their names on disk.
        modules: how the names of its modules begin, where the decoder is a part of a larger model.
        projection_seed: from which VeRA's projections were drawn.
    """

    whole: Places = ()
    beside: Places = ()
    bias: str = "none"
    family: str = ""
    modules: str = ""
    projection_seed: int = 0


def saved_in(params: Mapping[str, Any]) -> Saved:
    """The tree's record; an empty one where it has none."""
    return params[SAVED] if SAVED in params else Saved()


def remember(params: Mapping[str, Any], saved: Saved) -> dict[str, Any]:
    """The tree with the record, and as it is where there is nothing to remember."""
    return dict(params) if saved == Saved() else {**params, SAVED: saved}


def of_the_model(params: Mapping[str, Any]) -> dict[str, Any]:
    """The tree without what belongs to adapters alone; of the record its names stay."""
    tree = {name: child for name, child in params.items() if name not in SHARED}
    known = saved_in(params)
    return remember(tree, Saved(family=known.family, modules=known.modules))


def places(found: Iterable[tuple[str, int | None]], sizes: Mapping[str, int]) -> Places:
    """(path, layers) of single layers, each path once and in order; () where all of its layers are named.

    Args:
        found: (path, layer, or None where the leaf is not stacked).
        sizes: {path: how many layers}.
    """
    layers: dict[str, list[int]] = {}
    for path, layer in found:
        layers.setdefault(path, []).extend([] if layer is None else [layer])
    return tuple(
        (path, () if len(set(of)) == sizes[path] else tuple(sorted(set(of))))
        for path, of in sorted(layers.items())
    )
