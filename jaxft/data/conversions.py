"""Rows of other shapes to the three that are tokenized: fields renamed, Alpaca and ShareGPT rewritten."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jaxft.data.records import json_type, parse_json
from jaxft.errors import UserError, nearest

# What a row of each format must have. Rows are recognised by these keys, in any order.
FORMATS = {
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
}
# What it may have.
OPTIONAL = {
    "prompt_completion": ("tools",),
    "messages": ("tools",),
    "text": (),
    "alpaca": ("input",),
    "sharegpt": ("system", "tools"),
}
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
# As Stanford Alpaca puts it, where the model has no chat template.
ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{}\n\n{}### Response:\n"
)
WITH_INPUT = ", paired with an input that provides further context"


def fields_for(fields: Mapping[str, str], keys: Iterable[str], where: str) -> dict[str, str]:
    """{a format's key: one's own key}, from a mapping written either way round.

    >>> fields_for({"prompt": "question", "completion": "answer"}, ["question", "answer"], "")
    {'prompt': 'question', 'completion': 'answer'}
    >>> fields_for({"question": "prompt", "answer": "completion"}, ["question", "answer"], "")
    {'prompt': 'question', 'completion': 'answer'}

    Args:
      fields: the mapping.
      keys: those of a row, which decide where both directions make sense.
      where: the place of the row, for messages.
    """
    ways = [dict(fields), {theirs: own for own, theirs in fields.items()}]
    whole = [way for way in ways if _makes_a_format(way) and len(way) == len(fields)]
    present = [way for way in whole if all(_has(keys, own) for own in way.values())]
    if not whole:
        known = "; ".join(" + ".join(keys) for keys in FORMATS.values())
        words = [key for keys in FORMATS.values() for key in keys]
        close = "".join(dict.fromkeys(nearest(name, words, count=1) for name in fields))
        raise UserError(
            f"config.data.fields {dict(fields)}: it gives a format's keys their names in the data, "
            f"as {{'prompt': 'question', 'completion': 'answer'}}; the formats' keys are {known}{close}"
        )
    return (present or whole)[0]


def _makes_a_format(names: Iterable[str]) -> bool:
    given = set(names)
    return any(set(FORMATS[name]) <= given <= {*FORMATS[name], *OPTIONAL[name]} for name in FORMATS)


def _has(keys: Iterable[str], own: str) -> bool:
    return own in keys or own.partition(".")[0] in keys


def renamed(origin: str, values: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    """The values under the formats' keys; a dot in one's own key reaches into an object."""
    found, used = {}, set()
    for key, own in fields.items():
        part: Any = values
        steps = [own] if own in values else own.split(".")
        for step in steps:
            if not isinstance(part, Mapping) or step not in part:
                keys = part if isinstance(part, Mapping) else ()
                raise UserError(
                    f"{origin}: no key {own!r}, which config.data.fields takes for {key!r}; there "
                    f"are: {', '.join(map(repr, keys)) or 'none'}{nearest(step, keys)}"
                )
            part = part[step]
        found[key] = part
        used.add(steps[0])
    return {**{key: part for key, part in values.items() if key not in (*used, *found)}, **found}


def listed(origin: str, key: str, value: Any) -> Any:
    """A list from how tables hold lists: as JSON in a text, or as an object of lists."""
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        value = parse_json(f"{origin}: {key}", value)
    if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
        columns = list(value.values())
        if len({len(column) for column in columns}) == 1:
            return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
    return value


def from_alpaca(origin: str, values: Mapping[str, Any], as_messages: bool) -> dict[str, Any]:
    """Prompt and completion of {"instruction", "input", "output"}; an empty input is left out.

    The prompt is one user's message (instruction and input with a blank line between) where the
    model has a chat template, else the text of Stanford Alpaca.
    """
    instruction, given, output = (values.get(k) for k in ("instruction", "input", "output"))
    given = "" if given is None else given
    for key, value in (("instruction", instruction), ("input", given), ("output", output)):
        if not isinstance(value, str):
            raise UserError(f"{origin}: {key} must be a string, not {json_type(value)}")
    if as_messages:
        said = f"{instruction}\n\n{given}" if given else instruction
        answer = {"role": "assistant", "content": output}
        return {"prompt": [{"role": "user", "content": said}], "completion": [answer]}
    middle = f"### Input:\n{given}\n\n" if given else ""
    prompt = ALPACA.format(WITH_INPUT if given else "", instruction, middle)
    return {"prompt": prompt, "completion": output}


def from_sharegpt(origin: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Messages of {"conversations": [{"from", "value"}]}, whose system message may stand beside.

    Turns with "role" and "content" stay as they are.
    """
    turns = listed(origin, "conversations", values["conversations"])
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if turns == [] else json_type(turns)
        raise UserError(f"{origin}: conversations must be a list of turns, not {found}")
    messages = [_turn(f"{origin}: conversations, turn {n}", t) for n, t in enumerate(turns, 1)]
    system = values.get("system")
    if system is not None and not isinstance(system, str):
        raise UserError(f"{origin}: system must be a string, not {json_type(system)}")
    if system:
        messages.insert(0, {"role": "system", "content": system})
    tools = {"tools": values["tools"]} if values.get("tools") else {}
    return {"messages": messages, **tools}


def _turn(where: str, turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise UserError(f"{where} must be an object, not {json_type(turn)}")
    if "role" in turn and "from" not in turn:
        return turn
    for key in ("from", "value"):
        if key not in turn:
            raise UserError(f"{where} has no {key!r}{nearest(key, turn)}")
        if not isinstance(turn[key], str):
            raise UserError(f"{where}: {key} must be a string, not {json_type(turn[key])}")
    speaker = turn["from"]
    if speaker == "function_call":
        return {"role": "assistant", "tool_calls": _calls(where, turn["value"])}
    if speaker not in SPEAKERS:
        known = (*SPEAKERS, "function_call")
        raise UserError(
            f"{where}: unknown speaker {speaker!r}; known: {', '.join(known)}{nearest(speaker, known)}"
        )
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {"role": SPEAKERS[speaker], "content": turn["value"], **rest}


def _calls(where: str, text: str) -> list[dict[str, Any]]:
    """The calls that a function_call's JSON names: one object, or a list of them."""
    value = parse_json(f"{where}: value", text)
    calls = value if isinstance(value, list) else [value]
    for call in calls:
        if not isinstance(call, dict) or not {"name", "arguments"} <= call.keys():
            raise UserError(f"{where}: a function_call needs name and arguments, as JSON")
    return [{"type": "function", "function": call} for call in calls]
