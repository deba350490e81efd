"""What an adapter's folder holds besides the adapters, as tensors that are made when written.

These are the leaves that trained whole, those that the tree remembers (`weights.Saved`), and the biases.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxft.errors import UserError
from jaxft.formats.naming import slices_in
from jaxft.formats.peft_tensors import adapter_weights
from jaxft.formats.safetensors import Lazy
from jaxft.models.families import Tensor
from jaxft.runtime.processes import to_host
from jaxft.tree import PyTree, flatten_with_paths, matches, require_matches
from jaxft.vocabulary import EMBEDDING, HEAD
from jaxft.weights import Saved, bare, is_adapter, is_tied_head, is_weight, materialize, saved_in

Slices = Iterator[tuple[str, str, int | None]]


@dataclasses.dataclass(frozen=True)
class Extras:
    """{name: tensor} of each kind.

    Attributes:
        whole: modules saved whole: PEFT's `modules_to_save`.
        beside: the base's own weights.
        biases: those that `bias` means.
        bias: none, all or only (those of adapted modules).
    """

    whole: Mapping[str, Lazy]
    beside: Mapping[str, Lazy]
    biases: Mapping[str, Lazy]
    bias: str

    @property
    def tensors(self) -> dict[str, Lazy]:
        return {**self.beside, **self.whole, **self.biases}


def extras_in(
    params: PyTree,
    table: Mapping[str, Tensor],
    adapted: Mapping[str, Any],
    tokens: Mapping[str, Any],
    patterns: Sequence[str],
) -> Extras:
    """The leaves that belong to the adapter besides the adapters.

    Args:
        params: the adapted tree, whose record is heeded.
        table: {path: tensor}.
        adapted: {module: its adapter}.
        tokens: {module: the rows of tokens that train there}.
        patterns: of the leaves that trained whole.
    """
    leaves = dict(flatten_with_paths(params, is_leaf=is_weight))
    saved = saved_in(params)
    chosen = {path: layers for path, layers in saved.whole if path in table}
    chosen |= {path: () for path in _chosen(params, patterns) if path in table}
    for path in chosen:
        if table[path].each_expert:
            raise UserError(f"train_also: {path}: PEFT's format has no place for it: leave it out")
    covered = [path for path in chosen if is_adapter(leaves[path])]  # an adapter came over it
    kernels = {path for path in chosen if not path.endswith("/bias")} - {*covered}
    modules = {module for module, _, _ in _slices(kernels, chosen, table, leaves)}
    whole = _whole(modules, kernels, table, leaves)
    own = {path: layers for path, layers in saved.beside if path in table}
    own |= dict.fromkeys(covered, ())
    beside: dict[str, Lazy] = {}
    for module, path, layer in _slices(own, own, table, leaves):
        if module not in modules:
            inner = "base_layer." if module in adapted else ""
            inner = "token_adapter.base_layer." if module in tokens else inner
            beside |= _own(leaves, module, path, layer, table[path], inner)
    trained = {path for path in chosen if path.endswith("/bias")}
    wanted = {module for module, _, _ in _slices(trained, chosen, table, leaves)} - modules
    return Extras(whole, beside, *_biases(saved, wanted, modules, table, leaves, adapted))


def _chosen(params: PyTree, patterns: Sequence[str]) -> list[str]:
    """The leaves that the patterns mean. UserError for one below an adapter."""
    paths = [path for path, _ in flatten_with_paths(params)]
    require_matches(patterns, paths, "trained")
    chosen = [path for path in paths if any(matches(pattern, path) for pattern in patterns)]
    owners = dict(adapter_weights(params))
    for path in chosen:
        owner = next((owner for owner in owners if path.startswith(f"{owner}/")), None)
        if owner and path.removeprefix(f"{owner}/").split("/")[0] == "base":
            raise UserError(
                f"train_also: {owner} is adapted; PEFT's format holds its adapter or the "
                "whole of it, not both"
            )
    return chosen


def _slices(
    paths: Any,
    layers: Mapping[str, tuple[int, ...]],
    table: Mapping[str, Tensor],
    leaves: Mapping[str, Any],
) -> Slices:
    """(module, path, place in the stack or None) of each layer of these leaves, or of those places that are named."""
    slices = slices_in(table, leaves)
    for path in paths:
        named = layers.get(path, ())
        for module, place in slices(path):
            if not named or place in named:
                yield module, path, place


def _whole(
    modules: set[str],
    kernels: set[str],
    table: Mapping[str, Tensor],
    leaves: Mapping[str, Any],
) -> dict[str, Lazy]:
    """{name: tensor} of every leaf of these modules, and of a head tied to an embedding that trained."""
    tensors: dict[str, Lazy] = {}
    for module, path, layer in _slices(table, {}, table, leaves):
        if module in modules and not is_weight(leaves[path]):
            name = f"{module}.{_ending(table[path])}"
            tensors[name] = _slice(leaves[path], layer, table[path].transposed)
    head = leaves.get(HEAD)
    if EMBEDDING in kernels and is_tied_head(bare(head)):
        if not is_tied_head(head):
            raise UserError(
                "train_also: the embedding trains and the head tied to it is adapted, which PEFT's "
                "format cannot hold: leave one out"
            )
        tensors[table[HEAD].name] = _slice(leaves[EMBEDDING], None, False)
    return tensors


def _own(
    leaves: Mapping[str, Any],
    module: str,
    path: str,
    layer: int | None,
    tensor: Tensor,
    inner: str,
) -> dict[str, Lazy]:
    """The base's own weight of a module, by the name that it has under an adapter or without one.

    Where rows stand behind it they are part of it.
    """
    leaf, transposed = bare(leaves[path]), tensor.transposed
    if is_tied_head(leaf):
        leaf, transposed = bare(leaves[EMBEDDING]), False
    name = f"{module}.{inner}{'weight' if inner else _ending(tensor)}"
    leaf = materialize(leaf) if is_weight(leaf) else leaf
    return {name: _slice(leaf, layer, transposed)}


def _ending(tensor: Tensor) -> str:
    """What stands behind the module in a tensor's name."""
    return tensor.name.rsplit(".", 1)[1]


def _biases(
    saved: Saved,
    wanted: set[str],
    modules: set[str],
    table: Mapping[str, Tensor],
    leaves: Mapping[str, Any],
    adapted: Mapping[str, Any],
) -> tuple[dict[str, Lazy], str]:
    """The biases that PEFT's option means, and the option: the narrowest that covers those wanted."""
    paths = [path for path in table if path.endswith("/bias")]
    found = {m: (path, layer) for m, path, layer in _slices(paths, {}, table, leaves)}
    found = {module: place for module, place in found.items() if module not in modules}
    bias = saved.bias if not wanted or saved.bias == "all" else "only"
    if not wanted <= adapted.keys() or (saved.bias == "none" and wanted and wanted == found.keys()):
        bias = "all"
    if bias != "all":
        found = {m: place for m, place in found.items() if bias == "only" and m in adapted}
    tensors = {}
    for module, (path, layer) in found.items():
        name = f"{module}.base_layer.bias" if module in adapted else f"{module}.bias"
        tensors[name] = _slice(leaves[path], layer, False)
    return tensors, bias


def _slice(leaf: Any, layer: int | None, transposed: bool) -> Lazy:
    """One layer of a dense leaf, fetched when it is written."""
    shape = tuple(leaf.shape if layer is None else leaf.shape[1:])

    def make() -> np.ndarray:
        array = to_host(leaf if layer is None else leaf[layer])
        return array.T if transposed else array

    return Lazy(shape[::-1] if transposed else shape, np.dtype(leaf.dtype), make)
