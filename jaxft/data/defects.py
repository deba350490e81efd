"""What can be wrong with rows, counted, with the location of the first."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

from jaxft.data.messages import is_silent
from jaxft.data.sources import Row
from jaxft.errors import counted


def has_empty_completion(row: Row) -> bool:
    """Whether the completion, or a turn of the assistant's that is to be trained, holds nothing but white space.

    >>> has_empty_completion(Row("a:1", "prompt_completion", {"prompt": "Why?", "completion": " "}))
    True
    """
    if row.format == "text":
        return not row.values["text"].strip()
    turns = row.values.get("messages", row.values.get("completion"))
    if isinstance(turns, str):
        return not turns.strip()
    return any(_is_empty_turn(turn) for turn in turns or ())


def _is_empty_turn(message: Mapping[str, Any]) -> bool:
    said = message["role"] == "assistant" and not message.get("tool_calls")
    content = message.get("content")
    return (
        said
        and not is_silent(message)
        and not (content.strip() if isinstance(content, str) else content)
    )


def defects_of(row: Row, diverged: bool, truncated: bool) -> dict[str, bool]:
    """What was found of its tokens, and whether the row is empty or has text unread, by name."""
    own = {"empty": has_empty_completion(row), "unread": bool(row.unread)}
    return {"diverged": diverged, "truncated": truncated} | own


def count_found(
    counts: collections.Counter[str], first: dict[str, str], row: Row, found: Mapping[str, bool]
) -> None:
    """Counts what was found of a row where `counts` has its name, and keeps the location of the first."""
    for name in (name for name, holds in found.items() if holds):
        if name in counts:
            counts[name] += 1
        first.setdefault(name, row.origin)


def nothing_left(
    formats: dict[str, str], counts: collections.Counter[str], max_length: int, loss_on: str
) -> str:
    """Says that no row has a trained token."""
    first = next(iter(formats.values()), "the data")
    where = first.rpartition(":")[0] or first
    talks = any(name in kind for kind in formats for name in ("messages", "sharegpt"))
    silent = talks and not counts["truncated"]
    return (
        f"{where}: none of {counted(counts['rows'], 'example')} has a trained token "
        f"(loss_on={loss_on}, {counts['truncated']} truncated to max_length={max_length})"
        + ": the assistant says nothing in them, or only messages of weight 0"
        * silent
    )
