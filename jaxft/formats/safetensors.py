"""Files of safetensors, read out of a memory map and written tensor by tensor, without torch.

A file is 8 bytes with the header's length, the header (JSON: name -> dtype, shape, offsets) and the
data (https://huggingface.co/docs/safetensors). A model is one such file or several with an index.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxft.errors import UserError, counted, named, nearest, shown
from jaxft.runtime.processes import first
from jaxft.runtime.storage import local
from jaxft.runtime.untrusted import (
    MAX_JSON_BYTES,
    exists,
    listing,
    open_regular,
    parse_object,
    read_bytes,
    stays_inside,
)

# In the order in which the library lays them down, from the last to the first.
DTYPES = {
    "BOOL": np.dtype("bool"),
    "U8": np.dtype("uint8"),
    "I8": np.dtype("int8"),
    "I16": np.dtype("int16"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype("int32"),
    "F32": np.dtype("float32"),
    "F64": np.dtype("float64"),
    "I64": np.dtype("int64"),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = ("F64", "F32", "F16", "BF16")
MAX_AXES = 16
SHARD_BYTES = 5_000_000_000
METADATA = {"format": "pt"}
# Pickles that training leaves beside the weights.
OF_TRAINERS = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor on disk.

    Attributes:
        file: the file it stands in.
        name: its name there.
        dtype: as safetensors spells it.
        shape: as stored.
        offset: where its bytes begin in the file.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def numpy(self) -> np.dtype:
        """Its dtype as NumPy's."""
        return DTYPES[self.dtype]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.numpy.itemsize

    def read(self) -> np.ndarray:
        """The tensor as a view of the file: read when it is used, and gone when the view is."""
        if not self.nbytes:
            return np.zeros(self.shape, DTYPES[self.dtype])
        mapped = np.memmap(self.file, np.uint8, "r", self.offset, (self.nbytes,))
        return mapped.view(np.ndarray).view(DTYPES[self.dtype]).reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class Lazy:
    """A tensor to be written: its shape and dtype, and how to make it when its turn comes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def open_folder(folder: Path, stem: str = "model") -> dict[str, Stored]:
    """{name: tensor} of a folder's `model.safetensors`, else of the shards its index names, as transformers chooses.

    Where both stand there, one line on stderr says so.

    Raises UserError, one line naming file and tensor, for what is missing or damaged.
    """
    file = weights_file(folder, stem)
    index = index_name(stem)
    if file.name == index:
        return _open_shards(folder, file)
    if exists(folder / index):
        _tell_both(file, index)
    return open_file(file)


def index_name(stem: str = "model") -> str:
    """The file that says which tensor stands in which shard."""
    return f"{stem}.safetensors.index.json"


def weights_file(folder: Path, stem: str = "model") -> Path:
    """The file by which a folder's tensors are read: the whole in one, or else the index of its shards.

    Raises UserError where neither stands there, with what to do about what does.
    """
    for name in (f"{stem}.safetensors", index_name(stem)):
        if exists(folder / name):
            return folder / name
    raise UserError(f"{folder}: {_without_weights(folder, stem)}")


@functools.lru_cache(maxsize=256)
def _tell_both(file: Path, index: str) -> None:
    """Says once that a folder holds its weights twice."""
    library = "transformers" if file.stem == "model" else "PEFT"
    print(
        f"jaxft: {file.parent} holds its weights twice, in {file.name} and in the shards of {index}: {file.name} is "
        f"read, as {library} does; take away the one that is old",
        file=sys.stderr,
    )


def _without_weights(folder: Path, stem: str) -> str:
    """What to do about a folder that lacks `model.safetensors` and its index."""
    names = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    weights = [name for name in pickles if not name.startswith(OF_TRAINERS)]
    if weights:
        return (
            f"{weights[0]} is a pickle, which can run code when it is read; jaxft "
            "reads safetensors alone: load it in its own library and save_pretrained() it"
        )
    if any(re.fullmatch(rf"{stem}-\d+-of-\d+\.safetensors", name) for name in names):
        return f"shards without their index: {index_name(stem)} is missing, which comes with them"
    variants = [name for name in names if re.fullmatch(rf"{stem}\..+\.safetensors", name)]
    if variants:
        return f"no {stem}.safetensors; to read the variant {variants[0]}, rename it to that"
    index = [name for name in names if re.fullmatch(rf"{stem}\.safetensors\.index\..+\.json", name)]
    if index:
        return f"no {stem}.safetensors; to read the variant of {index[0]}, rename that to {index_name(stem)}"
    if stem == "model" and "adapter_model.safetensors" in names:
        return "an adapter without its base: name the base as the model, and this folder as adapter"
    return f"no {stem}.safetensors; there are: {listing(folder)}"


def _open_shards(folder: Path, index: Path) -> dict[str, Stored]:
    written = parse_object(read_bytes(index, MAX_JSON_BYTES), str(index), unique=True)
    where = written.get("weight_map")  # absent: the next line says so
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise UserError(f"{index}: no weight_map of names to files")
    where = {name: shard.removeprefix("./") for name, shard in where.items()}
    found: dict[str, Stored] = {}
    for shard in dict.fromkeys(where.values()):
        _check_shard(folder, index, shard)
        for name, stored in open_file(folder / shard).items():
            if name in found:
                raise UserError(
                    f"{folder}: {named(name)} stands in {found[name].file.name} and in {shard}"
                )
            found[name] = stored
    for name, shard in where.items():
        if name not in found or found[name].file.name != shard:
            raise UserError(
                f"{folder / shard}: {named(name)} is missing, which {index.name} places there"
            )
    return found


def _check_shard(folder: Path, index: Path, shard: str) -> None:
    """A shard is a name in the folder, and stands there (or in the cache that the folder is of)."""
    if not shard or Path(shard).name != shard or "\\" in shard or not shard.isprintable():
        below = shard.isprintable() and shard and not {"..", ""} & set(re.split(r"[/\\]", shard))
        said = (
            "stands in a folder below: put the file beside the index"
            if below
            else "leads out of the folder"
        )
        raise UserError(f"{index}: {shown(shard)} {said if shard else 'is the name of no file'}")
    if not exists(folder / shard):
        raise UserError(f"{folder}: the shard {named(shard)} is missing, which {index.name} names")
    if not stays_inside(folder, folder / shard):
        raise UserError(
            f"{index}: {shown(shard)} is a link that leads out of the folder, to "
            f"{shown(os.path.realpath(folder / shard))}: put the file itself there"
        )


def open_file(file: Path) -> dict[str, Stored]:
    """{name: tensor} of one file, its header checked whole. Raises UserError if it is damaged."""
    stream, size = open_regular(file)
    with stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(
                f"{file}: truncated or no safetensors file: "
                f"the header has {length} bytes, the file {size}"
            )
        if length > MAX_JSON_BYTES:
            raise UserError(
                f"{file}: a header of {length} bytes; at most {MAX_JSON_BYTES} are read"
            )
        text = stream.read(length)
    header = parse_object(text, f"{file}: the header", unique=True)
    header.pop("__metadata__", None)
    tensors = {name: _entry(file, name, entry, 8 + length) for name, entry in header.items()}
    _check_coverage(file, list(tensors.values()), 8 + length, size)
    return tensors


def _entry(file: Path, name: str, entry: Any, start: int) -> Stored:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, begin, end)
        sound = isinstance(dtype, str) and len(shape) <= MAX_AXES
        sound = sound and all(type(number) is int and 0 <= number < 2**63 for number in numbers)
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise UserError(f"{file}: {named(name)}: a damaged entry in the header")
    if dtype not in DTYPES:
        raise UserError(
            f"{file}: {named(name)}: dtype {named(dtype)} is not known to jaxft ({', '.join(DTYPES)})"
        )
    stored = Stored(file, name, dtype, shape, start + begin)
    if end - begin != stored.nbytes:
        raise UserError(
            f"{file}: {named(name)}: {dtype} {shown(list(shape))} takes {stored.nbytes} bytes, "
            f"the header gives it {end - begin}"
        )
    return stored


def _check_coverage(file: Path, tensors: list[Stored], start: int, size: int) -> None:
    """The tensors follow one another without gap or overlap to the end of the file."""
    for stored in sorted(tensors, key=lambda stored: (stored.offset, stored.nbytes)):
        if stored.offset != start:
            what = "overlaps another tensor" if stored.offset < start else "leaves a gap before it"
            raise UserError(f"{file}: {named(stored.name)}: {what}")
        start += stored.nbytes
        if start > size:
            raise UserError(
                f"{file}: truncated: {named(stored.name)} ends at byte {start}, the file at {size}"
            )
    if start != size:
        raise UserError(f"{file}: {counted(size - start, 'byte')} after the last tensor")


def expect(tensors: Mapping[str, Stored], name: str, shape: tuple[int, ...], where: str) -> Stored:
    """The tensor of that name; UserError where it is missing, no floats, or of another shape."""
    if name not in tensors:
        raise UserError(f"{where}: the tensor {name} is missing{nearest(name, tensors)}")
    stored = tensors[name]
    if stored.dtype not in FLOATS:
        raise UserError(f"{stored.file}: {name} is {stored.dtype}; jaxft reads {', '.join(FLOATS)}")
    if stored.shape != shape:
        raise UserError(
            f"{stored.file}: {name} has shape {list(stored.shape)}, the model needs {list(shape)}"
        )
    return stored


def finite(stored: Stored, dtype: Any, block: int = 1 << 20) -> np.ndarray:
    """The tensor as a view of the file, looked through in blocks: UserError for a number that `dtype` does not hold."""
    array = stored.read()
    numbers, limit = array.reshape(-1), float(jnp.finfo(dtype).max)
    for start in range(0, numbers.size, block):
        part = numbers[start : start + block]
        peak = np.abs(part if part.itemsize > 2 else part.astype(np.float32)).max()
        if not peak <= limit:  # nor is NaN
            kind = "NaN" if np.isnan(peak) else "infinite numbers"
            what = f"numbers beyond {np.dtype(dtype)}" if np.isfinite(peak) else kind
            raise UserError(
                f"{stored.file}: {named(stored.name)} holds {what}, with which nothing can be computed: "
                "take an adapter from before its training diverged"
            )
    return array


def write_file(file: Path, tensors: Mapping[str, Lazy]) -> None:
    """Writes one file, one tensor at a time; it appears under its name only when it is whole.

    Order and header are those of the safetensors library, so that equal tensors give equal files.
    """
    kinds = list(DTYPES.values())
    order = sorted(tensors, key=lambda name: (-kinds.index(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": METADATA}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        shape, dtype = list(tensors[name].shape), NAMES[tensors[name].dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    part = file.with_name(f".{file.name}.part")
    with part.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            made = tensors[name].make()  # by all processes together, one of which writes
            if first():
                array = np.ascontiguousarray(made, tensors[name].dtype)
                stream.write(array.reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())
    part.rename(file)


def write_folder(
    folder: Path, tensors: Mapping[str, Lazy], assigned: Mapping[str, str], limit: int = SHARD_BYTES
) -> None:
    """Writes `model.safetensors`, or shards and their index.

    Args:
        folder: exists.
        tensors: what to write.
        assigned: {name: file} of the layout to keep; what it lacks goes where `limit` puts it.
        limit: the size in bytes from which on the model is divided.
    """
    if not assigned.keys() >= tensors.keys():
        assigned = _divide(tensors, limit)
    files: dict[str, dict[str, Lazy]] = {}
    for name in tensors:
        files.setdefault(assigned[name], {})[name] = tensors[name]
    for file, part in sorted(files.items()):
        write_file(folder / file, part)
    if list(files) != ["model.safetensors"]:
        sizes = {
            "total_parameters": sum(math.prod(tensor.shape) for tensor in tensors.values()),
            "total_size": sum(tensor.nbytes for tensor in tensors.values()),
        }
        weight_map = {name: assigned[name] for name in sorted(tensors)}
        write_json(
            folder / "model.safetensors.index.json", {"metadata": sizes, "weight_map": weight_map}
        )


def _divide(tensors: Mapping[str, Lazy], limit: int) -> dict[str, str]:
    """{name: file}: in order, a new file wherever the next tensor would go over the limit."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    if len(shards) == 1:
        return dict.fromkeys(tensors, "model.safetensors")
    return {
        name: f"model-{number:05}-of-{len(shards):05}.safetensors"
        for number, shard in enumerate(shards, 1)
        for name in shard
    }


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Writes an object as Hugging Face does, whole or not at all."""
    part = file.with_name(f".{file.name}.part")
    part.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    part.rename(file)


def new_folder(folder: str | Path) -> Path:
    """Makes the folder. Raises UserError if something stands there: nothing is overwritten."""
    path = local(folder, "a model that is written")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: is not empty; jaxft overwrites nothing: name a new folder")
    path.mkdir(parents=True, exist_ok=True)
    return path
