"""What a chat template takes: a content in parts or as one text, arguments as objects or as JSON text.

Templates differ, and what one does not expect it writes as Python's repr, quotes once more, leaves out, or fails at.
So a template is asked once, with a small conversation of each kind.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.data.messages import Parts, dumped
from jaxft.errors import UserError
from jaxft.runtime.sandbox import render_conversations

WORDS = ("first qz7", "second qz8")
ARGUMENTS = {"key_qz7": "value qz8"}
ABSENT = "absent"
WITH_CALLS: dict[str, dict[str, Any]] = {ABSENT: {}, "": {"content": ""}, "null": {"content": None}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "ask",
            "description": "Asks.",
            "parameters": {"type": "object", "properties": {}},
        },
    }
]


def as_taken(
    messages: Sequence[dict[str, Any]], template: str, shared: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The messages in the form that the template takes.

    Contents in several parts become lists where the template goes through them, else they stay one text. Arguments
    are left as the row has them where the template writes them so, and else turned into the other of the two forms.
    An assistant that calls and says nothing has no content, an empty one or None, what the template can do with.

    Args:
        messages: as `read_message` leaves them.
        template: Jinja.
        shared: the template's other variables: special tokens.
    """
    named = tuple(sorted(shared.items()))
    taken = []
    for message in messages:
        content, calls = message.get("content"), message.get("tool_calls")
        if isinstance(content, Parts) and takes_parts(template, named, message["role"]):
            parts = [{"type": "text", "text": text} for text in content.parts]
            message = message | {"content": parts}
        if calls and isinstance(calls, list):
            message = _calling(message, template, named)
        taken.append(message)
    return taken


def _calling(
    message: dict[str, Any], template: str, shared: tuple[tuple[str, Any], ...]
) -> dict[str, Any]:
    """The message with its calls, and with the content that makes the template write these."""
    taken = takes_calls(template, shared)
    content = message.get("content", ABSENT)
    ways = [content] if content in taken else []
    found = next((way for way in (*ways, *taken) if any(taken[way])), None)
    if found is None:  # it writes no calls, which is found in its text, if there is one
        if content == ABSENT and not _rendered(template, shared, [_ASKED, _CALLS], None):
            raise UserError(
                "it writes no tool calls, and fails where a message has nothing else; take one that "
                "writes them (config.data.chat_template), as chatml does"
            )
        return message
    calls = [_call(call, *taken[found]) for call in message["tool_calls"]]
    if content not in taken:  # words before the calls
        return message | {"tool_calls": calls}
    rest = {key: value for key, value in message.items() if key != "content"}
    return rest | WITH_CALLS[found] | {"tool_calls": calls}


def _call(call: Any, texts: bool, objects: bool) -> Any:
    """The call with its arguments in a form that the template takes, if it takes one."""
    function = call.get("function", call)
    arguments = function.get("arguments")
    if isinstance(arguments, str) and objects and not texts:
        with contextlib.suppress(ValueError):  # of rows, reading refuses what is no JSON
            function = function | {"arguments": json.loads(arguments)}
    elif isinstance(arguments, dict) and texts and not objects:
        function = function | {"arguments": dumped(arguments)}
    return call | {"function": function} if "function" in call else function


@functools.lru_cache(maxsize=64)
def takes_parts(template: str, shared: tuple[tuple[str, Any], ...], role: str) -> bool:
    """Whether the template writes the texts of a content that is a list of parts, and nothing else of it."""
    said = {"role": role, "content": [{"type": "text", "text": text} for text in WORDS]}
    talks: dict[str, list[Any]] = {
        "user": [said],
        "assistant": [_ASKED, said],
        "tool": [_ASKED, _CALLS | {"content": ""}, said | {"name": "ask"}],
    }
    text = _rendered(template, shared, talks.get(role, [said, _ASKED]), None)
    return all(word in text for word in WORDS) and not _is_dumped(text, "type", "text")


@functools.lru_cache(maxsize=64)
def takes_calls(template: str, shared: tuple[tuple[str, Any], ...]) -> dict[str, tuple[bool, bool]]:
    """Which arguments the template writes, by what the content is: (those that are JSON text, objects)."""
    return {way: _takes_arguments(template, shared, message) for way, message in WITH_CALLS.items()}


def _takes_arguments(
    template: str, shared: tuple[tuple[str, Any], ...], message: dict[str, Any]
) -> tuple[bool, bool]:
    def written(arguments: Any) -> str:
        says = {"role": "assistant", **message, "tool_calls": [_asking(arguments)]}
        return _rendered(template, shared, [_ASKED, says], TOOLS)

    (key, value), text = next(iter(ARGUMENTS.items())), dumped(ARGUMENTS)
    found = written(ARGUMENTS)
    objects = key in found and value in found and not _is_dumped(found, key, value, "'")
    # A form of its own, as Gemma's, it can give to objects alone.
    return text in written(text) and (text in found or not objects), objects


def _is_dumped(text: str, key: str, value: str, quotes: str = "'\"") -> bool:
    """Whether an object's repr stands in the text."""
    return any(f"{quote}{key}{quote}: {quote}{value}{quote}" in text for quote in quotes)


def _asking(arguments: Any) -> dict[str, Any]:
    return {
        "type": "function",
        "id": "call00007",  # nine letters: Mistral's templates want as many
        "function": {"name": "ask", "arguments": arguments},
    }


_ASKED = {"role": "user", "content": "Ask."}
_CALLS = {"role": "assistant", "tool_calls": [_asking(ARGUMENTS)]}


def _rendered(
    template: str, shared: tuple[tuple[str, Any], ...], messages: list[Any], tools: Any
) -> str:
    """What the template writes; nothing where it fails."""
    own = {"messages": messages, "add_generation_prompt": False, "tools": tools}
    try:
        return render_conversations(template, [own], dict(shared))[0][0]
    except UserError:
        return ""
