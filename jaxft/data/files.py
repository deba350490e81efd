"""Names of data to the files behind them: a file, a folder, a glob, on a file system or in an object store."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Sequence
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from jaxft.errors import UserError, counted, nearest
from jaxft.runtime import hub

# What is read, by the end of the name; any of them may be compressed.
KINDS = {
    ".jsonl": "JSON lines",
    ".ndjson": "JSON lines",
    ".json": "JSON lines",  # or one list of rows
    ".csv": "CSV",
    ".tsv": "CSV",
    ".parquet": "Parquet",
    ".arrow": "Arrow",
}
COMPRESSED = (".gz", ".bz2", ".xz")
# Files that stand with data and have none.
BESIDE = (
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "features.json",
)
HUB = re.compile(r"[A-Za-z0-9][\w-]*/[A-Za-z0-9][\w.-]*")  # OWNER/NAME
PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs"}
TRAINING = ("train", "training")
HELD_OUT = ("validation", "valid", "val", "dev", "eval", "heldout", "test")


@dataclasses.dataclass(frozen=True)
class File:
    """A file to be read.

    Attributes:
      name: as the user would write it.
      path: where `system` has it.
      system: the file system, of fsspec.
    """

    name: str
    path: str
    system: Any

    def open(self) -> IO[bytes]:
        """The file's bytes, as they are stored."""
        opened: IO[bytes] = self.system.open(self.path, "rb")
        return opened

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine."""
        return isinstance(self.system, LocalFileSystem)

    @property
    def suffix(self) -> str:
        """The end of the name that tells its kind: ".csv" of a.csv.gz; "" if it tells none."""
        name = self.name.lower()
        for end in COMPRESSED:
            name = name.removesuffix(end)
        ending = os.path.splitext(name)[1]
        return ending if ending in KINDS else ""


def find_files(name: str, held_out: bool = False) -> tuple[list[File], list[str]]:
    """The files that a name means, in the order in which they are read, and what is to be said.

    A folder means every file in and below it whose name has a known ending. Where it holds splits
    (a saved DatasetDict, or files and folders called train, validation, test), one of them is
    taken: that of `FOLDER:SPLIT`, else the training or the held-out one.

    Args:
      name: a path, a glob, `FOLDER:SPLIT`, a URL that fsspec knows (gs://, s3://), or a data set of the hub,
        hf://datasets/OWNER/NAME[@REVISION][/PATH][:SPLIT].
      held_out: which split to take where none is named.

    Raises:
      UserError: there is no such file, nothing in it, or the package for its storage is missing.
    """
    if name.startswith("hf://"):
        name = hub.data_path(name, [kind + end for kind in KINDS for end in ("", *COMPRESSED)])
    system, path = _place(name)
    try:
        if system.isdir(path):
            return _folder(name, system, path, "", held_out)
        if system.isfile(path):
            return [File(name, path, system)], []
        if system.exists(path):
            raise UserError(f"{name}: neither a file nor a folder")
        folder, colon, split = name.rpartition(":")
        if colon and "/" not in split and system.isdir(_place(folder)[1]):
            return _folder(folder, system, _place(folder)[1], split, held_out)
        if any(mark in name for mark in "*?["):
            return _glob(name, system, path)
        raise UserError(f"{name}: no such file{_on_hub(name) or _near(name, system, path)}")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{name}: cannot be read: {reason}") from error
    except UserError:
        raise
    except Exception as error:  # a client of an object store raises what it likes
        raise _remote(name, error) from error


def _place(name: str) -> tuple[Any, str]:
    """The file system and the path in it."""
    if "://" not in name:
        return LocalFileSystem(), os.path.abspath(os.path.expanduser(name))
    scheme = name.partition("://")[0]
    try:
        system, path = fsspec.core.url_to_fs(name)
        return system, path
    except ImportError as error:
        package = PACKAGES.get(scheme, "that fsspec names")
        raise UserError(
            f"{name}: {scheme}:// needs the package {package}, which is not installed: "
            f"pip install {package if scheme in PACKAGES else 'it'} ({error})"
        ) from error
    except ValueError as error:
        close = nearest(scheme, fsspec.available_protocols())
        raise UserError(f"{name}: no such kind of storage: {scheme}://{close}") from error
    except Exception as error:
        raise _remote(name, error) from error


def _remote(name: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:300]
    return UserError(f"{name}: cannot be read: {type(error).__name__}: {reason}")


def _files(name: str, system: Any, paths: Iterable[str]) -> list[File]:
    """Files with the names that fit how the user wrote `name`."""
    if not isinstance(system, LocalFileSystem):
        return [File(system.unstrip_protocol(path), path, system) for path in paths]
    absolute = os.path.isabs(os.path.expanduser(name))
    return [File(p if absolute else os.path.relpath(p), p, system) for p in paths]


def _folder(
    name: str, system: Any, path: str, split: str, held_out: bool
) -> tuple[list[File], list[str]]:
    """The files of a folder, by what it is: a saved DatasetDict, a saved dataset, any other."""
    inside = [File(p[len(path) :].lstrip("/"), p, system) for p in sorted(system.find(path))]
    names = {file.name: file for file in inside}
    if "dataset_dict.json" in names:
        splits = _named(names["dataset_dict.json"], name, "splits")
        chosen = choose_split(name, split, splits, held_out)
        files, notes = _folder(f"{name}/{chosen}", system, f"{path}/{chosen}", "", held_out)
        return files, [f"split {chosen}", *notes]
    if "state.json" in names and not split:
        entries = _named(names["state.json"], name, "_data_files")
        missing = [entry for entry in entries if entry not in names]
        if missing:
            raise UserError(f"{name}: state.json names {missing[0]}, which is not there")
        return _files(name, system, [names[entry].path for entry in entries]), []
    return _any_folder(name, system, inside, split, held_out)


def _named(file: File, folder: str, key: str) -> list[str]:
    """The names under `key` of a saved dataset's JSON file, all of them of things in the folder."""
    with file.open() as opened:
        content = json.load(opened)
    listed = content.get(key) if isinstance(content, dict) else None
    names = [entry.get("filename") if isinstance(entry, dict) else entry for entry in listed or []]
    if not names or not all(isinstance(n, str) and os.path.basename(n) == n != ".." for n in names):
        raise UserError(f"{folder}/{file.name}: {key} must be a list of names")
    return [str(name) for name in names]


def _any_folder(
    name: str, system: Any, inside: Sequence[File], split: str, held_out: bool
) -> tuple[list[File], list[str]]:
    """Every file with a known ending; of one split, if the names tell splits apart."""
    seen = [f for f in inside if not any(part.startswith(".") for part in f.name.split("/"))]
    data = [f for f in seen if f.suffix and os.path.basename(f.name) not in BESIDE]
    others = [f.name for f in seen if not f.suffix]
    if not data:
        found = f"; there are: {', '.join(others[:4])}" if others else ": it is empty"
        raise UserError(f"{name}: no data in this folder{found}; read are {endings()}")
    notes = [f"not read: {', '.join(others[:4])}{', ...' * (len(others) > 4)}"] * bool(others)
    splits = {f.name: _split_of(f.name) for f in data}
    if split or (all(splits.values()) and len(set(splits.values())) > 1):
        known = list(dict.fromkeys(filter(None, splits.values())))
        chosen = choose_split(name, split, known, held_out)
        data = [f for f in data if splits[f.name] == chosen]
        notes = [f"split {chosen}", *notes]
    if len(data) > 1:
        notes = [counted(len(data), "file"), *notes]
    return _files(name, system, [f.path for f in data]), notes


def _split_of(path: str) -> str:
    """The split that a file's name, or the folder that it is in, begins with.

    >>> _split_of("data/train-00000-of-00001.parquet"), _split_of("test/0.csv"), _split_of("a.csv")
    ('train', 'test', '')
    """
    parts = path.split("/")
    words = [re.split(r"[-_.]", part)[0].lower() for part in (parts[-1], *parts[-2:-1])]
    return next((word for word in words if word in (*TRAINING, *HELD_OUT)), "")


def choose_split(name: str, asked: str, splits: Sequence[str], held_out: bool) -> str:
    """The split that was asked for, else the one that training or evaluation usually takes.

    Raises:
        UserError: there is no such split, or several to choose from.
    """
    if asked and asked not in splits:
        known = (
            f"; there are: {', '.join(splits)}" if splits else ", nor any other: no name tells one"
        )
        raise UserError(f"{name}: no split {asked!r}{known}{nearest(asked, splits)}")
    usual = [split for split in (HELD_OUT if held_out else TRAINING) if split in splits]
    if not asked and not usual and len(splits) > 1:
        raise UserError(
            f"{name}: name a split, as {name}:{splits[0]}; there are {', '.join(splits)}"
        )
    return asked or (usual or list(splits))[0]


def _glob(name: str, system: Any, path: str) -> tuple[list[File], list[str]]:
    found = [p for p in sorted(system.glob(path)) if system.isfile(p)]
    if not found:
        raise UserError(f"{name}: nothing matches{_near(name, system, path)}")
    return _files(name, system, found), [counted(len(found), "file")] * (len(found) > 1)


def _on_hub(name: str) -> str:
    """What to do where a name is of a data set on the Hugging Face hub, and no path; "" else.

    >>> _on_hub("tatsu-lab/alpaca"), _on_hub("data/train.jsonl")
    ('; the data set of that name on the hub is hf://datasets/tatsu-lab/alpaca', '')
    """
    owner, _, short = name.partition("/")
    if not HUB.fullmatch(name) or short.endswith((*KINDS, *COMPRESSED)) or os.path.exists(owner):
        return ""
    return f"; the data set of that name on the hub is hf://datasets/{name}"


def _near(name: str, system: Any, path: str) -> str:
    """The nearest name in the deepest folder of the path that exists."""
    parts = path.split("/")
    for depth in range(len(parts) - 1, 0, -1):
        folder = "/".join(parts[:depth]) or "/"
        if system.isdir(folder):
            siblings = [p.rstrip("/").rpartition("/")[2] for p in system.ls(folder, detail=False)]
            wanted = parts[depth]
            if any(mark in wanted for mark in "*?["):
                shown = ", ".join(sorted(siblings)[:4])
                return nearest(wanted, siblings) or (f" (there are: {shown})" if shown else "")
            return nearest(wanted, siblings)
    return ""


def endings() -> str:
    """The endings that are read, for messages."""
    return f"{', '.join(KINDS)} (also compressed: {', '.join(COMPRESSED)})"
