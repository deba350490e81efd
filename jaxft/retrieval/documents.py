"""Documents: files, folders and globs to texts, each character of which knows where it stands in its source.

A document is data, never an instruction: nothing here or later renders what it contains.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fsspec.implementations.local import LocalFileSystem
from jaxtyping import Int64

from jaxft.data.files import COMPRESSED, KINDS, File
from jaxft.data.records import json_type, read_records
from jaxft.errors import UserError, nearest, shown
from jaxft.retrieval.markup import read_html
from jaxft.runtime.storage import local
from jaxft.runtime.untrusted import read_bytes, stays_inside

MAX_BYTES = 256_000_000  # of a file that is read whole
PLAIN = (".txt", ".text", ".md", ".markdown", ".rst")
HTML = (".html", ".htm", ".xhtml")
PDF = (".pdf",)
NAMES = ("id", "source", "url", "title")  # what a row of data may be called by, in this order


@dataclasses.dataclass(frozen=True)
class Document:
    """A text to be cut.

    Attributes:
      source: what it is cited by: a path, or a path and "#" with a row's id, else its line, or with a page.
      text: what is read of it.
      starts, ends: the byte of the source at which each character begins, and the one behind it, (characters,). Of
        a row of data the source is the UTF-8 of its text, of a page of a PDF likewise.
      root: the path that the user named, below which it was found.
    """

    source: str
    text: str
    starts: Int64[np.ndarray, " characters"]
    ends: Int64[np.ndarray, " characters"]
    root: str

    @property
    def digest(self) -> str:
        """The sha256 of the text and of where it stands."""
        found = hashlib.sha256(self.text.encode("utf-8"))
        found.update(np.ascontiguousarray(self.starts[:1], "<i8").tobytes())
        found.update(np.ascontiguousarray(self.ends, "<i8").tobytes())
        return found.hexdigest()


@dataclasses.dataclass
class Unreadable:
    """What could not be read, where that is passed over: (name, reason) of each, and the kinds that are not read."""

    skip: bool = False
    files: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    other: list[str] = dataclasses.field(default_factory=list)

    def note(self, name: str, error: UserError) -> None:
        """Notes the file or row of that name, or raises the error where nothing is passed over."""
        if not self.skip:
            raise UserError(f"{error}; --skip-unreadable leaves out what cannot be read") from error
        self.files.append((name, str(error)))


def read_documents(
    paths: Sequence[str], unreadable: Unreadable, text_key: str = "text"
) -> Iterator[Document]:
    """Yields the documents of files, folders and globs, root by root, each file in the order of its name.

    Read are plain text and Markdown, HTML, rows of data (JSON lines, CSV, Parquet, Arrow; whole documents, one a row),
    and PDF with the extra `pdf`. In a folder files of other kinds are passed over and noted; one that is named itself
    is refused.

    Args:
      paths: what the user named.
      unreadable: takes what cannot be read, or refuses it.
      text_key: where a row of data has its text.

    Raises:
      UserError: there is no such path, or one cannot be read.
    """
    for root in dict.fromkeys(paths):
        for file in _files_of(root, unreadable):
            seen: dict[str, None] = {}
            try:
                for document in _read(file, root, text_key, unreadable):
                    if document.source in seen:
                        error = UserError(f"{document.source}: this name stands there twice")
                        unreadable.note(document.source, error)
                        continue
                    seen[document.source] = None
                    yield document
            except UserError as error:
                unreadable.note(file.as_posix(), error)


def _files_of(root: str, unreadable: Unreadable) -> list[Path]:
    """The files that a name means, in order; refuses one of a kind that is not read, or that is not there."""
    path = local(root, "a document").expanduser()
    try:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if _is_seen(file, path))
        elif path.exists():
            inside = [path]
        elif any(mark in root for mark in "*?["):
            inside = sorted(Path(file) for file in glob.glob(str(path), recursive=True))
            inside = [file for file in inside if file.is_file()]
        else:
            there = path.parent.iterdir() if path.parent.is_dir() else ()
            close = nearest(path.name, [one.name for one in there])
            raise UserError(f"{root}: no such file or folder{close}")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{root}: cannot be read: {reason}") from error
    known = [file for file in inside if kind_of(file.name)]
    others = [file.as_posix() for file in inside if not kind_of(file.name)]
    if not known:
        found = f": there are {', '.join(others[:4])}" if others else ": it is empty"
        found = "" if path.is_file() else found
        raise UserError(f"{root}: nothing there that is read{found}; read are {kinds()}")
    unreadable.other += others
    return known


def _is_seen(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and file.is_file()


def kind_of(name: str) -> str:
    """What a file is by the end of its name: "plain", "html", "pdf", "rows", or "" for none that is read."""
    low = name.lower()
    for kind, endings in (("plain", PLAIN), ("html", HTML), ("pdf", PDF)):
        if low.endswith(endings):
            return kind
    for end in COMPRESSED:
        low = low.removesuffix(end)
    return "rows" if low.endswith(tuple(KINDS)) else ""


def kinds() -> str:
    """The endings that are read, for messages."""
    return ", ".join((*PLAIN, *HTML, *PDF, *KINDS))


def _read(file: Path, root: str, text_key: str, unreadable: Unreadable) -> Iterator[Document]:
    folder = local(root, "a document").expanduser()
    if folder.is_dir() and not stays_inside(folder, file):
        raise UserError(f"{file}: leads out of the folder")
    kind = kind_of(file.name)
    if kind == "rows":
        yield from _rows(file, root, text_key, unreadable)
    elif kind == "pdf":
        yield from _pages(file, root)
    else:
        yield (_html if kind == "html" else _plain)(file, root)


def _plain(file: Path, root: str) -> Document:
    text, first = _decoded(file)
    offsets = byte_offsets(text) + first
    return Document(file.as_posix(), text, offsets[:-1], offsets[1:], root)


def _html(file: Path, root: str) -> Document:
    markup, first = _decoded(file)
    text, starts, ends = read_html(markup)
    offsets = byte_offsets(markup) + first
    return Document(file.as_posix(), text, offsets[starts], offsets[ends], root)


def _decoded(file: Path) -> tuple[str, int]:
    """A text file, and the byte at which its text begins, which is behind a byte order mark."""
    data = read_bytes(file, MAX_BYTES)
    first = 3 if data.startswith(b"\xef\xbb\xbf") else 0
    if 0 in data:
        raise UserError(f"{file}: not text: it holds a zero byte, at {data.index(0)}")
    try:
        return data[first:].decode("utf-8"), first
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not text in UTF-8: byte {first + error.start}") from error


def byte_offsets(text: str) -> Int64[np.ndarray, " characters+1"]:
    """The byte of the text's UTF-8 at which each character begins, and the end.

    >>> byte_offsets("aé€").tolist()
    [0, 1, 3, 6]
    """
    if text.isascii():
        return np.arange(len(text) + 1)
    points = np.frombuffer(text.encode("utf-32-le"), "<u4")
    sizes = 1 + sum((points >= least).astype(np.int64) for least in (0x80, 0x800, 0x10000))
    return np.concatenate([[0], np.cumsum(sizes)])


def _of_text(source: str, text: str, root: str) -> Document:
    offsets = byte_offsets(text)
    return Document(source, text, offsets[:-1], offsets[1:], root)


def _rows(file: Path, root: str, text_key: str, unreadable: Unreadable) -> Iterator[Document]:
    name = file.as_posix()
    for origin, row in read_records(File(name, str(file.absolute()), LocalFileSystem())):
        try:
            yield _of_text(_name_of(name, origin, row), _text_of(origin, row, text_key), root)
        except UserError as error:
            unreadable.note(origin, error)


def _name_of(name: str, origin: str, row: dict[str, Any]) -> str:
    """What a row is cited by: its own name, else where it stands."""
    own = next((row[key] for key in NAMES if isinstance(row.get(key), str | int)), None)
    return origin if own is None or not str(own).strip() else f"{name}#{str(own)[:200]}"


def _text_of(origin: str, row: dict[str, Any], text_key: str) -> str:
    if text_key not in row:
        close = nearest(text_key, row)
        found = ", ".join(map(repr, list(row)[:8])) or "none"
        raise UserError(f"{origin}: no key {text_key!r}; keys found: {found}{close} (--text-key)")
    text = row[text_key]
    if not isinstance(text, str):
        raise UserError(f"{origin}: {text_key} must be a string, not {json_type(text)}")
    return text


def _pages(file: Path, root: str) -> Iterator[Document]:
    try:
        import pypdf
    except ImportError as error:
        raise UserError(
            f"{file}: PDF needs the package pypdf, which is not installed: pip install 'jaxft[pdf]'"
        ) from error
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # what is wrong is told here
    data = read_bytes(file, MAX_BYTES)
    pages = _of_pdf(file, lambda: list(pypdf.PdfReader(io.BytesIO(data)).pages))
    for number, page in enumerate(pages, start=1):
        text = _of_pdf(file, page.extract_text)
        text = text.encode("utf-8", "replace").decode("utf-8").replace("\0", "")
        yield _of_text(f"{file.as_posix()}#page={number}", text, root)


def _of_pdf(file: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:  # a damaged file raises what it likes
        raise UserError(f"{file}: not a PDF that can be read: {shown(str(error))}") from error
