"""The names by which PEFT knows the modules of a parameter tree, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxft.formats.multimodal import PREFIX, PREFIXES
from jaxft.models.config import Config
from jaxft.models.families import FAMILIES, Tensor, tensors_of
from jaxft.tree import PyTree, flatten_with_paths, in_layers, layer_starts
from jaxft.vocabulary import HEAD
from jaxft.weights import SHARED, is_weight, remember, saved_in


def names_in(params: PyTree, names: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """{path of a leaf: where it stands on disk}, for the leaves that the tree has.

    Args:
        params: a parameter tree, adapted or not.
        names: {path: module with {layer}}; by default those of the family whose tree it is, or for
            another library's module the path with dots.
    """
    paths = [
        path
        for path, _ in flatten_with_paths(params, is_leaf=is_weight)
        if path.split("/")[0] not in SHARED
    ]
    if names is not None:
        return {
            path: Tensor(f"{names[path]}.{_leaf_name(path)}", True)
            for path in paths
            if path in names
        }
    known = saved_in(params)
    for family in (known.family,) if known.family else FAMILIES:
        table = tensors_of(_like(family, params, paths))
        if set(paths) <= table.keys():
            found = {path: table[path] for path in table if path in paths}
            return inside(found, known.modules) if known.modules else found
    return {path: Tensor(f"{_dotted(path)}.{_leaf_name(path)}", True) for path in paths}


def with_family(params: PyTree, config: Config, modules: str = "") -> PyTree:
    """The tree, which remembers its family where its leaves are those of another with other names, too.

    Args:
        params: the tree.
        config: of its model.
        modules: how the names of its modules begin instead of `model.`, where the model has other parts; it is
            remembered, too.
    """
    own = tensors_of(config)
    known = all(own.get(path, tensor) == tensor for path, tensor in names_in(params).items())
    family = "" if known else config.family
    return remember(params, dataclasses.replace(saved_in(params), family=family, modules=modules))


def inside(table: Mapping[str, Tensor], modules: str) -> dict[str, Tensor]:
    """The table of a decoder whose modules stand among others, or alone: their names begin with this prefix."""

    def named(tensor: Tensor) -> Tensor:
        before = next((one for one in (*PREFIXES, PREFIX) if tensor.name.startswith(one)), None)
        if before is None:
            return tensor
        return dataclasses.replace(tensor, name=modules + tensor.name.removeprefix(before))

    return {path: named(tensor) for path, tensor in table.items()}


def as_in(stored: Iterable[str], table: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The table with modules named as an adapter's file names them: of the decoder alone, or of one among others."""
    prefixes = (*PREFIXES, PREFIX)
    names = list(stored)
    found = next((p for p in prefixes if any(name.startswith(p) for name in names)), None)
    return dict(table) if found is None else inside(table, found)


def conv1d(table: Mapping[str, Tensor]) -> bool:
    """Whether the model stores its kernels (in, out), as GPT-2 does: PEFT's `fan_in_fan_out`."""
    kernels = [
        tensor for path, tensor in table.items() if path.endswith("/kernel") and path != HEAD
    ]
    return bool(kernels) and not any(tensor.transposed for tensor in kernels)


def modules_in(table: Mapping[str, Tensor], params: PyTree) -> dict[str, tuple[str, int | None]]:
    """{module: (path of the kernel, embedding or scale in it, place in the stack or None)}, layer by layer."""
    found: dict[str, tuple[str, int | None]] = {}
    slices = slices_in(table, params)
    for path in table:
        if not path.endswith("/bias"):
            found |= {module: (path, place) for module, place in slices(path)}
    return found


def slices_in(
    table: Mapping[str, Tensor], params: PyTree
) -> Callable[[str], list[tuple[str, int | None]]]:
    """A function from a leaf's path to (module, place in the stack or None) of each of its layers.

    What experts have each for themselves is no module that an adapter can mean: there is nothing of it.
    """
    leaves = dict(flatten_with_paths(params, is_leaf=is_weight))
    starts = layer_starts(params, is_weight)

    def slices(path: str) -> list[tuple[str, int | None]]:
        tensor = table[path]
        if tensor.each_expert:
            return []
        if not tensor.stacked:
            return [(tensor.module, None)]
        start = starts.get(path.split("/")[0], 0)
        places = range(leaves[path].shape[0])
        return [(tensor.module.format(layer=start + place), place) for place in places]

    return slices


def _like(family: str, params: PyTree, paths: Sequence[str]) -> Config:
    """A configuration of the family with the leaves that the tree has; its sizes mean nothing."""
    ends = {path.split("/", 1)[1] if in_layers(path) else path for path in paths}
    scale = next(
        (leaf for path, leaf in flatten_with_paths(params) if "q_norm/scale" in path), None
    )
    layers = [name for name in params if in_layers(name)]
    variants: dict[str, Any] = {
        "attention_bias": bool(ends & {"attention/q_proj/bias", "attention/qkv_proj/bias"}),
        "output_bias": "attention/o_proj/bias" in ends,
        "mlp_bias": "mlp/down_proj/bias" in ends,
        "fused_qkv": "attention/qkv_proj/kernel" in ends,
        "fused_gate_up": "mlp/gate_up_proj/kernel" in ends,
        "gated": bool(ends & {"mlp/gate_proj/kernel", "mlp/gate_up_proj/kernel"}),
        "norm": "layer" if "final_norm/bias" in ends else "rms",
        "query_key_norm": "" if scale is None else "heads" if len(scale.shape) > 2 else "head",
        "layer_inputs": int("layer_embed/embedding" in ends),
        "parts": tuple((1, ()) for _ in layers) if "layers" not in params else (),
    }
    return Config(family, 0, 0, 0, len(layers), 0, 0, 0, 0, **variants)


def _leaf_name(path: str) -> str:
    return "bias" if path.endswith("/bias") else "weight"


def _dotted(path: str) -> str:
    first, *rest = path.split("/")[:-1]
    return ".".join([first, *(["{layer}"] if in_layers(path) else []), *rest])
