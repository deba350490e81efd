"""Which library quantized a folder, and how its kernels are read: a row for each.

A reader goes by the tensors that are there: what `ignore` lists, `modules_to_not_convert` and their like leave out is
stored dense, and read so. The settings in config.json are checked once, before anything is read.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from jaxft.errors import UserError, shown
from jaxft.formats import awq, bitsandbytes, compressed_tensors, gptq
from jaxft.formats.safetensors import Stored
from jaxft.weights import Weight

Table = Mapping[str, Stored]
Settings = Mapping[str, Any]
DENSE_BITSANDBYTES = {"quant_method": "bitsandbytes"}


@dataclasses.dataclass(frozen=True)
class Reader:
    """How the kernels of a quantized folder are read.

    Attributes:
        name: of the library.
        parts_of: (tensors, NAME.weight) -> the names of the tensors that make up that kernel; none if it is dense.
        read_layers: (tensors, the layers' NAME.weight, (in, out), dtype) -> their weights, one after the other.
    """

    name: str
    parts_of: Callable[[Table, str], list[str]]
    read_layers: Callable[[Table, Sequence[str], tuple[int, ...], Any], Iterator[Weight]]


MODULES: dict[str, Any] = {
    "bitsandbytes": bitsandbytes,
    "gptq": gptq,
    "awq": awq,
    "compressed-tensors": compressed_tensors,
}


def check_quantization(raw: Mapping[str, Any], where: str) -> None:
    """Raises UserError where config.json says that the folder is quantized in a way that is not read."""
    settings = _settings(raw, where)
    MODULES[_method(settings, where)].check(settings, where)


def reader_of(raw: Mapping[str, Any], where: str) -> Reader:
    """The reader of a folder's quantized kernels, by its config.json; without a word there, bitsandbytes'."""
    settings = _settings(raw, where)
    name = _method(settings, where)
    module = MODULES[name]
    return Reader(name, module.parts_of, functools.partial(module.read_layers, settings))


def quantization_settings(raw: Mapping[str, Any], where: str) -> Settings | None:
    """What config.json, checked by `check_quantization`, says of how its folder is quantized; None of a dense one."""
    settings = _settings(raw, where)
    return None if settings is DENSE_BITSANDBYTES else settings


def stored_by_bitsandbytes(raw: Mapping[str, Any], where: str) -> Settings | None:
    """What config.json says of quantization, where it names bitsandbytes; None of any other folder."""
    settings = quantization_settings(raw, where)
    return settings if settings and settings.get("quant_method") == "bitsandbytes" else None


def refuse_quantized(name: str, where: str) -> NoReturn:
    """Raises UserError: what its library, by this name, has quantized is not quantized again."""
    raise UserError(
        f"{where}: is quantized already ({name}): it is loaded as it is, with quantize none; to quantize, or to begin "
        "an adapter by method.init, the dense folder is needed"
    )


def _settings(raw: Mapping[str, Any], where: str) -> Settings:
    # compression_config: an older spelling of compressed-tensors
    settings = raw.get("quantization_config") or raw.get("compression_config")
    if settings is not None and not isinstance(settings, dict):
        raise UserError(f"{where}: quantization_config is {shown(settings)}, and no object")
    return settings or DENSE_BITSANDBYTES


def _method(settings: Settings, where: str) -> str:
    method = settings.get("quant_method")
    if not isinstance(method, str) or method not in MODULES:
        raise UserError(
            f"{where}: quantization_config: quant_method {shown(method)} is not known to jaxft, which reads "
            f"{', '.join(MODULES)}; give the dense model's folder"
        )
    return method


def empty_biases(stored: Table, names: Sequence[str]) -> list[str]:
    """Biases of these kernels that are all zeros: GPTQ's libraries write them where the model has none."""
    biases = [f"{name.removesuffix('.weight')}.bias" for name in names]
    return [name for name in biases if name in stored and not np.any(stored[name].read())]
