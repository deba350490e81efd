"""Kernels as compressed-tensors stores them (llm-compressor, vLLM): integers of 4 or 8 bits.

Packed ("pack-quantized"):

    NAME.weight_packed      int32 (out, in bits / 32): signed codes plus 2^(bits-1), the first in the lowest bits
    NAME.weight_shape       (2,): out, in
    NAME.weight_zero_point  int32 (out bits / 32, groups), packed along out; or int8 (out, groups) of older versions
    NAME.weight_g_idx       int32 (in,): each row's group, where activation order scattered them; -1 where not

Plain ("int-quantized", "naive-quantized"):

    NAME.weight             int8 (out, in)
    NAME.weight_zero_point  int8 (out, groups)

and in both NAME.weight_scale, (out, groups), (out, 1) or (1,). Of activations that are quantized as well, the weights
alone are read.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from jaxft.errors import UserError, counted, shown
from jaxft.formats.integers import (
    WORD,
    Table,
    expected,
    group_order,
    integer_weight,
    parts_beside,
    unpack,
    with_orders,
)
from jaxft.formats.safetensors import FLOATS
from jaxft.weights import Weight

ENDINGS = (
    "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx",
    "input_scale", "input_zero_point",
)  # fmt: skip
FORMATS = ("pack-quantized", "int-quantized", "naive-quantized")
STRATEGIES = ("group", "channel", "tensor")
BITS = (4, 8)


def check(settings: Mapping[str, Any], where: str) -> None:
    """Raises UserError for a variant that is not read, and says on stderr what is left out."""
    knows = f"jaxft reads integers of 4 and 8 bits as {', '.join(FORMATS)}, and no sparsity"
    sparse = settings.get("sparsity_config") or {}
    if not isinstance(sparse, dict) or sparse.get("format", "dense") != "dense":
        raise UserError(f"{where}: compressed-tensors with sparsity {shown(sparse)}: {knows}")
    if settings.get("transform_config"):
        raise UserError(f"{where}: compressed-tensors with a transform_config: {knows}")
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(one, dict) for one in groups.values()):
        raise UserError(f"{where}: compressed-tensors without config_groups: {knows}")
    for name, group in groups.items():
        _check_group(settings, group, f"{where}: config_groups.{name}", knows)
    also = [
        kind
        for kind in ("input_activations", "output_activations")
        if any(group.get(kind) for group in groups.values())
    ] + ["kv_cache_scheme"] * bool(settings.get("kv_cache_scheme"))
    if also:
        print(
            f"jaxft: {where}: {', '.join(also)} are quantized too: jaxft reads the weights alone and computes with "
            "activations as they are",
            file=sys.stderr,
        )


def _check_group(
    settings: Mapping[str, Any], group: Mapping[str, Any], where: str, knows: str
) -> None:
    kind = group.get("format") or settings.get("format")
    if kind not in FORMATS:
        raise UserError(f"{where}: compressed-tensors in the format {shown(kind)}: {knows}")
    weights = group.get("weights") or {}
    wanted: dict[str, tuple[Any, ...]] = {
        "type": ("int",),
        "num_bits": BITS if kind == "pack-quantized" else (8,),
        "strategy": STRATEGIES,
    }
    found = {"type": "int", "num_bits": 8, **weights}
    found["strategy"] = weights.get("strategy") or (
        "group" if weights.get("group_size") else "tensor"
    )
    for key, values in wanted.items():
        if found[key] not in values:
            raise UserError(f"{where}: weights.{key} = {shown(found[key])} ({kind}): {knows}")


def parts_of(stored: Table, name: str) -> list[str]:
    """The tensors of a quantized kernel NAME.weight; none if it is dense."""
    found = parts_beside(stored, name, ENDINGS, ("weight_scale", "weight_packed"))
    return [*found, name] if found and name in stored else found


def read_layers(
    settings: Mapping[str, Any],
    stored: Table,
    names: Sequence[str],
    shape: tuple[int, ...],
    dtype: Any,
) -> Iterator[Weight]:
    """The kernels (in, out) of a leaf's layers, their parts NumPy arrays.

    Raises UserError where a part is missing or of another shape, and for groups of different sizes.
    """
    modules = [name.removesuffix(".weight") for name in names]
    rows, columns = shape
    bits = _bits(stored, modules[0], shape)
    offset = any(f"{module}.weight_zero_point" in stored for module in modules)
    scales = [_scales(stored, module, shape) for module in modules]
    orders = [
        _order(stored, module, rows, len(scale))
        for module, scale in zip(modules, scales, strict=True)
    ]

    def read() -> Iterator[Any]:
        for module, scale, order in zip(modules, scales, orders, strict=True):
            codes = _codes(stored, module, (columns, rows), bits).T[order]
            zeros = _zeros(stored, module, (columns, len(scale)), bits) if offset else None
            yield integer_weight(codes, scale, zeros, bits, dtype)

    return with_orders(read(), orders)


def _words(count: int, bits: int) -> int:
    return math.ceil(count * bits / WORD)


def _bits(stored: Table, module: str, shape: tuple[int, ...]) -> int:
    """Bits of a code, by the shape of what is stored."""
    rows, columns = shape
    packed = f"{module}.weight_packed"
    if packed not in stored:
        return 8
    possible: dict[tuple[int, ...], int] = {(columns, _words(rows, bits)): bits for bits in BITS}
    bits = possible[expected(stored, packed, ("I32",), *possible).shape]
    if bits == 4 and rows % 2:
        raise UserError(
            f"{stored[packed].file}: {packed}: {counted(rows, 'row')} of 4 bits: jaxft packs them in pairs"
        )
    return bits


def _scales(stored: Table, module: str, shape: tuple[int, ...]) -> Float[np.ndarray, "groups out"]:
    """(groups, out) in float32; of one scale for the whole tensor, that for each column."""
    rows, columns = shape
    name = f"{module}.weight_scale"
    if name in stored and len(stored[name].shape) == 2 and stored[name].shape[0] == columns:
        groups = stored[name].shape[1]
        if groups < 1 or rows % groups:
            raise UserError(
                f"{stored[name].file}: {name} {list(stored[name].shape)}: its groups do not divide the {rows} rows"
            )
        found = expected(stored, name, FLOATS, stored[name].shape).read().T
    else:
        found = expected(stored, name, FLOATS, (1,), (), (columns, 1)).read().reshape(1, 1)
    return np.broadcast_to(found, (found.shape[0], columns)).astype(np.float32)


def _codes(
    stored: Table, module: str, shape: tuple[int, int], bits: int
) -> Integer[np.ndarray, "out in"]:
    """The codes plus 2^(bits-1), uint8."""
    if f"{module}.weight_packed" not in stored:
        plain = expected(stored, f"{module}.weight", ("I8",), shape).read()
        return plain.view(np.uint8) ^ np.uint8(128)
    said = expected(stored, f"{module}.weight_shape", ("I64", "I32"), (2,)).read()
    if tuple(said) != shape:
        raise UserError(
            f"{stored[f'{module}.weight_shape'].file}: {module}.weight_shape is {list(map(int, said))}, "
            f"the model needs {list(shape)}"
        )
    name, words = f"{module}.weight_packed", (shape[0], _words(shape[1], bits))
    return unpack(expected(stored, name, ("I32",), words).read(), bits)[:, : shape[1]]


def _zeros(
    stored: Table, module: str, shape: tuple[int, int], bits: int
) -> Integer[np.ndarray, "groups out"]:
    """The codes that stand for 0, as uint8 beside those of `_codes`; the middle where the layer has none."""
    columns, groups = shape
    name, middle = f"{module}.weight_zero_point", 2 ** (bits - 1)
    if name not in stored:
        return np.full(shape[::-1], middle, np.uint8)
    if stored[name].dtype == "I8":
        found = expected(stored, name, ("I8",), shape, (columns,), (1,)).read()
        found = found.reshape(-1, groups) if found.ndim < 2 else found
        return np.broadcast_to((found.T.astype(np.int16) + middle).astype(np.uint8), shape[::-1])
    packed = expected(stored, name, ("I32",), (_words(columns, bits), groups)).read()
    return unpack(packed.T, bits)[:, :columns]


def _order(stored: Table, module: str, rows: int, groups: int) -> Integer[np.ndarray, "in"]:
    name = f"{module}.weight_g_idx"
    plain = np.arange(rows, dtype=np.int32)
    if name not in stored:
        return plain
    found = expected(stored, name, ("I32", "I64"), (rows,))
    index = found.read()
    return plain if (index == -1).all() else group_order(index, groups, f"{found.file}: {name}")
