"""Files of examples to rows: what the user wrote, checked, each row knowing where it stands."""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxft.errors import UserError, nearest

# What a row of each format must have. Rows are recognised by these keys, in any order.
FORMATS = {
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
}
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclasses.dataclass(frozen=True)
class Row:
    """One example as it stands in its file.

    Attributes:
      origin: "path:line", the line counted from 1.
      format: a key of FORMATS.
      values: the format's keys alone.
      unused: keys of the row that the format does not use.
    """

    origin: str
    format: str
    values: dict[str, Any]
    unused: tuple[str, ...] = ()


def read_rows(paths: str | Path | Sequence[str | Path], format: str = "auto") -> list[Row]:
    """Reads JSONL files, one after the other, as rows of one format.

    A row is {"prompt", "completion"} (two strings, or two lists of messages), {"messages"} or
    {"text"}; a message is {"role", "content"}. Blank lines are passed over.

    Args:
      paths: a path, several, or several in one string with commas between.
      format: "auto" (by the keys of the first row), or a key of FORMATS.

    Raises:
      UserError: a file that is missing, empty or not UTF-8, a line that is not a JSON object, a row
        that lacks keys, is of another format than those before, or has a value of a wrong type.
    """
    if format != "auto" and format not in FORMATS:
        known = ("auto", *FORMATS)
        raise UserError(
            f"data format {format!r} is unknown; known: {', '.join(known)}{nearest(format, known)}"
        )
    rows: list[Row] = []
    for path in _split_paths(paths):
        before = len(rows)
        for origin, values in read_objects(path):
            row = _check_row(origin, values, format)
            if rows and _kind(row) != _kind(rows[0]):
                raise UserError(
                    f"{origin}: mixed formats: {_kind(row)}, but {rows[0].origin} "
                    f"is {_kind(rows[0])}"
                )
            rows.append(row)
        if len(rows) == before:
            raise UserError(f"{path}: no examples: the file is empty")
    return rows


def _split_paths(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    if isinstance(paths, str):
        # A comma may also stand in a file's name.
        names = [paths] if Path(paths).exists() else paths.split(",")
        found = [Path(name.strip()) for name in names if name.strip()]
    else:
        found = [paths] if isinstance(paths, Path) else [Path(path) for path in paths]
    if not found:
        raise UserError("no data file is given")
    return found


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("path:line", object) for each line that is not blank."""
    if not path.is_file():
        what = "a folder, not a file" if path.is_dir() else "no such file"
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = "" if path.is_dir() else nearest(path.name, siblings)
        raise UserError(f"{path}: {what}{hint}")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    origin = f"{path}:{number}"
                    yield origin, _parse_line(origin, line, first=number == 1)
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read: {reason}") from error


def _parse_line(origin: str, line: bytes, first: bool) -> dict[str, Any]:
    try:
        text = line.decode("utf-8-sig" if first else "utf-8").strip()
        values = json.loads(text)
        if b"\\u" in line:
            json.dumps(values, ensure_ascii=False).encode(
                "utf-8"
            )  # half a surrogate pair is no text
    except UnicodeDecodeError as error:
        raise UserError(f"{origin}: not UTF-8: byte {error.start + 1} of the line") from error
    except UnicodeEncodeError as error:
        raise UserError(f"{origin}: not text: half of a surrogate pair (\\ud...)") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{origin}: not JSON: {error.msg} at column {error.colno}: {_excerpt(text)}"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, deep nesting
        raise UserError(f"{origin}: not JSON that can be read: {error}") from error
    if not isinstance(values, dict):
        raise UserError(
            f"{origin}: a row must be an object with keys, not {_json_type(values)} "
            "(one object a line)"
        )
    return values


def _check_row(origin: str, values: dict[str, Any], format: str) -> Row:
    names = FORMATS if format == "auto" else {format: FORMATS[format]}
    matching = [name for name, keys in names.items() if set(keys) <= values.keys()]
    if not matching:
        raise UserError(_missing_keys(origin, values, names))
    if len(matching) > 1:
        raise UserError(
            f"{origin}: the keys fit several formats ({', '.join(matching)}); "
            "name one as config.data.format"
        )
    keys = FORMATS[matching[0]]
    row = Row(
        origin=origin,
        format=matching[0],
        values={key: values[key] for key in keys},
        unused=tuple(key for key in values if key not in keys),
    )
    _CHECKS[row.format](row)
    return row


def _missing_keys(origin: str, values: dict[str, Any], formats: dict[str, tuple[str, ...]]) -> str:
    known = "; ".join(" + ".join(keys) for keys in formats.values())
    wanted = [key for keys in formats.values() for key in keys if key not in values]
    hints = "".join(dict.fromkeys(nearest(key, wanted, count=1) for key in values))
    found = ", ".join(map(repr, values)) or "none"
    return f"{origin}: keys found: {found}; a row needs {known}{hints}"


def _check_prompt_completion(row: Row) -> None:
    prompt, completion = row.values["prompt"], row.values["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        check_messages(row, "prompt")
        check_messages(row, "completion")
    elif not (isinstance(prompt, str) and isinstance(completion, str)):
        raise UserError(
            f"{row.origin}: prompt and completion must be two strings or two lists of messages, "
            f"not {_json_type(prompt)} and {_json_type(completion)}"
        )


def check_messages(row: Row, key: str = "messages") -> None:
    messages = row.values[key]
    if not isinstance(messages, list) or not messages:
        found = "an empty list" if messages == [] else _json_type(messages)
        raise UserError(f"{row.origin}: {key} must be a list of messages, not {found}")
    for number, message in enumerate(messages, start=1):
        where = f"{row.origin}: {key}, message {number}"
        if not isinstance(message, dict):
            raise UserError(f"{where} must be an object, not {_json_type(message)}")
        for name in ("role", "content"):
            if name not in message:
                raise UserError(f"{where} has no {name!r}{nearest(name, message)}")
            if not isinstance(message[name], str):
                found = _json_type(message[name])
                raise UserError(f"{where}: {name} must be a string, not {found}")
        role = message["role"]
        if role not in ROLES:
            raise UserError(
                f"{where}: unknown role {role!r}; known: {', '.join(ROLES)}{nearest(role, ROLES)}"
            )


def _check_text(row: Row) -> None:
    if not isinstance(row.values["text"], str):
        raise UserError(
            f"{row.origin}: text must be a string, not {_json_type(row.values['text'])}"
        )


_CHECKS = {
    "prompt_completion": _check_prompt_completion,
    "messages": check_messages,
    "text": _check_text,
}


def _kind(row: Row) -> str:
    """The row's format, told apart by whether its two sides are messages."""
    conversational = isinstance(row.values.get("prompt"), list)
    return f"{row.format} (messages)" if conversational else row.format


def unused_keys(rows: Iterable[Row]) -> tuple[str, ...]:
    """Keys of the rows that their format does not use, in the order of their first appearance."""
    return tuple(dict.fromkeys(key for row in rows for key in row.unused))


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
