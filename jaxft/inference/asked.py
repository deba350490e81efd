"""A file of prompts: what each row asks, and what of it is not asked."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxft.data.chat import Tools
from jaxft.data.records import json_type
from jaxft.data.sources import Row, check_messages, check_tools, read_objects
from jaxft.data.unread import unread
from jaxft.errors import UserError, counted, nearest
from jaxft.inference.opening import conversation

Messages = Sequence[Mapping[str, Any]]
Prompt = str | Messages


class Asked(NamedTuple):
    """What is asked instead of a prompt, where something is put before it.

    Attributes:
        prompt: what the model reads.
        answer: what is answered without asking it; None where it is asked.
        row: answer -> what the row of the answer tells besides.
    """

    prompt: Prompt
    answer: str | None
    row: Callable[[str], dict[str, Any]]


# (prompts by what an error calls each, tokens that the model reads of one at most) -> what is asked instead
Before = Callable[[Mapping[str, Prompt], int], list[Asked]]

# What answers a prompt, which `generate` is to find by itself.
ANSWERS = ("completion", "chosen", "rejected", "answer", "response", "output")


def read_prompts(path: str) -> tuple[dict[str, Prompt], list[Tools]]:
    """{file:line: prompt} of each row, and the tools of each; says which text of the rows is not asked.

    A row's `system` stands first in its conversation; a text with one is a user's message behind it, as in training.

    Args:
        path: whatever `read_objects` takes.

    Raises:
        UserError: a row without a prompt or one that cannot be read, or no row at all.
    """
    found: dict[str, Prompt] = {}
    tools: list[Tools] = []
    left: dict[str, str] = {}  # keys that are not asked, each with the location of the first
    rows = 0
    for origin, values in read_objects(path):
        row = Row(origin, "messages", dict(values))
        check_tools(row)
        found[origin], key = _prompt_of(origin, row.values)
        tools.append(row.values.get("tools"))
        used = {key, "system", "tools", "functions", *ANSWERS}
        unused = {key: value for key, value in values.items() if key not in used}
        missed = unread(unused, found[origin])
        rows += bool(missed)
        for key in missed:
            left.setdefault(key, origin)
    if not found:
        raise UserError(f"{path}: no prompts: the file is empty")
    if left:
        names, first = ", ".join(map(repr, left)), next(iter(left.values()))
        print(
            f"jaxft: {names}: text of {counted(rows, 'row')} that is not asked (first: {first}); "
            "write it into the prompt",
            file=sys.stderr,
        )
    return found, tools


def _prompt_of(origin: str, values: dict[str, Any]) -> tuple[Prompt, str]:
    """What a row asks, and the key where it stands."""
    key = next((key for key in ("prompt", "messages") if key in values), "")
    if not key:
        hints = "".join(nearest(name, ("prompt", "messages"), count=1) for name in values)
        found = ", ".join(map(repr, values)) or "none"
        raise UserError(f"{origin}: keys found: {found}; a row needs prompt or messages{hints}")
    system = _system_of(origin, values)
    if key == "prompt" and isinstance(values["prompt"], str):
        text = str(values["prompt"])
        if not system:
            return text, key
        return conversation(text, system), key
    check_messages(Row(origin, "messages", values), key)
    messages: list[dict[str, Any]] = values[key]
    if key == "messages" and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise UserError(f"{origin}: messages: nothing stands before the assistant's turn")
    asked = conversation(messages, system)
    if system and asked[0].get("content") != system:
        raise UserError(
            f"{origin}: system says otherwise than the first message: leave one of them out"
        )
    return asked, key


def _system_of(origin: str, values: Mapping[str, Any]) -> str:
    """What the row's system message is; "" without one."""
    system = values.get("system") or ""
    if not isinstance(system, str):
        raise UserError(f"{origin}: system must be a string, not {json_type(system)}")
    return system if system.strip() else ""
