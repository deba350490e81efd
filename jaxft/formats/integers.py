"""Integer codes in 32-bit words, as several libraries store them, made `Quantized` without going through floats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from jaxft.errors import UserError, named
from jaxft.formats.safetensors import FLOATS, Stored
from jaxft.weights import Permuted, Quantized, Weight

WORD = 32
Table = Mapping[str, Stored]


def unpack(words: Integer[np.ndarray, "rows words"], bits: int) -> Integer[np.ndarray, "rows all"]:
    """The codes of each row, uint8: the first in the lowest bits of a word.

    >>> unpack(np.asarray([[0x76543210]], np.int32), 4)
    array([[0, 1, 2, 3, 4, 5, 6, 7]], dtype=uint8)
    """
    octets = np.ascontiguousarray(words.astype("<i4", copy=False)).view(np.uint8)
    if bits == 8:
        return octets
    halves = np.stack([octets & 15, octets >> 4], axis=-1)
    return halves.reshape(len(words), -1)


def pack_halves(codes: Integer[np.ndarray, "in out"]) -> Integer[np.ndarray, "half out"]:
    """`weights.rounding.pack` in NumPy."""
    low, high = np.split(codes, 2)
    return np.ascontiguousarray(low | (high << 4))


def integer_weight(
    codes: Integer[np.ndarray, "in out"],
    scales: Float[np.ndarray, "groups out"],
    zeros: Integer[np.ndarray, "groups out"] | None,
    bits: int,
    dtype: Any,
) -> Quantized:
    """The weight of unsigned codes, uint8; without zeros the middle code stands for 0."""
    held = pack_halves(codes) if bits == 4 else codes
    if bits == 8 and zeros is None:
        held = (codes ^ 128).view(np.int8)
    return Quantized(
        codes=held,
        scales=scales.astype(np.float32),
        zeros=zeros,
        scheme=f"int{bits}",
        matrix_shape=codes.shape,
        dense_dtype=dtype,
    )


def group_order(
    groups: Integer[np.ndarray, "in"], count: int, where: str
) -> Integer[np.ndarray, "in"]:
    """The order of the rows in which each of `count` groups is a run, group after group.

    Raises UserError for a group that there is not, and for groups that have not all the same number of rows.
    """
    rows = len(groups)
    if not np.array_equal(np.bincount(np.clip(groups, -1, count) + 1, minlength=count + 2)[1:-1],
                          np.full(count, rows // count)):  # fmt: skip
        raise UserError(f"{where}: does not put {rows} rows into {count} groups of one size")
    return np.argsort(groups, kind="stable").astype(np.int32)


def in_order(order: Integer[np.ndarray, "in"]) -> bool:
    """Whether the order is that which the rows have."""
    return bool(np.array_equal(order, np.arange(len(order))))


def parts_beside(
    stored: Table, name: str, endings: Sequence[str], needed: Sequence[str]
) -> list[str]:
    """The tensors of NAME.weight that are there, by their endings; none, as of a dense one, without one of `needed`."""
    module = name.removesuffix(".weight")
    if not any(f"{module}.{ending}" in stored for ending in needed):
        return []
    return [f"{module}.{ending}" for ending in endings if f"{module}.{ending}" in stored]


def expected(stored: Table, name: str, dtypes: Sequence[str], *shapes: tuple[int, ...]) -> Stored:
    """The tensor, of one of the dtypes and shapes. Raises UserError for a missing or another one."""
    if name not in stored:
        raise UserError(f"the tensor {named(name)} is missing, which a quantized kernel needs")
    found = stored[name]
    if found.dtype not in dtypes or found.shape not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise UserError(
            f"{found.file}: {named(name)} is {found.dtype} {list(found.shape)}; "
            f"{' or '.join(dtypes)} {wanted} is expected"
        )
    return found


def groups_of(stored: Table, name: str, rows: int, group_size: int | None) -> int:
    """How many groups the input axis has, by the length of the first axis of `name`, the scales.

    Raises UserError where groups of that size (-1: all rows; None: any that divide) are not what is there.
    """
    if name not in stored:
        raise UserError(f"the tensor {named(name)} is missing, which a quantized kernel needs")
    found = stored[name]
    if len(found.shape) != 2 or not 1 <= found.shape[0] <= rows or rows % found.shape[0]:
        said = f" of {group_size}" if group_size else ""
        raise UserError(
            f"{found.file}: {named(name)} {list(found.shape)}: groups{said} do not divide the {rows} rows"
        )
    groups = found.shape[0]
    if group_size is not None and groups * (rows if group_size == -1 else group_size) != rows:
        raise UserError(
            f"{found.file}: {named(name)} {list(found.shape)}: config.json says groups of {group_size}, "
            f"which {groups} are not for {rows} rows"
        )
    return groups


def scales_of(stored: Table, name: str, shape: tuple[int, ...]) -> Float[np.ndarray, "groups out"]:
    """The scales, of any floating dtype, in float32."""
    return expected(stored, name, FLOATS, shape).read().astype(np.float32)


def with_orders(
    weights: Iterator[Quantized], orders: Sequence[Integer[np.ndarray, "in"]]
) -> Iterator[Weight]:
    """The layers' weights, permuted where a layer's rows are: all of them then, for they are stacked."""
    plain = all(in_order(order) for order in orders)
    for weight, order in zip(weights, orders, strict=True):
        yield weight if plain else Permuted(weight, order)
