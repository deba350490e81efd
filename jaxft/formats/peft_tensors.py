"""A tree's adapters as a PEFT adapter's tensors, made when written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxft.errors import UserError
from jaxft.formats.naming import EMBEDDING, HEAD
from jaxft.formats.safetensors import Lazy
from jaxft.models.families import Tensor
from jaxft.processes import to_host
from jaxft.tree import PyTree, flatten_with_paths
from jaxft.weights import DoRA, LoRA, Tied, VeRA, Weight, is_weight


@dataclasses.dataclass(frozen=True)
class Adapted:
    """One module's adapter as PEFT has it.

    Attributes:
        rank: its true rank; scale: its factor s.
        parts: {ending of the tensor's name: how to make it}.
    """

    rank: int
    scale: float
    parts: Mapping[str, Lazy]


def tied_head_name(params: PyTree) -> dict[str, Tensor]:
    """The head's name, which a tied model's own tensors leave out."""
    return {HEAD: Tensor("lm_head.weight", True)} if HEAD in dict(_leaves(params)) else {}


def _leaves(params: PyTree) -> list[tuple[str, Any]]:
    return flatten_with_paths(params, is_leaf=is_weight)


def adapter_weights(params: PyTree) -> list[tuple[str, Weight]]:
    """Every weight over a base: a tied head has none, and is no adapter."""
    return [(path, leaf) for path, leaf in _leaves(params) if hasattr(leaf, "base")]


def _lazy(array: Any) -> Lazy:
    """A slice of the tree, fetched from the device when it is written."""
    return Lazy(tuple(array.shape), np.dtype(array.dtype), lambda: to_host(array))


def _lora_parts(weight: Any, rank: int, embedding: bool) -> dict[str, Lazy]:
    a, b = _lazy(weight.a[:, :rank].T), _lazy(weight.b[:rank].T)
    if embedding:
        return {"lora_embedding_A": a, "lora_embedding_B": b}
    return {"lora_A.weight": a, "lora_B.weight": b}


def _dora_parts(weight: Any, rank: int, embedding: bool) -> dict[str, Lazy]:
    return _lora_parts(weight, rank, embedding) | {"lora_magnitude_vector": _lazy(weight.magnitude)}


def _vera_parts(weight: Any, rank: int, embedding: bool) -> dict[str, Lazy]:
    return {"vera_lambda_d": _lazy(weight.d), "vera_lambda_b": _lazy(weight.g)}


# What PEFT has a place for. A kind of LoRA of its own says by `as_lora` which of these it equals.
PARTS: dict[type[Any], Callable[[Any, int, bool], dict[str, Lazy]]] = {
    LoRA: _lora_parts,
    DoRA: _dora_parts,
    VeRA: _vera_parts,
}


def adapters_in(
    params: PyTree, table: Mapping[str, Tensor]
) -> tuple[type[Any], dict[str, Adapted]]:
    """The one kind of adapter in the tree, and {module: its adapter}."""
    adapted: dict[str, Adapted] = {}
    kinds: dict[type[Any], str] = {}
    for path, weight in adapter_weights(params):
        known: Any = weight.as_lora() if isinstance(weight, LoRA) else weight
        if type(known) not in PARTS or isinstance(known.base, tuple(PARTS)):
            raise UserError(f"{path}: PEFT's format has no place for {type(weight).__name__} here")
        if path not in table:
            raise UserError(
                f"{path}: `names` gives no module name for it, which PEFT's format needs"
            )
        kinds[type(known)] = path
        adapted |= _per_layer(path, known, table[path])
        if path == EMBEDDING and getattr(weight, "tie_adapters", False):
            adapted |= _tied_adapter(path, known, params)
    if not kinds:
        raise UserError(
            "save_adapter: the tree holds no adapter; call jaxft.adapt first, or jaxft.save"
        )
    if len(kinds) > 1:
        found = ", ".join(f"{kind.__name__} ({path})" for kind, path in kinds.items())
        raise UserError(f"save_adapter: a PEFT adapter is of one kind, the tree holds {found}")
    return next(iter(kinds)), adapted


def _per_layer(path: str, weight: Any, tensor: Tensor) -> dict[str, Adapted]:
    stacked = "{layer}" in tensor.module
    inner = weight.d if isinstance(weight, VeRA) else weight.b
    layers = inner.shape[0] if stacked else 1
    full = inner.shape[-1] if isinstance(weight, VeRA) else inner.shape[-2]
    scales = np.asarray(getattr(weight, "scale", 1.0)).reshape(-1)
    found = {}
    for layer, rank in enumerate(weight.ranks or (full,) * layers):
        if rank:
            one = _layer_of(weight, layer) if stacked else weight
            parts = PARTS[type(weight)](one, rank, path.endswith("/embedding"))
            scale = float(scales[layer if len(scales) > 1 else 0])
            found[tensor.module.format(layer=layer)] = Adapted(rank, scale, parts)
    return found


def _layer_of(weight: Any, layer: int) -> Any:
    """One layer's adapter, its base left alone."""
    own = {"a", "b", "d", "g", "magnitude"} & {field.name for field in dataclasses.fields(weight)}
    parts = {
        name: getattr(weight, name)[layer] for name in own if getattr(weight, name) is not None
    }
    return dataclasses.replace(weight, **parts)


def _tied_adapter(path: str, weight: Any, params: PyTree) -> dict[str, Adapted]:
    """The head's share of an embedding's adapter that acts there too: for PEFT, one of its own."""
    head = params["head"]["kernel"]
    if not isinstance(head, Weight):
        return {}
    if type(weight) is not LoRA or not isinstance(head, Tied):
        raise UserError(f"{path}: PEFT's format has no place for this adapter with tie_adapters")
    rank = (weight.ranks or (weight.b.shape[0],))[0]
    parts = {"lora_A.weight": _lazy(weight.b[:rank]), "lora_B.weight": _lazy(weight.a[:, :rank])}
    return {"lm_head": Adapted(rank, float(weight.scale), parts)}


def shared_in(params: PyTree) -> dict[str, Lazy]:
    return {
        "base_model.vera_A": _lazy(params["vera"]["a"].T),
        "base_model.vera_B": _lazy(params["vera"]["b"].T),
    }
