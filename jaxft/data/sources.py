"""Sources of examples to rows: what the user wrote, checked, each row knowing where it stands."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxft.data.conversions import FORMATS as FORMATS
from jaxft.data.conversions import (
    OPTIONAL,
    as_message,
    fields_for,
    from_alpaca,
    from_sharegpt,
    listed,
    renamed,
    system_named,
    with_system,
)
from jaxft.data.files import File, find_files
from jaxft.data.messages import ROLES as ROLES
from jaxft.data.messages import read_message, read_tools
from jaxft.data.naming import missing_keys
from jaxft.data.records import Record, json_type, read_records
from jaxft.data.tfds import PREFIX, read_tfds
from jaxft.data.unread import refuse_unread, unread
from jaxft.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Row:
    """One example as it stands in its source.

    Attributes:
      origin: "path:line", the line (of a Parquet or Arrow file, of TFDS: the row) counted from 1.
      format: prompt_completion, messages or text, which the other formats are turned into.
      values: the format's keys alone.
      unused: keys of the row that the format does not use.
      written: the format that the source has, where it is another.
      source: which of the sources it comes from, counted from 0.
      unread: those of `unused` that look like text of the example.
    """

    origin: str
    format: str
    values: dict[str, Any]
    unused: tuple[str, ...] = ()
    written: str = ""
    source: int = 0
    unread: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Source:
    """A file, folder, glob or TFDS data set.

    Attributes:
      name: as the user wrote it.
      notes: what was chosen in it, to be said.
      read: yields its records, from the beginning at each call.
    """

    name: str
    notes: tuple[str, ...]
    read: Callable[[], Iterator[Record]]


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of some sources, one source after the other; read lazily, at each iteration anew.

    Attributes:
      sources: where they come from.
      format: "auto", or a key of FORMATS.
      fields: what the format's keys are called in the sources.
      as_messages: whether Alpaca becomes messages, and not one text.
      ignore: keys that are left out.
      strict: whether text that is not used is an error.
      rewrite: what becomes of the rows, one for one: passages put before their questions, say; None: nothing.
    """

    sources: tuple[Source, ...]
    format: str
    fields: Mapping[str, str]
    as_messages: bool
    ignore: tuple[str, ...] = ()
    strict: bool = False
    rewrite: Callable[[Iterator[Row]], Iterator[Row]] | None = None

    def __iter__(self) -> Iterator[Row]:
        """Reads the sources; the rows of each are of one format."""
        return self._read() if self.rewrite is None else self.rewrite(self._read())

    def _read(self) -> Iterator[Row]:
        for index, source in enumerate(self.sources):
            first: Row | None = None
            fields: dict[str, str] = {}
            for origin, values in source.read():
                if first is None and self.fields:
                    fields = fields_for(self.fields, values)
                values = renamed(origin, values, fields, self.ignore)
                row = _check_row(origin, values, self.format, self.as_messages, tuple(fields))
                if self.strict:
                    refuse_unread(origin, row.unread)
                if first is not None and kind_of(row) != kind_of(first):
                    raise UserError(
                        f"{origin}: mixed formats: {kind_of(row)}, but {first.origin} is "
                        f"{kind_of(first)}; sources of their own may differ (A,B)"
                    )
                first = first or row
                yield dataclasses.replace(row, source=index) if index else row
            if first is None:
                raise UserError(f"{source.name}: no examples: the {_what(source.name)} is empty")


def read_rows(
    paths: str | Path | Sequence[str | Path],
    format: str = "auto",
    fields: Mapping[str, str] | None = None,
    *,
    held_out: bool = False,
    as_messages: bool = False,
    ignore: Sequence[str] = (),
    strict: bool = False,
) -> Rows:
    """The rows of files, folders, globs and TFDS data sets, one after the other.

    A row is {"prompt", "completion"} (two strings, or two lists of messages), {"messages"}, {"text"},
    Alpaca's or ShareGPT's; a message is {"role", "content"}. Blank lines are passed over.

    Args:
      paths: a source, several, or several in one string with commas between: whatever `find_files`
        takes, or "tfds:NAME[:SPLIT]".
      format: "auto" (by the keys of a source's first row), or a key of FORMATS.
      fields: what the format's keys are called in the sources, {"prompt": "question", ...}; those
        that are called so already need not be named.
      held_out: which split to take where a source has several and names none.
      as_messages: whether Alpaca's rows become messages, for a model with a chat template.
      ignore: keys that are left out, as if they did not stand there.
      strict: refuse a row with a key that is not used and looks like text of the example.

    Raises:
      UserError: now, for a source that is not there; at iteration, for one that is empty or cannot
        be read, and for a row that lacks keys, is of another format than those before in its
        source, or has a value of a wrong type.
    """
    if format != "auto" and format not in FORMATS:
        known = ("auto", *FORMATS)
        raise UserError(
            f"data format {format!r} is unknown; known: {', '.join(known)}{nearest(format, known)}"
        )
    found = find_sources(paths, held_out)
    return Rows(found, format, dict(fields or {}), as_messages, tuple(ignore), strict)


def find_sources(
    paths: str | Path | Sequence[str | Path], held_out: bool = False
) -> tuple[Source, ...]:
    """The sources that are named; of several splits the training one, or if `held_out` another."""
    return tuple(_find_source(name, held_out) for name in _split_paths(paths))


def read_objects(path: str | Path) -> Iterator[Record]:
    """Yields ("path:line", object) for each row of a source, whatever its keys."""
    yield from _find_source(str(path), held_out=True).read()


def _split_paths(paths: str | Path | Sequence[str | Path]) -> list[str]:
    r"""The sources that are named; a comma inside of a name is written `\,`.

    >>> _split_paths("a.jsonl, b.csv"), _split_paths(r"a\,b.jsonl"), _split_paths(["a,b.jsonl"])
    (['a.jsonl', 'b.csv'], ['a,b.jsonl'], ['a,b.jsonl'])
    """
    if isinstance(paths, str):
        whole = Path(paths).exists()  # a comma may stand in a file's name
        parts = [paths] if whole else re.split(r"(?<!\\),", paths)
        found = [part.strip().replace("\\,", ",") for part in parts if part.strip()]
    else:
        found = [str(path) for path in ([paths] if isinstance(paths, Path) else paths)]
    if not found:
        raise UserError("no data file is given")
    return found


def _find_source(name: str, held_out: bool) -> Source:
    if name.startswith(PREFIX):
        read, split = read_tfds(name, held_out)
        return Source(name, (f"split {split}",), read)
    files, notes = find_files(name, held_out)
    return Source(name, tuple(notes), functools.partial(_read_files, files))


def _read_files(files: Sequence[File]) -> Iterator[Record]:
    return itertools.chain.from_iterable(map(read_records, files))


def _what(name: str) -> str:
    return "data set" if name.startswith(PREFIX) or Path(name).is_dir() else "file"


def _check_row(
    origin: str,
    values: dict[str, Any],
    format: str,
    as_messages: bool = False,
    named: Collection[str] = (),
) -> Row:
    names = FORMATS if format == "auto" else {format: FORMATS[format]}
    matching = [name for name, keys in names.items() if set(keys) <= values.keys()]
    if not matching:
        raise UserError(missing_keys(origin, values, names, as_messages))
    if len(matching) > 1 and named:  # by data.fields, which tells what is meant
        own = [name for name in matching if set(named) <= {*FORMATS[name], *OPTIONAL[name]}]
        matching = own or matching
    if len(matching) > 1:
        raise UserError(
            f"{origin}: the keys fit several formats ({', '.join(matching)}); "
            "name one as config.data.format"
        )
    written = matching[0]
    keys = (*FORMATS[written], *OPTIONAL[written])
    spoken = as_messages and not {"system", "system_prompt"}.isdisjoint(values)
    if written == "prompt_completion" and not (spoken or isinstance(values["prompt"], list)):
        keys = FORMATS[written]  # a text cannot say what a system says, nor tools
    values = system_named(values) if "system" in keys else values
    kept = {key: values[key] for key in keys if key in values}
    left = {key: value for key, value in values.items() if key not in kept}
    unused, unheard = tuple(left), unread(left, kept)
    row = Row(origin, written, kept, unused, unread=unheard)
    if written == "alpaca":
        kept = from_alpaca(origin, kept, as_messages)
        row = Row(origin, "prompt_completion", kept, unused, written, unread=unheard)
    elif written == "sharegpt":
        kept = from_sharegpt(origin, kept)
        row = Row(origin, "messages", kept, unused, written, unread=unheard)
    check_tools(row)
    _CHECKS[row.format](row)
    if "system" in row.values:
        _put_system(row)
    return row


def _put_system(row: Row) -> None:
    """Puts what the system says before the conversation; two texts become one."""
    system, values = row.values.pop("system"), row.values
    if row.format == "prompt_completion" and isinstance(values["prompt"], str):
        for key, role in (("prompt", "user"), ("completion", "assistant")):
            values[key] = [{"role": role, "content": values[key]}]
    key = "messages" if row.format == "messages" else "prompt"
    values[key] = with_system(row.origin, values[key], system)


def check_tools(row: Row) -> None:
    """Leaves the tools as a list of objects, or takes the key away if there are none."""
    given = [row.values.pop(key, None) for key in ("tools", "functions")]
    if tools := read_tools(row.origin, *given):
        row.values["tools"] = tools


def _check_prompt_completion(row: Row) -> None:
    prompt, completion = row.values["prompt"], row.values["completion"]
    if not (isinstance(prompt, str) and isinstance(completion, str)):
        prompt = listed(row.origin, "prompt", prompt)
        completion = listed(row.origin, "completion", completion)
    for key, side in (("prompt", prompt), ("completion", completion)):
        if not isinstance(side, str | list):
            raise UserError(
                f"{row.origin}: {key} must be a string or a list of messages, not {json_type(side)}"
            )
    if isinstance(prompt, str) != isinstance(completion, str):
        raise UserError(
            f"{row.origin}: prompt and completion must be two strings or two lists of messages, "
            f"not {json_type(prompt)} and {json_type(completion)}"
        )
    if isinstance(prompt, list):
        row.values.update(prompt=prompt, completion=completion)
        check_messages(row, "prompt")
        check_messages(row, "completion")


def check_messages(row: Row, key: str = "messages") -> None:
    """Leaves a list of messages under the key, each as `read_message` gives it; UserError if it is none."""
    messages = listed(row.origin, key, row.values[key])
    if not isinstance(messages, list) or not messages:
        found = "an empty list" if messages == [] else json_type(messages)
        raise UserError(f"{row.origin}: {key} must be a list of messages, not {found}")
    row.values[key] = read = []
    for number, message in enumerate(messages, start=1):
        where = f"{row.origin}: {key}, message {number}"
        if not isinstance(message, dict):
            raise UserError(f"{where} must be an object, not {json_type(message)}")
        if "from" in message and "role" not in message:  # ShareGPT's turns, under another key
            message = as_message(where, message)
        read.append(read_message(where, message))


def _check_text(row: Row) -> None:
    if not isinstance(row.values["text"], str):
        raise UserError(f"{row.origin}: text must be a string, not {json_type(row.values['text'])}")


_CHECKS = {
    "prompt_completion": _check_prompt_completion,
    "messages": check_messages,
    "text": _check_text,
}


def kind_of(row: Row) -> str:
    """The row's format, told apart by whether its two sides are messages."""
    conversational = isinstance(row.values.get("prompt"), list) and not row.written
    return f"{row.format} (messages)" if conversational else row.written or row.format


def unused_keys(rows: Iterable[Row]) -> tuple[str, ...]:
    """Keys of the rows that their format does not use, in the order of their first appearance."""
    return tuple(dict.fromkeys(key for row in rows for key in row.unused))
