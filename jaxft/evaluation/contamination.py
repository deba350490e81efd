"""Which held-out items stand in the training data, whole or in part."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jaxft.data.sources import Row, read_rows
from jaxft.evaluation.items import Item

WORDS = (
    13  # of a run that no two texts share by chance: GPT-3's measure (arXiv 2005.14165, appendix C)
)
EXACT, PART = "exact", f"{WORDS} words in a row"


@dataclasses.dataclass(frozen=True)
class Found:
    """An item that stands in the training data.

    Attributes:
        origin: of the item.
        kind: "exact", or "13 words in a row".
        training: where it first stands there.
    """

    origin: str
    kind: str
    training: str


def found_in_training(
    items: Sequence[Item],
    training: Any,
    as_messages: bool = False,
    fields: Mapping[str, str] | None = None,
) -> list[Found]:
    """The items that stand in training rows, each with the first row that has it.

    An item is there exactly if a training row has the same words from prompt to answer, whatever the case, the
    punctuation and the spaces; else in part, if any 13 words in a row of it are there. The training rows are read one
    by one and never held.

    Args:
        items: the held-out ones.
        training: whatever `read_rows` takes.
        as_messages: as of `read_rows`.
        fields: likewise.
    """
    rows = read_rows(training, fields=fields, as_messages=as_messages)
    return list(_found(items, rows))


def _found(items: Sequence[Item], rows: Iterable[Row]) -> Iterator[Found]:
    whole: dict[tuple[str, ...], list[int]] = {}
    parts: dict[tuple[str, ...], list[int]] = {}
    for number, item in enumerate(items):
        for row in item.rows:
            words = words_of(row)
            whole.setdefault(words, []).append(number)
            for run in _runs(words):
                parts.setdefault(run, []).append(number)
    exact: dict[int, str] = {}
    partly: dict[int, str] = {}
    for row in rows:
        words = words_of(row)
        for number in whole.get(words, ()):
            exact.setdefault(number, row.origin)
        for run in _runs(words):
            for number in parts.get(run, ()):
                partly.setdefault(number, row.origin)
    for number, item in enumerate(items):
        if number in exact:
            yield Found(item.origin, EXACT, exact[number])
        elif number in partly:
            yield Found(item.origin, PART, partly[number])


def words_of(row: Row) -> tuple[str, ...]:
    """The words of all that a row says, in small letters; what the system says is left out, as many rows share it."""
    return tuple(word for text in _texts(row.values) for word in re.findall(r"\w+", text.lower()))


def _texts(values: Mapping[str, Any]) -> Iterator[str]:
    for key in ("prompt", "completion", "chosen", "messages", "text"):
        value = values.get(key)
        if isinstance(value, str):
            yield value
        for message in value if isinstance(value, list) else ():
            if message.get("role") != "system":
                yield str(message.get("content") or "")


def _runs(words: tuple[str, ...]) -> set[tuple[str, ...]]:
    return {words[start : start + WORDS] for start in range(len(words) - WORDS + 1)}
