"""Puts quantized weights instead of a tree's kernels, and says what a tree's base is quantized to."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxft.adaptation import KERNELS, targeted
from jaxft.defaults import DOUBLE_QUANT, GROUP_SIZE
from jaxft.errors import UserError
from jaxft.tree import LAYERS, PyTree, flatten_with_paths, in_layers, map_with_paths
from jaxft.weights import is_weight, quantize, quantized_in, replace


def quantize_params(
    params: PyTree,
    scheme: str = "nf4",
    *,
    group_size: int = GROUP_SIZE,
    double_quant: bool = DOUBLE_QUANT,
    symmetric: bool = True,
    targets: Sequence[str] = (),
    stacked: Sequence[str] = LAYERS,
) -> PyTree:
    """Quantizes the kernels of a tree, one after the other; what an adapter adds is put over it afterwards.

    Args:
        params: a tree without adapters.
        scheme: nf4 | fp4 | int4 | int8; the other settings too are those of `jaxft.quantize`.
        group_size: rows that share a scale.
        double_quant: of nf4 and fp4: quantize the scales too.
        symmetric: of int4 and int8.
        targets: patterns of the kernels; () for all projections, so that the embedding, the head and the norms stay.
        stacked: patterns of the top-level names below which kernels have a leading axis of layers.

    Raises:
        UserError: a pattern that matches nothing, a kernel that is quantized or adapted already, or what
            `jaxft.quantize` refuses.
    """
    kernels = {
        path: leaf
        for path, leaf in flatten_with_paths(params, is_leaf=is_weight)
        if path.split("/")[-1] in KERNELS
    }
    chosen = targeted(targets, list(kernels), "quantize_params")
    for path in chosen:
        leaf = kernels[path]
        if is_weight(leaf):
            kind = type(leaf).__name__
            raise UserError(
                f"quantize_params: {path} is a {kind} weight already; quantize the dense tree"
            )
        in_stack = in_layers(path, stacked)
        if leaf.ndim != 2 and not (in_stack and leaf.ndim == 3):
            raise UserError(
                f"quantize_params: {path} {leaf.shape} is no kernel (in, out), nor a stack of them"
            )

    def one(path: str, leaf: Any) -> Any:
        if path not in chosen:
            return leaf
        return quantize(
            leaf, scheme, group_size=group_size, double_quant=double_quant, symmetric=symmetric
        )

    return map_with_paths(one, params, is_leaf=is_weight)


def quantization_of(params: PyTree) -> dict[str, Any] | None:
    """What a tree's base is quantized to, with the digest that tells this base from others; None if it is dense.

    The settings are those of `quantize_params`. The digest is of the first quantized kernel's codes in its first layer.
    """
    found = quantized_in(params)
    if not found:
        return None
    _, weight = found[0]
    whole = all(each.group_size == each.shape[-2] for _, each in found)  # which is no one number
    held = getattr(weight, "blocks", weight)
    first = held.codes[(0,) * (held.codes.ndim - 2)]
    first = replace(held, codes=first).divided(1).codes  # the same on any mesh
    return {
        "scheme": weight.scheme,
        "group_size": -1 if whole else weight.group_size,
        "double_quant": weight.nested is not None,
        "digest": hashlib.sha256(np.asarray(jax.device_get(first)).tobytes()).hexdigest()[:16],
    }
