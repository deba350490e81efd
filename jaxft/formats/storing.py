"""An adapter's folder written again with fewer bytes, and how far that moves its numbers."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.errors import UserError
from jaxft.formats.adapter_config import FILE, read_adapter_config
from jaxft.formats.adapter_file import NARROW, WHOLE, coded, open_adapter
from jaxft.formats.manifest import NAME, read_manifest, write_manifest
from jaxft.formats.peft_contents import PART, PREFIX, PROJECTION
from jaxft.formats.safetensors import Lazy, Stored, finite, write_file, write_json
from jaxft.methods import known_dtype
from jaxft.runtime.storage import fetched, local
from jaxft.runtime.untrusted import file_of, read_json
from jaxft.weights import drawn_projections

CODES = "int8"
DTYPES = ("float32", "bfloat16", "float16", CODES)


def store_folder(adapter: str | Path, output: str | Path, dtype: str = "") -> float:
    """Writes an adapter again, its own tensors in another dtype, everything beside them as it was.

    VeRA's projections are left out where they are those that its seed draws: PEFT and jaxft draw them again. In int8
    (jaxft's own file, see `adapter_file`) matrices have a scale for each rank, and vectors stay float32. Modules saved
    whole are not the adapter's own tensors, and stay as they are.

    Args:
        adapter: a PEFT folder, of whichever kind.
        output: a new or empty folder.
        dtype: float32 | bfloat16 | float16 | int8; "": as each tensor is stored.

    Returns:
        How far the adapter's numbers moved, relative to them: Frobenius norms over all its tensors.

    Raises:
        UserError: a damaged folder, or numbers that the dtype cannot hold.
    """
    if dtype and dtype != CODES:
        known_dtype(dtype, "--dtype")
    source, target = fetched(adapter), local(output, "an adapter that is written")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: is not empty; jaxft overwrites nothing: name a new folder")
    options = read_adapter_config(source)
    stored = open_adapter(source)
    drawn = _drawn(options, stored)
    tensors, moved, size = dict[str, Lazy](), 0.0, 0.0
    for name, one in stored.items():
        if name in drawn:
            continue
        made, apart, whole = _tensor(one, dtype)
        tensors |= made
        moved, size = math.hypot(moved, apart), math.hypot(size, whole)
    file = NARROW if dtype == CODES else WHOLE
    _write(source, target, file, tensors, drawn)
    before, after = (sum(f.nbytes for f in files.values()) for files in (stored, tensors))
    deviation = moved / size if size else 0.0
    without = " without the projections, which its seed draws" if drawn else ""
    print(
        f"wrote {output}{without}: {after:,} bytes of tensors where there were {before:,}, "
        f"moved by {deviation:.2g} of their size"
    )
    return deviation


def _tensor(stored: Stored, dtype: str) -> tuple[dict[str, Lazy], float, float]:
    """(what is written of a tensor, how far that is from it, its size), norms both."""
    name = stored.name
    own = PART.fullmatch(name.removeprefix(PREFIX)) or PROJECTION.fullmatch(name)
    if not own or not dtype:
        return {name: Lazy(stored.shape, stored.numpy, stored.read)}, 0.0, 0.0
    numbers = finite(stored, np.float32).astype(np.float32)
    if dtype == CODES and numbers.ndim == 2:
        made = coded(name, numbers)
        codes, scale = (one.make() for one in made.values())
        again = codes.astype(np.float32) * (scale / 127)
        return made, float(np.linalg.norm(again - numbers)), float(np.linalg.norm(numbers))
    kind = np.dtype(known_dtype("float32" if dtype == CODES else dtype, "--dtype"))
    with np.errstate(over="ignore"):
        narrow = numbers.astype(kind)
    again = narrow.astype(np.float32)
    if not np.isfinite(again).all():
        raise UserError(f"--dtype {dtype}: {name} holds numbers that it cannot: take bfloat16")
    made = {name: Lazy(numbers.shape, kind, lambda: narrow)}
    return made, float(np.linalg.norm(again - numbers)), float(np.linalg.norm(numbers))


def _drawn(options: Mapping[str, Any], stored: Mapping[str, Stored]) -> tuple[str, ...]:
    """The names of VeRA's projections where they are those that the seed in its configuration draws."""
    names = {found["part"]: name for name in stored if (found := PROJECTION.fullmatch(name))}
    if names.keys() != {"A", "B"}:
        return ()
    a, b = (stored[names[part]].read() for part in "AB")
    drawn = drawn_projections(a.shape[0], a.shape[1], len(b), options["projection_prng_key"])
    # PyTorch fuses a product and a sum on some machines, which moves a last digit.
    same = [np.allclose(x, y.T, rtol=0, atol=1e-6) for x, y in zip((a, b), drawn, strict=True)]
    return tuple(names.values()) if all(same) else ()


def _write(
    source: Path, target: Path, file: str, tensors: Mapping[str, Lazy], drawn: tuple[str, ...]
) -> None:
    """The folder: what stands beside the tensors is copied, and the manifest is made anew."""
    target.mkdir(parents=True, exist_ok=True)
    try:
        for path in source.iterdir():
            if path.is_file() and path.name not in (WHOLE, NARROW, NAME, FILE):
                shutil.copyfile(path, target / path.name)
        for folder in ("additional_chat_templates",):
            if (source / folder).is_dir():
                shutil.copytree(source / folder, target / folder)
        options = read_json(file_of(source, FILE, "an adapter"))
        write_json(target / FILE, options | ({"save_projection": False} if drawn else {}))
        write_file(target / file, tensors)
        known = read_manifest(source) if (source / NAME).exists() else {}
        write_manifest(target, **{key: value for key, value in known.items() if key != "files"})
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
