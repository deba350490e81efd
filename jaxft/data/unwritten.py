"""What a chat template leaves out of many rows: counted, told with a remedy, or refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxft.data.messages import KNOWN, REASONING, is_silent
from jaxft.data.written import MARKS, Missing, holds, missing
from jaxft.errors import UserError, shown

ON_UNWRITTEN = ("warn", "error")
OTHER = "take a template that writes it (config.data.chat_template)"
ASKED = "the answer otherwise than it asks for one,"
AS_WRITTEN = (
    "what is trained does not follow what is asked; let its add_generation_prompt write what it writes before an "
    "answer, or take a template of jaxft (config.data.chat_template=chatml)"
)
BEFORE = 20  # letters that are shown before the letter where two texts part
NAMES = {  # (role, what), "" for any role
    ("", "reasoning"): "the {role}'s reasoning",
    ("", "tool_calls"): "tool calls",
    ("", "tools"): "the tools",
    ("tool", "content"): "what a tool answers",
    ("", "content"): "what the {role} says",
}


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """What the chat template leaves out of some rows; `str` says it in a few words.

    Attributes:
        what: "the assistant's reasoning".
        rows: of which it is left out.
        origin: of the first.
        text: what is left out there.
        remedy: what to do.
        verb: how that is said.
    """

    what: str
    rows: int
    origin: str
    text: str
    remedy: str
    verb: str = "leaves out"

    def __str__(self) -> str:
        """What, of how many rows, and the first."""
        rows = "1 row" if self.rows == 1 else f"{self.rows} rows, the first"
        return f"the chat template {self.verb} {self.what} of {rows} at {self.origin}"


class Unwritten:
    """Compares conversations with their texts, one after the other."""

    def __init__(self, on_unwritten: str = "warn", *, assistants_alone: bool = False) -> None:
        """Begins with nothing seen.

        Args:
            on_unwritten: warn (count), or error (refuse the first).
            assistants_alone: no other's message is trained, whatever its weight says.
        """
        self._alone = assistants_alone
        self._raises = on_unwritten == "error"
        self._found: dict[str, LeftOut] = {}
        self._rows: dict[str, set[str]] = {}  # those that are counted, by what they lack
        self._keys: dict[str, None] = {}

    def note(
        self,
        origin: str,
        messages: Sequence[Mapping[str, Any]],
        text: str,
        *,
        template: str,
        tools: Sequence[Mapping[str, Any]] | None = None,
        first: int = 0,
    ) -> None:
        """Compares a conversation with its text.

        Args:
            origin: "path:line" of its row.
            messages: as `read_message` leaves them.
            text: what the template made of them.
            template: its source.
            tools: the functions that may be called.
            first: the message with which the trained part begins.

        Raises:
            UserError: all that the assistant says in the trained part is left out; or anything is, and that is
                an error by `on_unwritten`.
        """
        for message in messages:
            if self._alone and message.get("weight") == 1:
                self._keys["weight 1 of another than the assistant"] = None
            if not KNOWN.issuperset(message):
                unknown = (key for key in message if key not in KNOWN and message[key] is not None)
                self._keys |= dict.fromkeys(
                    f"{key} (of messages)" for key in unknown if key not in template
                )
        lost = missing(messages, text, tools)
        if not lost:
            return
        if names := _nothing_said(messages[first:], [(m.index - first, m) for m in lost]):
            remedy = _remedy(lost[-1], messages, template)
            raise UserError(
                f"{origin}: nothing that the assistant says in this row is written by the chat template "
                f"({' and '.join(names)} left out): {remedy}"
            )
        for part in lost:
            what, remedy = _name(part), _remedy(part, messages, template)
            if self._raises:
                where = f"message {part.index + 1}: " if part.index >= 0 else ""
                raise UserError(
                    f"{origin}: {where}the chat template leaves out {what} ({_excerpt(part)}): {remedy}; "
                    "config.data.on_unwritten=warn goes on without"
                )
            self._count(LeftOut(what, 1, origin, _excerpt(part), remedy))

    def note_asked(self, origin: str, asked: str, text: str) -> bool:
        """Whether a conversation's text does not go on from the text that asks for its answer, which is counted."""
        if text.startswith(asked):
            return False
        pairs = enumerate(zip(asked, text, strict=False))
        parted = next((i for i, (one, two) in pairs if one != two), len(text))
        start = max(parted - BEFORE, 0)
        ways = [shown(part[start:], most=60) for part in (asked, text)]
        told = f"{ways[0]} asks, {ways[1]} is trained"
        self._count(LeftOut(ASKED, 1, origin, told, AS_WRITTEN, verb="begins"))
        return True

    def _count(self, part: LeftOut) -> None:
        rows = self._rows.setdefault(part.what, set())
        rows.add(part.origin)
        known = self._found.get(part.what, part)
        self._found[part.what] = dataclasses.replace(known, rows=len(rows))

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """What was left out, in the order in which it was found."""
        return tuple(self._found.values())

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of messages that neither jaxft nor the template knows."""
        return tuple(self._keys)


def conversation(values: Mapping[str, Any], key: str = "completion") -> tuple[list[Any], int]:
    """(messages, index of the first that may be trained) of a row of messages.

    >>> conversation({"prompt": [{"role": "user"}], "completion": [{"role": "assistant"}]})
    ([{'role': 'user'}, {'role': 'assistant'}], 1)
    """
    if "messages" in values:
        return list(values["messages"]), 0
    prompt = values["prompt"]
    return [*prompt, *values[key]], len(prompt)


def told_left_out(left_out: Sequence[LeftOut], rows: int) -> Iterator[str]:
    """A line for each thing that is left out, with an example and a remedy."""
    for part in left_out:
        share = 100 * part.rows / max(rows, 1)
        yield (
            f"the chat template {part.verb} {part.what} of {part.rows} of {rows} ({share:.3g} %) rows "
            f"(first: {part.origin}, {part.text}): {part.remedy}"
        )


def _nothing_said(
    messages: Sequence[Mapping[str, Any]], lost: Sequence[tuple[int, Missing]]
) -> list[str]:
    """What is left out, if that is all that the assistant says in the trained messages; else nothing."""
    names = dict[str, None]()
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or is_silent(message):
            continue
        gone = {part.what: part for number, part in lost if number == index and part.whole}
        said = holds(message)
        if not said <= gone.keys():
            return []
        names |= dict.fromkeys(_name(gone[what]) for what in sorted(said))
    return list(names)


def _name(part: Missing) -> str:
    form = NAMES.get((part.role, part.what)) or NAMES["", part.what]
    return form.format(role=part.role)


def _excerpt(part: Missing) -> str:
    return shown(" ".join(part.text.split()), most=60)


def _remedy(part: Missing, messages: Sequence[Mapping[str, Any]], template: str) -> str:
    """What to do about it."""
    if part.what in ("tools", "tool_calls"):
        return OTHER.replace("writes it", "writes tool calls, as chatml does")
    if part.what != "reasoning":
        return OTHER
    message = messages[part.index]
    keyed = not MARKS.search(str(message.get("content") or ""))
    if keyed and not any(key in template for key in REASONING):
        return (
            "it does not know the key; write <think>...</think> at the beginning of the content, or "
            + OTHER
        )
    if any(later["role"] == "assistant" for later in messages[part.index + 1 :]):
        return (
            "it may keep that of the last turn alone; make a row of each turn, which ends there, or "
            + OTHER
        )
    return OTHER
