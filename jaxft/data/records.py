"""A file to the objects in it, each with its location."""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import itertools
import json
import lzma
import zlib
from collections.abc import Iterator
from typing import IO, Any

from jaxft.data.files import KINDS, File, endings
from jaxft.data.tables import read_arrow, read_parquet
from jaxft.errors import UserError, counted

Record = tuple[str, dict[str, Any]]  # where it stands ("path:line"), its keys and values

# How files begin that are no text.
BEGINNINGS = {
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"\xff\xff\xff\xff": "Arrow",
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "a zip archive",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"\xff\xfe": "text in UTF-16, not UTF-8",
    b"\xfe\xff": "text in UTF-16, not UTF-8",
}
DECOMPRESSORS: dict[str, tuple[str, Any]] = {
    ".gz": ("gzip", gzip.open),
    ".bz2": ("bzip2", bz2.open),
    ".xz": ("xz", lzma.open),
}


def read_records(file: File) -> Iterator[Record]:
    """Yields the objects of a file one after the other, without holding them all.

    JSON lines, CSV and a list in one JSON file (read whole) are told apart by the name and the
    beginning, Parquet and Arrow by their names; what begins otherwise than its name says is refused.

    Raises:
      UserError: the file cannot be read, or one of its lines.
    """
    try:
        with _opened(file) as opened:
            kind = _kind(file, opened)
            readers = {
                "CSV": _csv,
                "Parquet": read_parquet,
                "Arrow": read_arrow,
                "list": _json_list,
            }
            yield from readers.get(kind, _json_lines)(file.name, opened)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{file.name}: cannot be read: {reason}") from error
    except UserError:
        raise
    except Exception as error:
        if file.is_local:
            raise
        # A client of an object store raises what it likes.
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{file.name}: cannot be read: {type(error).__name__}: {reason}") from error


@contextlib.contextmanager
def _opened(file: File) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed as its name says."""
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(file.open())
        ending = file.name.lower()[-4:]
        for end, (kind, decompress) in DECOMPRESSORS.items():
            if ending.endswith(end):
                _expect(file, _begins(opened), kind)
                opened = stack.enter_context(decompress(opened, "rb"))
        yield opened


def _begins(opened: IO[bytes]) -> str:
    """What the file's first bytes say that it is; "" for what may be text."""
    head = opened.read(8)
    opened.seek(0)
    if not head:
        return "empty"
    return next((kind for begin, kind in BEGINNINGS.items() if head.startswith(begin)), "")


def _expect(file: File, found: str, kind: str) -> None:
    if found != kind:
        really = f"it is {found}" if found else "it begins otherwise"
        raise UserError(f"{file.name}: not {kind}, as its name says: {really}")


def _kind(file: File, opened: IO[bytes]) -> str:
    """The kind that the name says, if the beginning agrees."""
    named, found = KINDS.get(file.suffix, ""), _begins(opened)
    if named in ("Parquet", "Arrow"):
        _expect(file, found, named)
        return named
    if found == "empty":
        return "JSON lines"
    if named and found:
        raise UserError(f"{file.name}: not {named}, as its name says: it is {found}")
    if found:
        if found in KINDS.values():
            return found
        raise UserError(f"{file.name}: it is {found}; read are {endings()}")
    first = _first_letter(opened)
    if named == "CSV":
        if first == b"{":
            raise UserError(f"{file.name}: not CSV, as its name says: it begins as JSON lines do")
        return named
    if not named and first not in b"{[":
        raise UserError(f"{file.name}: its name does not tell what it is; read are {endings()}")
    return "list" if first == b"[" and _is_list(opened) else "JSON lines"


def _first_letter(opened: IO[bytes]) -> bytes:
    head = opened.read(4096)
    opened.seek(0)
    return head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def _is_list(opened: IO[bytes]) -> bool:
    """Whether a bracket opens a list of objects, and not the row of a faulty line."""
    head = opened.read(65536).removeprefix(b"\xef\xbb\xbf").lstrip()
    opened.seek(0)
    return head[1:].lstrip()[:1] in (b"{", b"]")


def _json_lines(name: str, opened: IO[bytes]) -> Iterator[Record]:
    """Yields ("path:line", object) for each line that is not blank."""
    for number, line in enumerate(opened, start=1):
        if line.strip():
            origin = f"{name}:{number}"
            yield origin, _object(origin, parse_json(origin, _text(origin, line, number)))


def _json_list(name: str, opened: IO[bytes]) -> Iterator[Record]:
    """Yields ("path:line", object) for each element of the one list in the file."""
    try:
        text = opened.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8: byte {error.start + 1}") from error
    at, line = _passed(text, text.index("[") + 1), 1
    before, escapes = 0, "\\u" in text
    while text[at : at + 1] != "]":
        line, before = line + text.count("\n", before, at), at
        with _told_of(f"{name}:{line}"):
            values, at = DECODER.raw_decode(text, at)
            _check_pairs(values, escapes)
        yield f"{name}:{line}", _object(f"{name}:{line}", values)
        at = _passed(text, at)
        if text[at : at + 1] == ",":
            at = _passed(text, at + 1)
        elif text[at : at + 1] != "]":
            found = repr(text[at : at + 20]) if text[at:] else "the end of the file"
            raise UserError(
                f"{name}:{line}: not JSON: after this row, a comma or ] is missing before {found}"
            )
    if text[at + 1 :].strip():
        raise UserError(
            f"{name}: not JSON: there is more behind the list: {text[at + 1 :].strip()[:20]!r}"
        )


def _passed(text: str, at: int) -> int:
    """The index of the next letter that is no white space."""
    while text[at : at + 1].isspace():
        at += 1
    return at


def _text(origin: str, line: bytes, number: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{origin}: not UTF-8: byte {error.start + 1} of the line") from error


class _Twice(ValueError):
    """A key that stands twice in an object."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _Twice(next(key for key in keys if keys.count(key) > 1))
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def parse_json(origin: str, text: str) -> Any:
    """The value that `text` is in JSON, whose objects have no key twice.

    Raises:
      UserError: it is not JSON, or holds half of a surrogate pair.
    """
    with _told_of(origin):
        values = DECODER.decode(text.strip())
        _check_pairs(values, "\\u" in text)
    return values


def _check_pairs(values: Any, escapes: bool) -> None:
    if escapes:  # only they can write half of a surrogate pair, which is no text
        json.dumps(values, ensure_ascii=False).encode("utf-8")


@contextlib.contextmanager
def _told_of(origin: str) -> Iterator[None]:
    """Turns what the decoder raises into a line with the location."""
    try:
        yield
    except UnicodeEncodeError as error:
        raise UserError(f"{origin}: not text: half of a surrogate pair (\\ud...)") from error
    except json.JSONDecodeError as error:
        line = error.doc[error.doc.rfind("\n", 0, error.pos) + 1 :].partition("\n")[0]
        at = f"line {error.lineno}, column" if error.lineno > 1 else "column"
        raise UserError(
            f"{origin}: not JSON: {error.msg.removesuffix(' at')} at {at} {error.colno}: {_excerpt(line)}"
        ) from error
    except _Twice as error:
        raise UserError(f"{origin}: the key {str(error)!r} stands twice in one object") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, deep nesting
        raise UserError(f"{origin}: not JSON that can be read: {error}") from error


def _object(origin: str, values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise UserError(
            f"{origin}: a row must be an object with keys, not {json_type(values)} "
            "(one object a line)"
        )
    return values


def _csv(name: str, opened: IO[bytes]) -> Iterator[Record]:
    """Yields ("path:line", {column: text}); the first line names the columns.

    The separator is the one of comma, semicolon and tab that the first line has most of.
    """
    csv.field_size_limit(2**31 - 1)  # as long as a text may be; the limit is the module's own
    numbered = ((n, line) for n, line in enumerate(opened, start=1))
    top, first = next(((n, line) for n, line in numbered if line.strip()), (1, b""))
    header = _text(f"{name}:{top}", first, top)
    lines = (_text(f"{name}:{number}", line, number) for number, line in numbered)
    separator = max(",;\t", key=header.count)
    reader = csv.reader(itertools.chain([header], lines), delimiter=separator, strict=True)
    start = top
    try:
        columns = next(reader, [])
        _check_columns(f"{name}:{top}", columns)
        start = top + reader.line_num
        for cells in reader:
            origin, start = f"{name}:{start}", top + reader.line_num
            if cells and len(cells) != len(columns):
                raise UserError(
                    f"{origin}: {counted(len(cells), 'cell')}, but {counted(len(columns), 'column')}"
                )
            if cells:
                yield origin, dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        reason = "lines that end with CR alone" if "new-line" in str(error) else error
        raise UserError(f"{name}:{start}: not CSV: {reason}") from error


def _check_columns(origin: str, columns: list[str]) -> None:
    for column in columns:
        if not column.strip():
            raise UserError(f"{origin}: a column without a name")
        if columns.count(column) > 1:
            raise UserError(f"{origin}: the column {column!r} stands twice")


def json_type(value: Any) -> str:
    """What a value is called in messages.

    >>> json_type(None), json_type(2.5), json_type(float("nan"))
    ('null', 'a number', 'NaN')
    """
    names = {
        dict: "an object",
        tuple: "a list",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        bytes: "bytes",
    }
    if value is None or value != value:
        return "null" if value is None else "NaN"
    other = "a number" if isinstance(value, int | float) else f"a {type(value).__name__}"
    return names.get(type(value), other)


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
