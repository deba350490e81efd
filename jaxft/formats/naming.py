"""The names by which PEFT knows the modules of a parameter tree, and back."""

from __future__ import annotations

from collections.abc import Mapping

from jaxft.models.config import Config
from jaxft.models.families import FAMILIES, Tensor
from jaxft.tree import PyTree, flatten_with_paths
from jaxft.weights import SHARED, is_weight

HEAD = "head/kernel"
EMBEDDING = "embed/embedding"


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
    for family in FAMILIES:
        table = _whole_table(family)
        if set(paths) <= table.keys():
            return {path: table[path] for path in table if path in paths}
    return {path: Tensor(f"{_dotted(path)}.{_leaf_name(path)}", True) for path in paths}


def conv1d(table: Mapping[str, Tensor]) -> bool:
    """Whether the model stores its kernels (in, out), as GPT-2 does: PEFT's `fan_in_fan_out`."""
    kernels = [
        tensor for path, tensor in table.items() if path.endswith("/kernel") and path != HEAD
    ]
    return bool(kernels) and not any(tensor.transposed for tensor in kernels)


def modules_in(table: Mapping[str, Tensor], params: PyTree) -> dict[str, tuple[str, int | None]]:
    """{module: (path of the kernel, embedding or scale in it, layer or None)}, layer by layer."""
    leaves = dict(flatten_with_paths(params, is_leaf=is_weight))
    found: dict[str, tuple[str, int | None]] = {}
    for path, tensor in table.items():
        if path.endswith("/bias"):
            continue
        stacked = "{layer}" in tensor.module
        for layer in range(leaves[path].shape[0] if stacked else 1):
            found[tensor.module.format(layer=layer)] = (path, layer if stacked else None)
    return found


def _whole_table(family: str) -> dict[str, Tensor]:
    """Every tensor that the family can have."""
    config = Config(
        family,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        tied=False,
    )
    return FAMILIES[family].tensors(config)


def _leaf_name(path: str) -> str:
    return "bias" if path.endswith("/bias") else "weight"


def _dotted(path: str) -> str:
    first, *rest = path.split("/")[:-1]
    return ".".join([first, *(["{layer}"] if first == "layers" else []), *rest])
