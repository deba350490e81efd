"""A run's folder: made anew, or recognised as one to go on with."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxft.configuration import difference, from_json, to_json
from jaxft.errors import UserError
from jaxft.runtime import processes, storage

# Keys that may differ when a run goes on: they do not change what is computed.
HONOURED = ("mesh.", "report_to", "checkpoint.keep", "checkpoint.asynchronous", "checkpoint.local")
LENGTH = ("steps:", "epochs:")  # these may too: they make a run longer


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
    """Tells what cannot be written in one line: the path, why, and the bytes that are free there.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with storage.failing(path):
            yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        if processes.surely_lost(error):  # they write together: it is not the place that fails
            raise
        found = re.search(r"OS error \d+: ([^\]]+)", str(error))
        reason = getattr(error, "strerror", None) or (found and found[1]) or str(error)
        line = (reason.strip() or type(error).__name__).split("\n")[0]
        room = "" if storage.is_remote(path) else f" ({storage.free_bytes(path):,} bytes are free)"
        raise UserError(f"{path}: cannot be written: {line}{room}") from error


def config_in(workdir: Path) -> ConfigDict | None:
    """The configuration of the run in a folder; None where there is none."""
    file = workdir / "config.json"
    return from_json(file.read_text(), str(file), older=True) if file.exists() else None


def check_folder(config: ConfigDict, workdir: Path) -> None:
    """Whether the folder is new, or a run of this configuration. Writes nothing.

    Raises:
        UserError: a file stands there, or a folder that is not a run, or a run whose configuration differs
            (every key that does, is shown; those of HONOURED and LENGTH may).
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"{workdir}: a file stands where the run's folder should be")
    old = config_in(workdir)
    if old is not None:
        lines = difference(old, config)
        if any(not line.startswith(HONOURED + LENGTH) for line in lines):
            raise UserError(
                f"{workdir}: this run has another configuration; go on with the old one (config.steps or "
                f"config.epochs alone may be more) or take another folder: {'; '.join(lines)}"
            )
    elif workdir.exists() and any(workdir.iterdir()):
        names = ", ".join(sorted(path.name for path in workdir.iterdir())[:4])
        raise UserError(f"{workdir}: not a run (no config.json), and not empty: {names}")


def open_folder(config: ConfigDict, workdir: Path) -> None:
    """Makes a new run's folder with its config.json; leaves one that exists as it is."""
    if (workdir / "config.json").exists():
        return
    with written(workdir):
        storage.make(workdir)
        storage.write_text(workdir / "config.json", to_json(config))


def tidy(workdir: Path) -> None:
    """Removes what a run that was killed left half written beside its checkpoints."""
    for left in (*workdir.glob(".adapter.*"), *workdir.glob("*.tmp")):
        with written(left):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


@contextlib.contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes `folder`'s place when the body is done, and vanishes if it fails."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    old = folder.with_name(folder.name + ".old.tmp")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


class Samples:
    """RUN/samples.jsonl: what the model says at each evaluation.

    Args:
        path: the file; lines of evaluations that are not in `evaluated` are cut off.
        evaluated: steps whose evaluation is whole.
    """

    def __init__(self, path: Path, evaluated: Container[int]) -> None:
        lines = path.read_text("utf-8", "replace").split("\n") if path.exists() else []
        kept = [line for line in lines if _step(line) in evaluated]
        with written(path):
            storage.write_text(path, "".join(line + "\n" for line in kept))
        self._path = path

    def write(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Appends {"step", "prompt", "completion", "reference"} a row."""
        lines = [json.dumps({"step": step, **row}, ensure_ascii=False) + "\n" for row in rows]
        with written(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))


class Journal:
    """RUN/rollouts.jsonl: what was sampled and what it was worth; there is none where nothing is sampled.

    Args:
        path: the file; lines of later steps are cut off, so that a run that goes on has each once.
        step: how many updates have been made.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        if not path.exists():
            return
        kept = path.with_name(path.name + ".tmp")
        with written(path):
            with (
                path.open(encoding="utf-8", errors="replace") as old,
                kept.open("w", encoding="utf-8") as new,
            ):
                new.writelines(
                    line
                    for line in old
                    if line.endswith("\n") and (_step(line) or step + 1) <= step
                )
            os.replace(kept, path)

    def write(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends {"step", ...} a row."""
        if rows:
            lines = [
                json.dumps({"step": step, **row}, ensure_ascii=False, default=str) + "\n"
                for row in rows
            ]
            with written(self._path), self._path.open("a", encoding="utf-8") as file:
                file.write("".join(lines))


def _step(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return None
