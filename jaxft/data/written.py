"""What a conversation holds and the text that a chat template makes of it does not.

Templates leave things out without a word: what stands before `</think>`, keys that they do not know, thoughts of
earlier turns, calls, tools, a system's message. `missing` looks for each part of each message in the text.

It is made to have few false alarms: parts of a user's and of the assistant's messages are looked for in their order,
all others anywhere; white space does not count; a text may stand there as JSON or as Python's repr; a content with
`<think>` in it may be written in pieces; of arguments each value is looked for. A short text that happens to
stand elsewhere behind it is taken for the one that is missing.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxft.data.messages import REASONING, Parts

MARKS = re.compile(r"(</?(?:think|thinking|reasoning|thought)>|\[/?THINK\])", re.IGNORECASE)
LONG = 24  # letters from which on a text is known wherever it stands
IN_ORDER = ("user", "assistant")


@dataclasses.dataclass(frozen=True)
class Missing:
    """Something that is not in the text.

    Attributes:
        index: of its message; -1 for the tools.
        role: of the message; "" for the tools.
        what: content, reasoning, tool_calls or tools.
        text: the first of it that is missing.
        whole: whether nothing else of the message's content (or reasoning, or calls) stands there.
    """

    index: int
    role: str
    what: str
    text: str
    whole: bool = True


def missing(
    messages: Sequence[Mapping[str, Any]],
    text: str,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[Missing]:
    r"""What of the messages and tools does not stand in the text.

    Args:
        messages: as `read_message` leaves them.
        text: what the template made of them.
        tools: the functions that may be called.

    >>> talk = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "<think>\nEasy\n</think>4"}]
    >>> [lost.text for lost in missing(talk, "user: 2+2? assistant: 4")]
    ['Easy']
    """
    found = list(_Search(text, squeezed=False).missing(messages, tools))
    if found:
        found = list(_Search(text, squeezed=True).missing(messages, tools))
    return found


def holds(message: Mapping[str, Any]) -> set[str]:
    """What a message has that is not empty: content, reasoning, tool_calls.

    >>> sorted(holds({"role": "assistant", "content": "<think>Easy</think>4"}))
    ['content', 'reasoning']
    """
    content = message.get("content")
    pieces = _pieces(content) if isinstance(content, str) else ()
    found = {what for what, piece in pieces if piece}
    if any(message.get(key) for key in REASONING):
        found.add("reasoning")
    return found | ({"tool_calls"} if message.get("tool_calls") else set())


def _squeeze(text: str) -> str:
    return "".join(text.split())


class _Search:
    """Goes through a text from its beginning to its end, as the messages do."""

    def __init__(self, text: str, *, squeezed: bool) -> None:
        self._text = _squeeze(text) if squeezed else text
        self._form = _squeeze if squeezed else str.strip
        self._escapes = "\\" in text
        self._start = 0  # behind what was found of the messages before

    def missing(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> Iterator[Missing]:
        for tool in tools or ():
            function = tool.get("function", tool)
            name = function.get("name") if isinstance(function, Mapping) else None
            if isinstance(name, str) and self._at(name, 0) < 0:
                yield Missing(-1, "", "tools", name)
                break
        for index, message in enumerate(messages):
            yield from self._of(index, message)

    def _of(self, index: int, message: Mapping[str, Any]) -> Iterator[Missing]:
        role, ends = str(message["role"]), [self._start]
        content = message.get("content")
        if isinstance(content, str) and content:
            yield from self._content(index, role, content, ends)
        reasoning = next((message[key] for key in REASONING if message.get(key)), None)
        if isinstance(reasoning, str) and not self._has(role, reasoning, ends):
            yield Missing(index, role, "reasoning", reasoning)
        calls = message.get("tool_calls")
        if isinstance(calls, list):
            lost = [text for call in calls for text in self._call(call, ends)]
            if lost:
                whole = not any(self._named(call) for call in calls)
                yield Missing(index, role, "tool_calls", lost[0], whole)
        if role in IN_ORDER:
            self._start = max(ends)

    def _content(self, index: int, role: str, content: str, ends: list[int]) -> Iterator[Missing]:
        """What is missing of a content, which may stand there in pieces."""
        if self._has(role, content, ends):
            return
        pieces = list(_pieces(content))
        lost = [
            (what, piece) for what, piece in pieces if piece and not self._has(role, piece, ends)
        ]
        for what in dict.fromkeys(what for what, _ in lost):
            texts = [piece for kind, piece in lost if kind == what]
            alike = [piece for kind, piece in pieces if kind == what and piece]
            yield Missing(index, role, what, texts[0], whole=len(texts) == len(alike))

    def _call(self, call: Any, ends: list[int]) -> Iterator[str]:
        """The names and values of a call that are missing."""
        function = call.get("function", call)
        if not self._has("assistant", function["name"], ends):
            yield function["name"]
            return
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            if self._at(arguments, self._start) >= 0:
                return
            arguments = json.loads(arguments)
        for leaf in _leaves(arguments):
            if all(self._at(form, self._start) < 0 for form in _spellings(leaf)):
                yield f"{function['name']}: {leaf}"
                return

    def _named(self, call: Any) -> bool:
        return self._at(call.get("function", call)["name"], self._start) >= 0

    def _has(self, role: str, part: str, ends: list[int]) -> bool:
        """Whether the part stands in the text; notes where it ends."""
        for form in _forms(part) if self._escapes else (part,):
            wanted = self._form(form)
            if not wanted:
                return True
            ordered = role in IN_ORDER
            at = self._text.find(wanted, self._start if ordered else 0)
            if at >= 0:
                ends.append(at + len(wanted))
                return True
            earlier = self._start + len(wanted) - 1
            if ordered and len(wanted) >= LONG and self._text.find(wanted, 0, earlier) >= 0:
                return True
        return False

    def _at(self, part: str, start: int) -> int:
        return self._text.find(self._form(part), start)


def _forms(part: str) -> Iterator[str]:
    """A text as it is, and as it stands in JSON and in Python's repr."""
    yield part
    printed = repr(str(part))[1:-1]
    quoted = str(part).replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    dumped = (json.dumps(part, ensure_ascii=False)[1:-1], json.dumps(part)[1:-1])
    yield from (form for form in (*dumped, printed, quoted) if form != part)


def _pieces(content: str) -> Iterator[tuple[str, str]]:
    """(content or reasoning, the piece) of a content in parts or with marks of thinking in it."""
    if isinstance(content, Parts):
        for part in content.parts:
            yield from _pieces(part)
        return
    parts = MARKS.split(content)
    for index in range(0, len(parts), 2):
        closed = index + 1 < len(parts) and "/" in parts[index + 1]
        yield ("reasoning" if closed else "content", parts[index].strip())


def _leaves(value: Any) -> Iterator[Any]:
    """The names and values of nested arguments."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield key
            yield from _leaves(part)
    elif isinstance(value, list):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def _spellings(leaf: Any) -> list[str]:
    """How a template may write a value."""
    if isinstance(leaf, str):
        return list(_forms(leaf))
    return list(dict.fromkeys((json.dumps(leaf), str(leaf))))
