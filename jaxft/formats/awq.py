"""Kernels as AutoAWQ stores them (arXiv 2306.00978), 4 bits in its GEMM layout.

NAME.qweight  int32 (in, out / 8): codes of eight columns, interleaved
NAME.qzeros   int32 (groups, out / 8): the code that stands for 0, likewise
NAME.scales   (groups, out)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Integer

from jaxft.errors import UserError, shown
from jaxft.formats.integers import (
    Table,
    expected,
    groups_of,
    integer_weight,
    parts_beside,
    scales_of,
    unpack,
)
from jaxft.weights import Weight

ENDINGS = ("qweight", "qzeros", "scales")
ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where a word's eight columns stand in it, from the lowest bits
COLUMNS = len(ORDER)


def check(settings: Mapping[str, Any], where: str) -> None:
    """Raises UserError for a variant that is not read."""
    # transformers 4 called the layout the version
    layout = settings.get("version") or settings.get("format") or "gemm"
    if str(layout).lower() != "gemm":
        raise UserError(
            f"{where}: AWQ in the layout {shown(layout)} is not known to jaxft, which reads gemm"
        )
    bits = settings.get("bits", settings.get("w_bit", 4))
    if bits != 4:
        raise UserError(f"{where}: AWQ of {shown(bits)} bits: jaxft reads 4")
    if settings.get("zero_point", True) is not True:
        raise UserError(f"{where}: AWQ without zero points is not known to jaxft")


def parts_of(stored: Table, name: str) -> list[str]:
    """The tensors of a quantized kernel NAME.weight; none if it is dense."""
    return parts_beside(stored, name, ENDINGS, ("qweight",))


def read_layers(
    settings: Mapping[str, Any],
    stored: Table,
    names: Sequence[str],
    shape: tuple[int, ...],
    dtype: Any,
) -> Iterator[Weight]:
    """The kernels (in, out) of a leaf's layers, their parts NumPy arrays.

    Raises UserError where a part is missing or of another shape.
    """
    rows, columns = shape
    size = settings.get("group_size", settings.get("q_group_size", 128))
    for name in names:
        module = name.removesuffix(".weight")
        groups = groups_of(stored, f"{module}.scales", rows, size)
        codes = _interleaved(stored, f"{module}.qweight", (rows, columns // COLUMNS))
        zeros = _interleaved(stored, f"{module}.qzeros", (groups, columns // COLUMNS))
        scales = scales_of(stored, f"{module}.scales", (groups, columns))
        yield integer_weight(codes, scales, zeros, 4, dtype)


def _interleaved(
    stored: Table, name: str, shape: tuple[int, int]
) -> Integer[np.ndarray, "rows out"]:
    words = expected(stored, name, ("I32",), shape).read()
    codes = unpack(words, 4).reshape(len(words), -1, COLUMNS)
    return codes[..., ORDER].reshape(len(words), -1)
