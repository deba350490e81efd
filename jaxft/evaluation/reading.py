"""Rows of data to the questions that they ask."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxft.data.preference_rows import preference_row, read_preferences
from jaxft.data.records import Record
from jaxft.data.sources import (
    Row,
    Rows,
    Source,
    check_messages,
    check_tools,
    read_objects,
    read_rows,
)
from jaxft.errors import UserError, nearest
from jaxft.evaluation.items import PROMPT, Item, clusters_of, items_of
from jaxft.inference.opening import conversation

Data = str | Path | Sequence[Mapping[str, Any]]


def read_items(
    rows: Data,
    *,
    as_messages: bool = False,
    cluster: str = "",
    fields: Mapping[str, str] | None = None,
) -> list[Item]:
    """The questions of a file or of dicts; arguments are those of `evaluate`."""
    source: Any = rows if isinstance(rows, str | Path) else _given(rows)
    found: Iterable[Row]
    first = next(iter(_records(source)), ("", {}))[1]
    if {"chosen", "rejected"} <= first.keys():
        found = _pairs(source, as_messages, fields)
    elif "prompt" in first and "completion" not in first and not fields:
        found = _prompts(_records(source))
    elif isinstance(source, Source):
        found = Rows((source,), "auto", dict(fields or {}), as_messages)
    else:
        found = read_rows(source, fields=fields, held_out=True, as_messages=as_messages)
    clusters = clusters_of(_records(source), cluster) if cluster else None
    return items_of(found, clusters, dict(_records(source)))


def _given(rows: Sequence[Mapping[str, Any]]) -> Source:
    """Dicts as a source, whose rows are called "row 1", ..."""
    records = [(f"row {number}", dict(row)) for number, row in enumerate(rows, start=1)]
    if not records:
        raise UserError("evaluate: there are no rows")
    return Source("rows", (), lambda: iter(records))


def _records(source: Any) -> Iterable[Record]:
    return source.read() if isinstance(source, Source) else read_objects(source)


def _prompts(records: Iterable[Record]) -> list[Row]:
    """Rows that say what to ask, and leave it to graders what is right."""
    found = []
    for origin, values in records:
        row = Row(origin, PROMPT, dict(values))
        check_tools(row)
        if "prompt" not in values:
            raise UserError(f"{origin}: the row has no prompt{nearest('prompt', values)}")
        if not isinstance(values["prompt"], str):
            check_messages(row, "prompt")
        asked: dict[str, Any] = {
            key: row.values[key] for key in ("prompt", "tools") if key in row.values
        }
        if system := values.get("system"):
            asked["prompt"] = conversation(asked["prompt"], system)
        found.append(dataclasses.replace(row, values=asked))
    return found


def _pairs(source: Any, as_messages: bool, fields: Mapping[str, str] | None) -> list[Row]:
    if isinstance(source, Source):
        return [
            preference_row(origin, values, judged=False, as_messages=as_messages)
            for origin, values in source.read()
        ]
    rows, _ = read_preferences(
        source, judged=False, skip=False, held_out=True, as_messages=as_messages, fields=fields
    )
    return rows
