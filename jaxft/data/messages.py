"""One message as people write it to one as chat templates know it.

What is read besides a role and a text:

    content in parts of text      one text that remembers its parts (`Parts`); thoughts among them: reasoning_content
    function_call, role function  OpenAI's older names of tool_calls and tool
    tool_calls as JSON text       a list of calls, whose arguments are an object or the JSON text of one
    weight, train, masked, ...    weight: 0 where the message is not to be trained, weight: 1 where one is that
                                  the assistant does not say, else nothing

What is meant by these and cannot be honoured is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.data.conversions import listed
from jaxft.data.records import json_type, parse_json
from jaxft.errors import UserError, nearest, shown

ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of the same thing
TRAINED = (
    "weight", "train", "trainable", "trained", "training", "loss", "loss_weight", "loss_scale", "loss_mask",
    "compute_loss", "calculate_loss", "train_on_turn",
)  # fmt: skip
UNTRAINED = ("masked",)
EITHER = ("mask",)  # some mean by it what is trained, some what is not
DETAIL = ("train_detail", "training_detail", "train_details")  # parts of a message, by characters
KNOWN = frozenset(
    ("role", "content", "name", "id", "tool_calls", "tool_call_id", "weight", *REASONING)
)
TEXT_PARTS = ("text", "input_text", "output_text")
OTHER = "\ue000"  # stands in no text
PLAIN = frozenset(("role", "content"))


class Parts(str):
    """A content's text parts, put end to end; `parts` holds them, for templates that go through them."""

    parts: tuple[str, ...]

    @classmethod
    def of(cls, parts: Sequence[str]) -> str:
        """The parts as one text; a single part is a plain one.

        >>> Parts.of(["a ", "b"]), Parts.of(["a ", "b"]).parts
        ('a b', ('a ', 'b'))
        """
        if len(parts) < 2:
            return "".join(parts)
        joined = cls("".join(parts))
        joined.parts = tuple(parts)
        return joined


def read_message(where: str, message: dict[str, Any]) -> dict[str, Any]:
    """The message as templates know it; one that is so already stays as it is.

    Raises:
        UserError: beginning with `where`: a role that is unknown, no content and no calls, or one that
            cannot be read.
    """
    if message.keys() != PLAIN or not isinstance(message["content"], str):
        message = _with_weight(where, _with_text(where, _with_calls(where, message)))
    calls = message.get("tool_calls")
    for name in ("role",) if calls and message.get("content") is None else ("role", "content"):
        if name not in message:
            raise UserError(f"{where} has no {name!r}{nearest(name, message)}")
        if not isinstance(message[name], str):
            raise UserError(f"{where}: {name} must be a string, not {json_type(message[name])}")
    role = message["role"]
    if role not in ROLES:
        raise UserError(
            f"{where}: unknown role {shown(role)}; known: {', '.join(ROLES)}{nearest(role, ROLES)}"
        )
    if calls is not None and role != "assistant":
        raise UserError(
            f"{where}: tool_calls must be a list of the assistant's calls, and not the {role}'s"
        )
    return message


def is_silent(message: Mapping[str, Any]) -> bool:
    """Whether the message says of itself that it is not to be trained."""
    return message.get("weight") == 0


def altered(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with other words, thoughts and calls in the same order."""
    changed = dict(message)
    for key in ("content", *REASONING):
        if message.get(key):
            changed[key] = OTHER
    if calls := message.get("tool_calls"):
        changed["tool_calls"] = [_altered_call(call) for call in calls]
    return changed


def _altered_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = {OTHER: OTHER} if function["arguments"] else {}
    function = function | {"name": OTHER, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def _with_text(where: str, message: dict[str, Any]) -> dict[str, Any]:
    """The message with its content's parts as one text."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    texts, thoughts = list[str](), list[str]()
    for number, part in enumerate(content, start=1):
        kind, text = _part(f"{where}: content, part {number}", part)
        (thoughts if kind == "thinking" else texts).append(text)
    message = message | {"content": Parts.of(texts)}
    if thoughts and not any(message.get(key) for key in REASONING):
        message["reasoning_content"] = "\n".join(thoughts)
    return message


def _part(where: str, part: Any) -> tuple[str, str]:
    """(text or thinking, what it says) of a part of a content.

    >>> _part("", {"type": "text", "text": "hi", "image_url": None})
    ('text', 'hi')
    """
    if isinstance(part, str):
        return "text", part
    if not isinstance(part, dict):
        raise UserError(f"{where} must be an object, not {json_type(part)}")
    kind = part.get("type", "text" if "text" in part else None)
    if kind in TEXT_PARTS and isinstance(part.get("text"), str):
        return "text", str(part["text"])
    if kind == "thinking":
        inner = part.get("thinking")
        if isinstance(inner, list):
            return kind, "".join(_part(f"{where}, part {n}", p)[1] for n, p in enumerate(inner, 1))
        if isinstance(inner, str):
            return kind, inner
    if kind in (*TEXT_PARTS, "thinking"):
        raise UserError(f"{where}: a part of type {shown(kind)} must hold a text, as {_AS_TEXT}")
    named = f"is of type {shown(kind)}" if kind is not None else "has no type"
    raise UserError(
        f"{where} {named}, and only text can be trained on: {_AS_TEXT}; "
        "leave the part out, or the row"
    )


_AS_TEXT = '{"type": "text", "text": ...}'


def _with_weight(where: str, message: dict[str, Any]) -> dict[str, Any]:
    """The message with `weight`, where it says otherwise than its role, and without other names for that."""
    for key in DETAIL:
        if message.get(key):
            raise UserError(
                f"{where}: {key} (parts of a message by their characters) cannot be read: "
                "a message is trained whole or not at all (weight: 0)"
            )
    for key in EITHER:
        if isinstance(message.get(key), bool | int | float):
            raise UserError(
                f"{where}: {key} can be meant either way; write weight: 0 where the message "
                "is not to be trained"
            )
    given = {key: message.get(key) for key in (*TRAINED, *UNTRAINED)}
    given = {key: value for key, value in given.items() if value is not None and value == value}
    if not given:
        return message
    says = {key: _flag(where, key, value) != (key in UNTRAINED) for key, value in given.items()}
    if len(set(says.values())) > 1:
        one, other = (next(key for key in says if says[key] == way) for way in (True, False))
        raise UserError(
            f"{where}: {one}: {shown(given[one])} trains the message, and {other}: "
            f"{shown(given[other])} does not; leave one of them out"
        )
    rest = {key: value for key, value in message.items() if key not in given}
    if all(says.values()):
        return rest if message.get("role") == "assistant" else rest | {"weight": 1}
    return rest | {"weight": 0}


def _flag(where: str, key: str, value: Any) -> bool:
    """Whether a weight is 1, or a switch on."""
    words = {"0": False, "1": True, "false": False, "true": True}
    if isinstance(value, str) and value.strip().lower() in words:
        return words[value.strip().lower()]
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise UserError(
        f"{where}: {key} must be 0 or 1, or false or true, not {shown(value)}: "
        "a message is trained, or it is not"
    )


def _with_calls(where: str, message: dict[str, Any]) -> dict[str, Any]:
    """The message with its calls as a list of objects, under their present names."""
    old = message.get("function_call")
    if isinstance(old, dict) and message.get("tool_calls") is None:
        message = {key: value for key, value in message.items() if key != "function_call"}
        message["tool_calls"] = [{"type": "function", "function": old}]
    if message.get("role") == "function":
        message = message | {"role": "tool"}
    calls = message.get("tool_calls")
    if calls is None:
        return message
    if isinstance(calls, dict):
        calls = [calls]
    calls = listed(where, "tool_calls", calls)
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list):
        found = json_type(calls)
        raise UserError(f"{where}: tool_calls must be a list of the assistant's calls, not {found}")
    return message | {"tool_calls": [_call(where, call) for call in calls]}


def _call(where: str, call: Any) -> dict[str, Any]:
    """A call whose arguments are an object, or the JSON text of one."""
    if isinstance(call, str) and call.strip()[:1] == "{":
        call = parse_json(f"{where}: tool_calls", call)
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{where}: a tool call must be an object that names a function")
    given = next((key for key in ("arguments", "parameters", "args") if key in function), "")
    rest = {key: value for key, value in function.items() if key != given}
    function = rest | {"arguments": _arguments(where, function.get(given))}
    return call | {"function": function} if "function" in call else function


def _arguments(where: str, written: Any) -> Any:
    """The arguments: an object, or the text of one as it stands; {} for none."""
    if written is None or (isinstance(written, str) and not written.strip()):
        return {}
    value = written
    if isinstance(value, str):
        value = parse_json(f"{where}: a tool call's arguments", value)
        if isinstance(value, str):  # encoded twice
            written = value = parse_json(f"{where}: a tool call's arguments", value)
        written = {} if value is None else written
    if not isinstance({} if value is None else value, dict):
        raise UserError(
            f"{where}: a tool call's arguments must be an object, not {json_type(value)}"
        )
    return written


def read_tools(origin: str, tools: Any, functions: Any = None) -> list[dict[str, Any]]:
    """The tools as objects: given as a list, as JSON text, or as a list of JSON texts; [] for none.

    `functions` is OpenAI's older form of them.

    Raises:
        UserError: it is none of these.
    """
    if tools is None and (functions := read_tools(origin, functions) if functions else None):
        return [{"type": "function", "function": function} for function in functions]
    tools = listed(origin, "tools", tools)
    if tools is None or tools == "":
        return []
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list):
        raise UserError(f"{origin}: tools must be a list of objects, not {json_type(tools)}")
    return [_tool(origin, tool) for tool in tools]


def _tool(origin: str, tool: Any) -> dict[str, Any]:
    """A tool, whose schema may stand there as JSON text."""
    if isinstance(tool, str) and tool.strip()[:1] == "{":
        tool = parse_json(f"{origin}: tools", tool)
    if not isinstance(tool, dict):
        raise UserError(f"{origin}: tools must be a list of objects, not {json_type(tool)}")
    if isinstance(tool.get("function"), dict):
        return tool | {"function": _tool(origin, tool["function"])}
    schema = tool.get("parameters")
    if isinstance(schema, str) and schema.strip()[:1] == "{":
        return tool | {"parameters": parse_json(f"{origin}: tools, parameters", schema)}
    return tool


def dumped(arguments: Any) -> str:
    """Arguments as JSON text, as templates write them."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
