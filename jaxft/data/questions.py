"""What a row asks, and what it answers."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from jaxft.data.chat import encode_chat
from jaxft.data.sources import Row
from jaxft.data.tokenizer import Tokenizer
from jaxft.runtime.sandbox import TooMuch

Item = TypeVar("Item")


def prompt_and_reference(row: Row) -> tuple[Any, str]:
    """What a held-out row asks (a text or messages), and what it answers."""
    if row.format == "messages":
        messages = row.values["messages"]
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=0)
        return messages[:last], _said(messages[last])
    if row.format == "text":
        words = row.values["text"].split(" ")
        half = max(len(words) // 2, 1)
        return " ".join(words[:half]), " " + " ".join(words[half:])
    prompt, completion = row.values["prompt"], row.values["completion"]
    return prompt, completion if isinstance(completion, str) else _said(completion[-1])


def _said(message: Mapping[str, Any]) -> str:
    """The message's content; its calls where it has none."""
    return str(message.get("content") or json.dumps(message.get("tool_calls", "")))


def prompt_length(row: Row, tokenizer: Tokenizer) -> int:
    """The tokens of what a row asks."""
    prompt, _ = prompt_and_reference(row)
    if isinstance(prompt, str):
        return len(tokenizer.encode(prompt))
    tools = row.values.get("tools")
    return len(encode_chat(tokenizer, prompt, add_generation_prompt=True, tools=tools))


def can_be_asked(row: Row, tokenizer: Tokenizer, room: int) -> bool:
    """Whether a row asks something, in no more tokens than there is room for, that can be rendered at all."""
    if not prompt_and_reference(row)[0]:  # the assistant speaks first
        return False
    try:
        return prompt_length(row, tokenizer) <= room
    except TooMuch:
        return False


def are_chats(rows: Any) -> bool:
    """Whether the first row of any source is of messages."""
    each = [dataclasses.replace(rows, sources=(one,)) for one in rows.sources] or [rows]
    firsts = [next(iter(one), None) for one in each]
    return any(
        row and isinstance(row.values.get("messages", row.values.get("prompt")), list)
        for row in firsts
    )


def rows_at(rows: Iterable[Row], indices: Sequence[int]) -> list[Row]:
    """The rows with these numbers, read once more."""
    wanted, last = set(indices), max(indices, default=-1)
    return [row for n, row in enumerate(itertools.islice(rows, last + 1)) if n in wanted]


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """`count` of the items, or all if they are fewer, spread over all.

    >>> spread("abcdef", 2), spread("ab", 3)
    (['a', 'd'], ['a', 'b'])
    """
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]
