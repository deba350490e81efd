"""A tree's adapters as a PEFT adapter's tensors, made when written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxft.errors import UserError
from jaxft.formats.naming import slices_in
from jaxft.formats.safetensors import Lazy
from jaxft.models.families import Tensor
from jaxft.runtime.processes import to_host
from jaxft.tree import PyTree, flatten_with_paths
from jaxft.vocabulary import EMBEDDING, HEAD
from jaxft.weights import EMBEDDING_PARTS, LINEAR_PARTS, Peft, is_adapter, is_tied_head, is_weight


@dataclasses.dataclass(frozen=True)
class Adapted:
    """One module's adapter as PEFT has it.

    Attributes:
        rank: its true rank; scale: its factor s.
        parts: {ending of the tensor's name: how to make it}.
        tokens: whose rows they are; () of an adapter.
    """

    rank: int
    scale: float
    parts: Mapping[str, Lazy]
    tokens: tuple[int, ...] = ()


def tied_head_name(params: PyTree) -> dict[str, Tensor]:
    """The head's name, which a tied model's own tensors leave out."""
    return {HEAD: Tensor("lm_head.weight", True)} if HEAD in dict(_leaves(params)) else {}


def _leaves(params: PyTree) -> list[tuple[str, Any]]:
    return flatten_with_paths(params, is_leaf=is_weight)


def adapter_weights(params: PyTree) -> list[tuple[str, Any]]:
    """Every weight over a base: a tied head has none, and is no adapter."""
    return [(path, leaf) for path, leaf in _leaves(params) if is_adapter(leaf)]


def token_rows_in(params: PyTree, table: Mapping[str, Tensor]) -> dict[str, Adapted]:
    """{module: the rows of its tokens that train}, of the embedding and the head."""
    found = {}
    for path, weight in adapter_weights(params):
        if not weight.trained:
            continue
        stored = weight.to_peft(embedding=path == EMBEDDING)
        parts = {name: _lazy(part) for name, part in stored.layers[0].parts.items()}
        found[table[path].module] = Adapted(0, 0.0, parts, stored.tokens)
    return found


def adapters_in(params: PyTree, table: Mapping[str, Tensor]) -> tuple[str, dict[str, Adapted]]:
    """The one kind of adapter in the tree (lora, dora or vera), and {module: its adapter}.

    Raises:
        UserError: there is no adapter, or one that PEFT's format cannot hold.
    """
    adapted: dict[str, Adapted] = {}
    kinds: dict[str, str] = {}
    slices = slices_in(table, params)
    for path, weight in adapter_weights(params):
        if weight.trained:
            continue
        stored = weight.to_peft(embedding=path.endswith("/embedding"))
        if stored is None:
            raise UserError(f"{path}: PEFT's format has no place for {type(weight).__name__} here")
        if path not in table:
            raise UserError(
                f"{path}: `names` gives no module name for it, which PEFT's format needs"
            )
        kinds[stored.kind] = f"{type(weight).__name__} ({path})"
        for place, (module, _) in enumerate(slices(path)):
            if one := stored.layers.get(place):
                parts = {name: _lazy(part) for name, part in one.parts.items()}
                adapted[module] = Adapted(one.rank, one.scale, parts)
        if path == EMBEDDING and getattr(weight, "tie_adapters", False):
            adapted |= _tied_adapter(path, stored, params)
    if not kinds:
        raise UserError(
            "save_adapter: the tree holds no adapter; call jaxft.adapt first, or jaxft.save"
        )
    if len(kinds) > 1:
        found = ", ".join(kinds.values())
        raise UserError(f"save_adapter: a PEFT adapter is of one kind, the tree holds {found}")
    return next(iter(kinds)), adapted


def _lazy(array: Any) -> Lazy:
    """A slice of the tree, fetched from the device when it is written."""
    return Lazy(tuple(array.shape), np.dtype(array.dtype), lambda: to_host(array))


def _tied_adapter(path: str, stored: Peft, params: PyTree) -> dict[str, Adapted]:
    """The head's share of an embedding's adapter that acts there too: for PEFT, one of its own."""
    head = params["head"]["kernel"]
    if not is_weight(head):
        return {}
    if stored.kind != "lora" or not is_tied_head(head):
        raise UserError(f"{path}: PEFT's format has no place for this adapter with tie_adapters")
    one = stored.layers[0]
    a, b = (one.parts[name].T for name in EMBEDDING_PARTS)
    parts = dict(zip(LINEAR_PARTS, map(_lazy, (b, a)), strict=True))
    return {"lm_head": Adapted(one.rank, one.scale, parts)}


def shared_in(params: PyTree) -> dict[str, Lazy]:
    """VeRA's projections."""
    return {
        "base_model.vera_A": _lazy(params["vera"]["a"].T),
        "base_model.vera_B": _lazy(params["vera"]["b"].T),
    }
