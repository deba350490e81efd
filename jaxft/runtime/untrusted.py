"""Files of folders that come from elsewhere: read with limits, and only from where they may stand.

A file that is read has to be a regular one (no pipe, device or folder) and of a bounded size; JSON
also has a bounded number of values, so that neither takes more than about 256 MB.

Links. A file with a name of its own (config.json, model.safetensors, tokenizer.json) may be a
symbolic link to anywhere: it is the user who names the folder, and what is read is only parsed. A name that
*the folder's content* gives (a shard in an index) and a file that is *copied* onwards (the
tokenizer in a merged model's folder) must stand in the folder: a hostile folder could name or copy the
user's own files otherwise. One link out of the folder is allowed for these too: that of Hugging
Face's cache, where `models--X/snapshots/REVISION/FILE` leads to `models--X/blobs/HASH`.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any, BinaryIO

from jaxft.errors import UserError, counted, shown
from jaxft.runtime.storage import no_folder

MAX_JSON_BYTES = 32_000_000  # the largest index on the Hub has half of it
MAX_WIDE_BYTES = 8_000_000  # of JSON with letters beyond ASCII, which takes four times the memory
MAX_JSON_VALUES = 1_500_000
MAX_TEXT_BYTES = 4_000_000


def open_regular(file: Path) -> tuple[BinaryIO, int]:
    """A regular file opened for reading, and its size. UserError for anything else."""
    try:
        state = file.stat()
        if not stat.S_ISREG(state.st_mode):
            raise UserError(f"{file}: not a regular file")
        return file.open("rb"), state.st_size
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {_reason(error)}") from error


def exists(file: Path) -> bool:
    """Whether something stands there; False for what can be no path."""
    try:
        return file.exists()
    except (OSError, ValueError):
        return False


def read_bytes(file: Path, limit: int) -> bytes:
    """The whole of a regular file. UserError if it has more than `limit` bytes."""
    stream, size = open_regular(file)
    with stream:
        if size > limit:
            raise UserError(f"{file}: has {counted(size, 'byte')}; at most {limit:,} are read")
        try:
            return stream.read(limit)
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {_reason(error)}") from error


def read_text(file: Path, limit: int = MAX_TEXT_BYTES) -> str:
    """A text file in UTF-8.

    Raises:
        UserError: it is too large, no regular file, or no text.
    """
    try:
        return read_bytes(file, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not text: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; UserError if it holds anything else."""
    return parse_object(read_bytes(file, MAX_JSON_BYTES), str(file))


def parse_object(data: bytes, where: str, unique: bool = False) -> dict[str, Any]:
    """A JSON object, within the limits above.

    Args:
        data: UTF-8.
        where: begins the message of an error.
        unique: refuse a name that an object holds twice (else the last holds, as in every reader).
    """
    if len(data) > MAX_JSON_BYTES or (len(data) > MAX_WIDE_BYTES and not data.isascii()):
        raise UserError(f"{where}: {counted(len(data), 'byte')} are too many")
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES:
        raise UserError(f"{where}: more than {MAX_JSON_VALUES} values are too many")
    try:
        value = json.loads(data, object_pairs_hook=_unique if unique else None)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: an object is expected, not {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = set[str]()
        twice = next(name for name, _ in pairs if name in names or names.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{shown(twice)} stands there twice")
    return found


def file_of(folder: Path, name: str, what: str) -> Path:
    """The file of that name in a folder.

    Raises UserError for no folder, saying `what` it is, and for no such file, saying what there is.
    """
    if not folder.is_dir():
        raise no_folder(folder, what)
    file = folder / name
    if not exists(file):
        raise UserError(f"{folder}: no {name}; there are: {listing(folder)}")
    return file


def listing(folder: Path, most: int = 12) -> str:
    """The names of a folder's files, as a message shows them.

    Raises:
        UserError: the folder cannot be read.
    """
    try:
        return ", ".join(sorted(path.name for path in folder.iterdir())[:most]) or "no files"
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {_reason(error)}") from error


def stays_inside(folder: Path, file: Path) -> bool:
    """Whether a file stands in the folder, links followed, or in the blobs of its cache."""
    try:
        real, home = file.resolve(), folder.resolve()
    except (OSError, RuntimeError, ValueError):  # a circle of links
        return False
    blobs = [above.parent / "blobs" for above in home.parents if above.name == "snapshots"]
    return real.is_relative_to(home) or real.parent in blobs


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
