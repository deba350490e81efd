"""An adapter's tensors on disk: PEFT's `adapter_model.safetensors`, or jaxft's own file with its matrices in int8.

`adapter_model.int8.safetensors` holds each matrix as codes of the shape it has, int8, under its own name, and under
the name with `.scale` a float32 for each of its ranks: a matrix is codes x scale / 127. Vectors stay as they are. PEFT
finds no file of its own in such a folder and says so, where codes under its file's name would be taken for weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxft.errors import UserError
from jaxft.formats.safetensors import Lazy, Stored, open_file, open_folder
from jaxft.runtime.untrusted import exists

STEM = "adapter_model"
WHOLE, NARROW = f"{STEM}.safetensors", f"{STEM}.int8.safetensors"
SCALE, LARGEST = ".scale", 127


@dataclasses.dataclass(frozen=True)
class Coded(Stored):
    """A matrix that lies on disk as int8; `read` gives float32.

    Attributes:
        codes: int8, of its shape.
        scales: float32, one for each row or each column: (rows, 1) or (1, columns).
    """

    codes: Stored
    scales: Stored

    def read(self) -> np.ndarray:
        scales = self.scales.read().astype(np.float32) / LARGEST
        return self.codes.read().astype(np.float32) * scales


def open_adapter(folder: Path) -> dict[str, Stored]:
    """{name: tensor} of an adapter's folder, whichever of the two files it has.

    Raises:
        UserError: neither is there, or a file is damaged.
    """
    if exists(folder / WHOLE) or not exists(folder / NARROW):
        return open_folder(folder, STEM)
    stored = open_file(folder / NARROW)
    return {
        name: _coded(one, stored) if one.dtype == "I8" else one
        for name, one in stored.items()
        if not name.endswith(SCALE)
    }


def _coded(codes: Stored, stored: Mapping[str, Stored]) -> Coded:
    scales = stored.get(codes.name + SCALE)
    if scales is None:
        raise UserError(
            f"{codes.file}: {codes.name}{SCALE} is missing, without which codes are nothing"
        )
    rows, columns = (*codes.shape, 0, 0)[:2]
    if (
        len(codes.shape) != 2
        or scales.dtype != "F32"
        or scales.shape not in ((rows, 1), (1, columns))
    ):
        raise UserError(
            f"{codes.file}: {scales.name} has shape {list(scales.shape)}, which does not go with codes of "
            f"{list(codes.shape)}"
        )
    return Coded(codes.file, codes.name, "F32", codes.shape, codes.offset, codes, scales)


def coded(name: str, matrix: np.ndarray) -> dict[str, Lazy]:
    """What is written of a matrix: its codes, and the scales of its shorter axis, which is that of the ranks."""
    along = int(np.argmax(matrix.shape))
    largest = np.abs(matrix).max(along, keepdims=True).astype(np.float32)
    scale = np.where(largest == 0, np.float32(1), largest)
    codes = np.rint(matrix / scale * LARGEST).astype(np.int8)
    return {
        name: Lazy(codes.shape, codes.dtype, lambda: codes),
        name + SCALE: Lazy(scale.shape, scale.dtype, lambda: scale),
    }
