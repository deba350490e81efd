"""Rows of other shapes to the three that are tokenized: fields renamed, Alpaca and ShareGPT rewritten."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
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
    "prompt_completion": ("tools", "functions", "system"),
    "messages": ("tools", "functions", "system"),
    "text": (),
    "alpaca": ("input", "system", "history"),
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
FIRST = ("system", "developer")  # who speaks before a conversation
WORDS = frozenset(key for name in FORMATS for key in (*FORMATS[name], *OPTIONAL[name]))
NEEDED = "; ".join(" + ".join(keys) for keys in FORMATS.values())


def fields_for(
    fields: Mapping[str, str],
    keys: Iterable[str],
    words: Collection[str] = WORDS,
    needed: str = NEEDED,
) -> dict[str, str]:
    """{a format's key: one's own key}, from a mapping written either way round, of all keys or of some.

    >>> fields_for({"prompt": "question", "completion": "answer"}, ["question", "answer"])
    {'prompt': 'question', 'completion': 'answer'}
    >>> fields_for({"question": "prompt", "answer": "completion"}, ["question", "answer"])
    {'prompt': 'question', 'completion': 'answer'}

    Args:
      fields: the mapping.
      keys: those of a row, which decide where both directions make sense.
      words: the formats' keys.
      needed: the formats, for messages.

    Raises:
        UserError: the mapping is neither way round.
    """
    ways = [dict(fields), {theirs: own for own, theirs in fields.items()}]
    whole = [way for way in ways if set(way) <= set(words) and len(way) == len(fields)]
    present = [way for way in whole if all(_has(keys, own) for own in way.values())]
    if not whole:
        strange = [str(name) for name in fields if name not in words]
        close = "".join(dict.fromkeys(nearest(name, words, count=1) for name in strange))
        raise UserError(
            f"config.data.fields {dict(fields)}: it gives a format's keys their names in the data, "
            f"as {{'prompt': 'question', 'completion': 'answer'}}; the formats' keys are {needed}{close}"
        )
    return (present or whole)[0]


def _has(keys: Iterable[str], own: str) -> bool:
    return own in keys or own.partition(".")[0] in keys


def renamed(
    origin: str, values: Mapping[str, Any], fields: Mapping[str, str], ignore: Collection[str] = ()
) -> dict[str, Any]:
    """The values under the formats' keys, without those to be left out.

    A dot in one's own key reaches into an object; what else stands there stays, as "object.key".

    Raises:
        UserError: the row lacks a key that the mapping names, or has one twice.
    """
    values = {key: part for key, part in values.items() if key not in ignore}
    if not fields:
        return values
    found: dict[str, Any] = {}
    paths = []
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
        paths.append(steps)
    rest = {key: part for key, part in _rest(values, paths).items() if key not in ignore}
    for key in found:
        if rest.pop(key, None):
            raise UserError(
                f"{origin}: config.data.fields takes {fields[key]!r} for {key!r}, and the row has a "
                f"{key!r} of its own; leave that out: --config.data.ignore={key}"
            )
    return {**rest, **found}


def _rest(values: Mapping[str, Any], paths: list[list[str]], within: str = "") -> dict[str, Any]:
    """What the paths do not lead to, by its location.

    >>> _rest({"id": 3, "answer": {"text": "So.", "note": "?"}}, [["answer", "text"]])
    {'id': 3, 'answer.note': '?'}
    """
    rest: dict[str, Any] = {}
    for key, part in values.items():
        inner = [path[1:] for path in paths if path[0] == key]
        if not inner:
            rest[f"{within}{key}"] = part
        elif all(inner):
            rest |= _rest(part, inner, f"{within}{key}.")
    return rest


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
    """Prompt and completion of {"instruction", "input", "output", "system", "history"}; all but two may be missing.

    The prompt is one user's message (instruction and input with a blank line between) where the
    model has a chat template, behind what `system` and `history` say; else the text of Stanford
    Alpaca, in which `system` stands for the first sentences.

    Raises:
        UserError: a part is no text, or history has no template to be written by.
    """
    instruction, output = values.get("instruction"), values.get("output")
    given, system = ("" if values.get(k) is None else values[k] for k in ("input", "system"))
    texts = {"instruction": instruction, "input": given, "output": output, "system": system}
    for key, value in texts.items():
        if not isinstance(value, str):
            raise UserError(f"{origin}: {key} must be a string, not {json_type(value)}")
    before = _history(origin, values.get("history"))
    if as_messages:
        said = f"{instruction}\n\n{given}" if given else instruction
        asked = [*before, {"role": "user", "content": said}]
        answer = {"role": "assistant", "content": output}
        return {"prompt": with_system(origin, asked, system), "completion": [answer]}
    if before:
        raise UserError(
            f"{origin}: history is turns of a chat, and the tokenizer has no chat template: give one as "
            "config.data.chat_template (chatml), or leave it out: --config.data.ignore=history"
        )
    middle = f"### Input:\n{given}\n\n" if given else ""
    prompt = ALPACA.format(WITH_INPUT if given else "", instruction, middle)
    if system:
        prompt = f"{system}\n\n{prompt[prompt.index('### Instruction:') :]}"
    return {"prompt": prompt, "completion": output}


def _history(origin: str, history: Any) -> list[dict[str, Any]]:
    """The messages of pairs (question, answer), as LLaMA-Factory writes what was said before."""
    pairs = listed(origin, "history", history) or []
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list | tuple) and [type(text) for text in pair] == [str, str]
        for pair in pairs
    ):
        raise UserError(f"{origin}: history must be a list of pairs: question and answer")
    roles = ("user", "assistant")
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(roles, pair, strict=True)
    ]


def system_named(values: dict[str, Any]) -> dict[str, Any]:
    """The values, with what the system says under `system` where it is called `system_prompt`."""
    if "system_prompt" not in values or values.get("system"):
        return values
    rest = {key: part for key, part in values.items() if key != "system_prompt"}
    return {**rest, "system": values["system_prompt"]}


def with_system(origin: str, messages: list[dict[str, Any]], system: Any) -> list[dict[str, Any]]:
    """The messages behind what the system says, unless they begin with that.

    Raises:
        UserError: it is no text, or the conversation's own system message says otherwise.
    """
    if system is not None and not isinstance(system, str):
        raise UserError(f"{origin}: system must be a string, not {json_type(system)}")
    if not system or not system.strip():
        return messages
    first = messages[0] if messages and isinstance(messages[0], dict) else {}
    if first.get("role") not in FIRST:
        return [{"role": "system", "content": system}, *messages]
    if first.get("content") != system:
        raise UserError(
            f"{origin}: system says otherwise than the system's message in the conversation; leave "
            "one out (--config.data.ignore=system)"
        )
    return messages


def from_sharegpt(origin: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Messages of {"conversations": [{"from", "value"}]}, whose system message may stand outside them.

    Turns with "role" and "content" stay as they are.

    Raises:
        UserError: the conversations are no list, or a turn is damaged.
    """
    turns = listed(origin, "conversations", values["conversations"])
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if turns == [] else json_type(turns)
        raise UserError(f"{origin}: conversations must be a list of turns, not {found}")
    messages = [as_message(f"{origin}: conversations, turn {n}", t) for n, t in enumerate(turns, 1)]
    messages = with_system(origin, messages, values.get("system"))
    tools = {"tools": values["tools"]} if values.get("tools") else {}
    return {"messages": messages, **tools}


def as_message(where: str, turn: Any) -> dict[str, Any]:
    """The message of a turn {"from", "value"}; one with a role stays as it is.

    Raises:
        UserError: it is no object, lacks a part, or its speaker is unknown.
    """
    if not isinstance(turn, dict):
        raise UserError(f"{where} must be an object, not {json_type(turn)}")
    if "role" in turn and "from" not in turn:
        return turn
    for key in ("from", "value"):
        if key not in turn:
            raise UserError(f"{where} has no {key!r}{nearest(key, turn)}")
        if not isinstance(turn[key], str) and not (key == "value" and isinstance(turn[key], list)):
            raise UserError(f"{where}: {key} must be a string, not {json_type(turn[key])}")
    speaker = turn["from"]
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    if speaker == "function_call" and isinstance(turn["value"], str):
        return {"role": "assistant", "tool_calls": _calls(where, turn["value"]), **rest}
    if speaker not in SPEAKERS:
        known = (*SPEAKERS, "function_call")
        raise UserError(
            f"{where}: unknown speaker {speaker!r}; known: {', '.join(known)}{nearest(speaker, known)}"
        )
    return {"role": SPEAKERS[speaker], "content": turn["value"], **rest}


def _calls(where: str, text: str) -> list[dict[str, Any]]:
    """The calls that a function_call's JSON names: one object, or a list of them."""
    value = parse_json(f"{where}: value", text)
    calls = value if isinstance(value, list) else [value]
    for call in calls:
        if not isinstance(call, dict) or not {"name", "arguments"} <= call.keys():
            raise UserError(f"{where}: a function_call needs name and arguments, as JSON")
    return [{"type": "function", "function": call} for call in calls]
