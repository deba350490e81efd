"""Where a folder stands: on a file system (pathlib), or in an object store (gs://, s3://), reached through epath.

In an object store an object is written whole or not at all, so nothing needs a temporary name; but nothing can be
appended to, no folder renamed, and nothing locked. What follows from that for a run's folder is said where it is done:

    config.json, manifests    written as one object (`write_text`)
    logs and exports          made in a local folder, and copied (`training/logs.py`)
    a checkpoint              whole once its manifest is there, which comes last (`training/checkpoint.py`)
    one process at a time     the last that began has the run (`runs/lock.py`)
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxft.errors import UserError, nearest
from jaxft.runtime import hub

# A scheme, which is also the extra's name, and the package behind it.
EXTRAS = {"gs": "gcsfs", "s3": "s3fs"}


def place(name: str | Path) -> Path:
    """The folder of that name: a `pathlib.Path`, or for a URL the `epath.Path` that is used alike.

    Raises:
        UserError: a kind of URL that is not known, whose package is not installed, or that cannot be reached.
    """
    scheme = scheme_of(name)
    if not scheme:
        return Path(name)
    if scheme not in EXTRAS:
        close = nearest(scheme, EXTRAS) or f"; there are: {', '.join(f'{s}://' for s in EXTRAS)}"
        raise UserError(f"{name}: no such kind of storage: {scheme}://{close}")
    import fsspec
    from etils import epath

    for protocol in (scheme, EXTRAS[scheme].removesuffix("fs")):  # other processes write there too
        fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)
    path: Any = epath.Path(str(name))
    try:
        path.exists()
    except ImportError as error:
        raise UserError(
            f"{name}: {scheme}:// needs the package {EXTRAS[scheme]}, which is not installed: "
            f"pip install 'jaxft[{scheme}]'"
        ) from error
    except Exception as error:  # a client of an object store raises what it likes
        line = " ".join(str(error).split())[:300]
        raise UserError(f"{name}: cannot be reached: {type(error).__name__}: {line}") from error
    return path


def scheme_of(name: str | Path) -> str:
    """What stands before :// in a URL, else "".

    >>> scheme_of("gs://bucket/run"), scheme_of("runs/first")
    ('gs', '')
    """
    scheme, mark, _ = str(name).partition("://")
    return scheme if mark else ""


def is_remote(path: str | Path) -> bool:
    """Whether a path leads to an object store."""
    return bool(scheme_of(path))


def local(name: str | Path, what: str) -> Path:
    """The local folder of that name. Raises UserError, which begins with `what` it is, for a URL."""
    if scheme_of(name) in ("hf", "https"):
        raise UserError(
            f"{name}: {what} stands on a file system: name a folder (jaxft push uploads one)"
        )
    if is_remote(name):
        raise UserError(
            f"{name}: {what} stands on a file system: copy it (gcloud storage cp -r, aws s3 cp --recursive), "
            "or mount the bucket"
        )
    return Path(name)


def no_folder(name: str | Path, what: str) -> UserError:
    """That there is no folder of this name, and what is near.

    Args:
        name: as the user gave it.
        what: what such a folder is.
    """
    if Path(name).is_file():
        return UserError(f"{name}: is a file; {what}: give the folder in which it stands")
    beside = Path(name).parent
    there = [str(path) for path in beside.iterdir() if path.is_dir()] if beside.is_dir() else []
    near = nearest(str(name), [*there, "tiny"])
    on_hub = (
        f"; the hub's model of that name is hf://{name}" if hub.NAME.fullmatch(str(name)) else ""
    )
    return UserError(f"{name}: no such folder; {what}{near or on_hub}")


def fetched(name: str | Path) -> Path:
    """The folder of that name; of the hub's that of its cache, of one at a URL a copy that goes away with the process.

    Raises:
        UserError: there is no such folder, or a file leads out of it. OSError: the store cannot be read.
    """
    if (repository := hub.meant(name)) is not None:
        return hub.folder_of(repository)
    return _copied(name) if is_remote(name) else Path(name)


@functools.cache
def _copied(name: str | Path) -> Path:
    source = place(name)
    copy = Path(tempfile.mkdtemp(prefix="jaxft-"), source.name)
    atexit.register(shutil.rmtree, copy.parent, ignore_errors=True)
    try:
        files = files_under(source) if source.is_dir() else {}
        for inside, file in files.items():
            if ".." in file.parts:
                raise UserError(f"{file}: leads out of the folder")
            (copy / inside).parent.mkdir(parents=True, exist_ok=True)
            copy_file(file, copy / inside)
    except (OSError, UserError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
    if not files:
        raise UserError(f"{name}: no such folder")
    return copy


def absolute(path: Path) -> Path:
    """The path from the root; a URL is one already."""
    return path if is_remote(path) else path.absolute()


def make(folder: Path) -> None:
    """Makes a folder with those above it, where there are folders."""
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)


def remove(folder: Path) -> None:
    """Removes a folder with all that is in it, if it is there."""
    if is_remote(folder):
        if folder.exists():
            folder.rmtree()  # type: ignore[attr-defined]
    else:
        shutil.rmtree(folder, ignore_errors=True)


def files_under(folder: Path) -> dict[str, Path]:
    """{name from the folder on: file} of all files in and below a folder, by name."""
    if not is_remote(folder):
        found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
        return {name: found[name] for name in sorted(found) if found[name].is_file()}
    walked: Any = list(folder.walk())  # type: ignore[attr-defined]
    inside = [(root.relative_to(walked[0][0]), files) for root, _, files in walked]
    names = sorted((root / file).as_posix() for root, files in inside for file in files)
    return {name: folder / name for name in names}


def size_of(file: Path) -> int:
    """The bytes of a file."""
    status: Any = file.stat()
    return int(status.length if is_remote(file) else status.st_size)


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all."""
    if is_remote(path):
        path.write_bytes(data)
        return
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def copy_file(source: Path, target: Path) -> None:
    """Copies a file from one storage to another, piece by piece."""
    with source.open("rb") as read, target.open("wb") as write:
        shutil.copyfileobj(read, write, 1 << 24)


def free_bytes(path: Path) -> float:
    """The bytes that are free where a path leads; an object store has no end."""
    if is_remote(path):
        return math.inf
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


@contextlib.contextmanager
def failing(path: Path) -> Iterator[None]:
    """Within it, what the client of an object store raises is an OSError, as on a file system."""
    try:
        yield
    except (UserError, OSError, ValueError, RuntimeError):
        raise
    except Exception as error:
        if not is_remote(path):
            raise
        raise OSError(f"{type(error).__name__}: {error}") from error
