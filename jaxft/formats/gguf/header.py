"""What a GGUF file says before its data: metadata and the list of its tensors, read with limits.

A file is a magic number, a version, two counts, the metadata (key, kind, value), the tensors (name, sizes, kind,
offset), and behind them the data (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). It may come from
anywhere: each count is compared with the bytes that are left before anything is made of it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np

from jaxft.errors import UserError, counted, named, nearest, shown
from jaxft.runtime.untrusted import open_regular

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
MAX_HEADER_BYTES = 512_000_000  # the largest vocabularies take about 20 MB
MAX_AXES = 4
# Kind of a value -> its struct format; 8 is a text and 9 a list.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # fmt: skip
TEXT, LIST = 8, 9
PLAIN = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
ROWS = 1 << 22  # numbers that are dequantized at once


@dataclasses.dataclass(frozen=True)
class Packed:
    """A tensor in the file.

    Attributes:
        file: the file.
        name: its name there.
        kind: how its numbers are packed, as `gguf` names it: F32, Q4_K, ...
        shape: rows first, as in PyTorch.
        offset: where its bytes begin in the file.
    """

    file: Path
    name: str
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block * size

    @property
    def dtype(self) -> np.dtype:
        """The dtype that holds its numbers as they are: its own, or float32 where they are quantized."""
        return PLAIN.get(self.kind.name, np.dtype(np.float32))

    def read(self) -> np.ndarray:
        """The tensor, dequantized where it is packed, some rows at a time.

        Raises UserError for a kind that the package `gguf` does not dequantize.
        """
        octets = np.memmap(self.file, np.uint8, "r", self.offset, (self.nbytes,))
        if self.kind.name in PLAIN:
            return octets.view(np.ndarray).view(self.dtype).reshape(self.shape)
        if self.kind not in readable():
            names = ", ".join(kind.name for kind in readable())
            raise UserError(
                f"{self.file}: {named(self.name)} is packed as {self.kind.name}, which the package gguf "
                f"{gguf_version()} does not dequantize; it does {names}"
            )
        rows = octets.reshape(math.prod(self.shape[:-1]), -1)
        made = np.empty((rows.shape[0], self.shape[-1]), np.float32)
        step = max(1, ROWS // self.shape[-1])
        for start in range(0, rows.shape[0], step):
            made[start : start + step] = gguf.dequantize(rows[start : start + step], self.kind)
        return made.reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class Header:
    """A GGUF file without its data.

    Attributes:
        file: the file.
        metadata: {key: number, text, truth, or a list of them}.
        tensors: {name: tensor}.
    """

    file: Path
    metadata: dict[str, Any]
    tensors: dict[str, Packed]

    def need(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """The value of a key. Raises UserError where it is missing or of another kind."""
        value = self.metadata.get(key)
        if value is None:
            raise UserError(f"{self.file}: no {key} in its metadata{nearest(key, self.metadata)}")
        if not isinstance(value, kind):
            raise UserError(f"{self.file}: {key} is {shown(value)}")
        return value


@functools.cache
def readable() -> tuple[gguf.GGMLQuantizationType, ...]:
    """The kinds of tensors that the installed package `gguf` dequantizes."""

    def reads(kind: gguf.GGMLQuantizationType) -> bool:
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            return False
        return True

    return tuple(kind for kind in gguf.GGMLQuantizationType if reads(kind))


def gguf_version() -> str:
    """The version of the package `gguf`, for messages."""
    from importlib.metadata import version

    return version("gguf")


def read_header(file: Path) -> Header:
    """Reads a file's metadata and its list of tensors.

    Raises:
        UserError: it is no GGUF file of version 2 or 3, is cut off, or holds a tensor that leads out of the file.
    """
    stream, size = open_regular(file)
    with stream:
        reader = _Reader(file, stream.read(min(size, MAX_HEADER_BYTES)))
    if reader.octets[:4] != MAGIC:
        raise UserError(f"{file}: no GGUF file: it does not begin with the letters GGUF")
    reader.at = 4
    version = reader.number("I")
    if version not in VERSIONS:
        raise UserError(
            f"{file}: GGUF of version {version}, or of a machine of the other byte order; versions 2 and 3 are read"
        )
    tensors, keys = reader.number("Q"), reader.number("Q")
    reader.room(keys, 13)
    metadata = {reader.text(): reader.value() for _ in range(keys)}
    reader.room(tensors, 33)
    listed = [_entry(reader) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise UserError(f"{file}: general.alignment is {shown(alignment)}, and no power of two")
    start = -(-reader.at // alignment) * alignment
    found: dict[str, Packed] = {}
    for name, kind, shape, offset in listed:
        if name in found:
            raise UserError(f"{file}: {named(name)} stands there twice")
        found[name] = Packed(file, name, kind, shape, start + offset)
        if found[name].offset + found[name].nbytes > size:
            raise UserError(
                f"{file}: cut off: {named(name)} ends at byte {found[name].offset + found[name].nbytes:,}, "
                f"the file at {size:,}"
            )
    return Header(file, metadata, found)


def _entry(
    reader: _Reader,
) -> tuple[str, gguf.GGMLQuantizationType, tuple[int, ...], int]:
    """(name, kind, shape, offset) of the next tensor in the list."""
    name, axes = reader.text(), reader.number("I")
    if not 1 <= axes <= MAX_AXES:
        raise UserError(f"{reader.file}: {named(name)} has {counted(axes, 'axis', 'axes')}")
    shape = tuple(reader.number("Q") for _ in range(axes))[::-1]
    number, offset = reader.number("I"), reader.number("Q")
    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError as error:
        raise UserError(
            f"{reader.file}: {named(name)} is packed in a way (number {number}) that the package gguf "
            f"{gguf_version()} does not know: pip install --upgrade gguf may help"
        ) from error
    block = gguf.GGML_QUANT_SIZES[kind][0]
    if not all(0 < size < 2**40 for size in shape) or shape[-1] % block:
        raise UserError(
            f"{reader.file}: {named(name)}: {shown(list(shape))} is no shape of {kind.name}"
        )
    return name, kind, shape, offset


@dataclasses.dataclass
class _Reader:
    """The bytes of a header, and where the next value begins."""

    file: Path
    octets: bytes
    at: int = 0

    def room(self, count: int, least: int) -> None:
        """UserError where `count` values of at least that many bytes cannot follow."""
        if count * least > len(self.octets) - self.at:
            raise UserError(f"{self.file}: cut off or damaged at byte {self.at:,} of its header")

    def number(self, form: str) -> Any:
        self.room(1, struct.calcsize(f"<{form}"))
        (value,) = struct.unpack_from(f"<{form}", self.octets, self.at)
        self.at += struct.calcsize(f"<{form}")
        return value

    def text(self) -> str:
        size = self.number("Q")
        self.room(size, 1)
        part = self.octets[self.at : self.at + size]
        self.at += size
        return part.decode("utf-8", errors="replace")

    def value(self) -> Any:
        kind = self.number("I")
        if kind != LIST:
            return self._one(kind)()
        inner, count = self.number("I"), self.number("Q")
        if inner in SCALARS:
            self.room(count, struct.calcsize(f"<{SCALARS[inner]}"))
            values = struct.unpack_from(f"<{count}{SCALARS[inner]}", self.octets, self.at)
            self.at += struct.calcsize(f"<{count}{SCALARS[inner]}")
            return list(values)
        self.room(count, 8)
        read = self._one(inner)
        return [read() for _ in range(count)]

    def _one(self, kind: int) -> Callable[[], Any]:
        if kind == TEXT:
            return self.text
        if kind in SCALARS:
            return functools.partial(self.number, SCALARS[kind])
        raise UserError(f"{self.file}: a value of the kind {kind} in its metadata is not known")
