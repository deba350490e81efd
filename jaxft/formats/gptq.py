"""Kernels as GPTQ's libraries store them (AutoGPTQ, GPTQModel; arXiv 2210.17323): 4 or 8 bits.

NAME.qweight  int32 (in bits / 32, out): codes of rows that follow one another, the first in the lowest bits
NAME.qzeros   int32 (groups, out bits / 32): the code that stands for 0, less 1 in the first format ("gptq")
NAME.scales   (groups, out)
NAME.g_idx    int32 (in,): each row's group; in "activation order" (desc_act) rows of a group are scattered
NAME.bias     (out,), which some libraries also write, as zeros, where the model has none
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Integer

from jaxft.errors import UserError, shown
from jaxft.formats.integers import (
    WORD,
    Table,
    expected,
    group_order,
    groups_of,
    integer_weight,
    parts_beside,
    scales_of,
    unpack,
    with_orders,
)
from jaxft.weights import Weight

ENDINGS = ("qweight", "qzeros", "scales", "g_idx")
FORMATS = ("gptq", "gptq_v2")
BITS = (4, 8)
INSIDE = "modules_in_block_to_quantize"


def check(settings: Mapping[str, Any], where: str) -> None:
    """Raises UserError for a variant that is not read."""
    kind = _format(settings)
    if kind not in FORMATS:
        raise UserError(
            f"{where}: GPTQ in the format {shown(kind)} is not known to jaxft, which reads {' and '.join(FORMATS)}"
        )
    if settings.get("bits") not in BITS:
        raise UserError(f"{where}: GPTQ of {shown(settings.get('bits'))} bits: jaxft reads 4 and 8")
    inside = modules_quantized(settings)
    if inside is not None and not all(isinstance(name, str) for name in inside):
        raise UserError(f"{where}: {INSIDE} is {shown(settings[INSIDE])}, and no lists of names")


def modules_quantized(settings: Mapping[str, Any]) -> list[Any] | None:
    """The names, within a layer, of the only modules that are quantized; None where all are."""
    lists = settings.get(INSIDE)
    if not lists:
        return None
    if not isinstance(lists, list):
        return [lists]
    return [name for one in lists for name in (one if isinstance(one, list) else [one])]


def _format(settings: Mapping[str, Any]) -> Any:
    return settings.get("checkpoint_format") or settings.get("format") or "gptq"


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

    Zeros are held where one of the layers has others than the middle code.

    Raises UserError where a part is missing or of another shape, and for groups of different sizes.
    """
    modules = [name.removesuffix(".weight") for name in names]
    # GPTQModel's `dynamic` gives modules settings of their own: there the shapes alone tell.
    own = bool(settings.get("dynamic"))
    group_size = None if own else settings.get("group_size", -1)
    bits = _bits(stored, modules[0], shape, None if own else settings["bits"])
    zeros, orders = [], []
    for module in modules:
        groups = groups_of(stored, f"{module}.scales", shape[0], group_size)
        zeros.append(_zeros(settings, stored, module, (groups, shape[1]), bits))
        orders.append(_order(stored, module, shape[0], groups))
    symmetric = all((one == 2 ** (bits - 1)).all() for one in zeros)

    def read() -> Iterator[Any]:
        for module, zero, order in zip(modules, zeros, orders, strict=True):
            words = (shape[0] * bits // WORD, shape[1])
            qweight = expected(stored, f"{module}.qweight", ("I32",), words).read()
            codes = unpack(qweight.T, bits).T[order]
            scales = scales_of(stored, f"{module}.scales", zero.shape)
            yield integer_weight(codes, scales, None if symmetric else zero, bits, dtype)

    return with_orders(read(), orders)


def _bits(stored: Table, module: str, shape: tuple[int, ...], bits: int | None) -> int:
    if bits is not None:
        return bits
    found = stored[f"{module}.qweight"]
    for known in BITS:
        if found.shape == (shape[0] * known // WORD, shape[1]):
            return known
    raise UserError(
        f"{found.file}: {module}.qweight {list(found.shape)} is no kernel {list(shape)} of 4 or 8 bits"
    )


def _zeros(
    settings: Mapping[str, Any], stored: Table, module: str, shape: tuple[int, int], bits: int
) -> Integer[np.ndarray, "groups out"]:
    """The codes that stand for 0. The first format's are 1 less, added word by word as GPTQModel does."""
    words = (shape[0], shape[1] * bits // WORD)
    stored_words = expected(stored, f"{module}.qzeros", ("I32",), words).read()
    if _format(settings) == "gptq":
        ones = np.uint32(sum(1 << bit for bit in range(0, WORD, bits)))
        stored_words = (stored_words.view(np.uint32) + ones).view(np.int32)
    return unpack(stored_words, bits)


def _order(stored: Table, module: str, rows: int, groups: int) -> Integer[np.ndarray, "in"]:
    name = f"{module}.g_idx"
    if name not in stored:
        return np.arange(rows, dtype=np.int32)
    found = expected(stored, name, ("I32",), (rows,))
    return group_order(found.read(), groups, f"{found.file}: {name}")
