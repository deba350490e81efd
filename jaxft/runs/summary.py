"""RUN/summary.json: what a run wrote of itself at its end, that stands in none of its other files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxft.errors import UserError, shown
from jaxft.runs.folder import written
from jaxft.runtime import storage

NAME = "summary.json"


def write_summary(folder: Path, facts: Mapping[str, Any], workdir: Path) -> None:
    """Writes {"steps", "parameters", "trained_parameters", "weights_bytes", "peak_bytes", "device", "devices"}.

    Args:
        folder: where the run's logs are written.
        facts: as above. One that is None, as the memory of a step in a process that made none, stays as the run
            wrote it before.
        workdir: RUN.
    """
    path, before = folder / NAME, read_summary(workdir / NAME)
    known = {name: before.get(name) if fact is None else fact for name, fact in facts.items()}
    with written(path):
        storage.write_text(path, json.dumps(known, indent=2) + "\n")


def read_summary(path: Path) -> dict[str, Any]:
    """The facts of the file; {} where there is none. Raises UserError where it holds something else."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not the summary that jaxft train writes: {shown(found)}")
    return found
