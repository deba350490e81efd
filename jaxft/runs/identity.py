"""What a run stands on, recorded in each checkpoint, so that it goes on upon the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxft.assets import model_folder
from jaxft.errors import UserError
from jaxft.formats.manifest import BASE, TOKENIZER, changed, fingerprint


def identity(config: ConfigDict, mesh: Mesh) -> dict[str, Any]:
    """The digests of the base's and the tokenizer's files, and the sizes of the mesh; fit for JSON."""
    base = model_folder(config.model)
    words = model_folder(config.tokenizer, weights=False) if config.tokenizer else base
    return {
        "base": fingerprint(base, BASE),
        "tokenizer": fingerprint(words, TOKENIZER),
        "mesh": dict(mesh.shape),
    }


def check_identity(
    before: Mapping[str, Any], now: Mapping[str, Any], workdir: Path, say: Callable[[str], None]
) -> None:
    """Whether a run can go on: another mesh is honoured and said, another base or tokenizer is refused.

    Args:
        before: the `identity` in the checkpoint.
        now: that of the process.
        workdir: RUN.
        say: takes a line.

    Raises:
        UserError: a line that names the files that differ.
    """
    different = {part: changed(before[part], now[part]) for part in ("base", "tokenizer")}
    if any(different.values()):
        names = "; ".join(
            f"the {part} ({', '.join(files)})" for part, files in different.items() if files
        )
        raise UserError(
            f"{workdir}: what this run began with has changed since: {names}; put the old files "
            "back, or take another folder"
        )
    if before["mesh"] != now["mesh"]:
        sizes = [
            " x ".join(f"{axis} {size}" for axis, size in mesh.items())
            for mesh in (before["mesh"], now["mesh"])
        ]
        say(f"the mesh was {sizes[0]} and is {sizes[1]}: the same run, up to rounding")
