"""What to type where a row's keys have other names than a format's."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxft.data.conversions import FORMATS, NEEDED, OPTIONAL
from jaxft.data.unread import is_turn, verdict_of, words_of

# What people call a format's keys; those in front are the likelier ones.
CALLED: dict[str, tuple[str, ...]] = {
    "prompt": ("question", "query", "instruction", "prompt", "input", "problem", "request", "human", "user", "context",
               "source"),
    "completion": ("answer", "response", "output", "completion", "reply", "solution", "target", "assistant", "gpt",
                   "bot", "summary", "highlight", "translation"),
    "chosen": ("chosen", "preferred", "accepted", "better", "best", "win", "winner", "positive", "good",
               "j"),
    "rejected": ("rejected", "nonpreferred", "dispreferred", "worse", "worst", "lose", "loser", "negative",
                 "bad", "k"),
    "label": ("label", "tag", "desirable", "preference", "feedback", "thumb", "good", "correct"),
    "output": ("response", "answer", "completion", "reply", "solution", "target"),
    "input": ("context", "passage", "document", "background", "article", "paragraph", "knowledge", "evidence"),
}  # fmt: skip
SIDES = ("chosen", "rejected")
CLOSE = 0.75  # of letters: beyond it a key is one of a format's, misspelt


def flags(fields: Mapping[str, str]) -> str:
    """The words to type.

    >>> flags({"prompt": "question", "completion": "answer"})
    '--config.data.fields.prompt=question --config.data.fields.completion=answer'
    """
    return " ".join(f"--config.data.fields.{key}={_quoted(own)}" for key, own in fields.items())


def missing_keys(
    origin: str,
    values: Mapping[str, Any],
    formats: Mapping[str, tuple[str, ...]],
    as_messages: bool,
) -> str:
    """What a row lacks, and what to type if its keys have other names."""
    found = ", ".join(map(repr, values)) or "none"
    if {"chosen", "rejected"} <= values.keys():
        return (
            f"{origin}: a row of preferences (keys {found}), which another recipe trains on: "
            "--config configs/dpo.py:lora"
        )
    needed = NEEDED if formats == FORMATS else "; ".join(map(" + ".join, formats.values()))
    wanted = [key for keys in formats.values() for key in keys if key not in values]
    strange = [key for key in values if not any(key in keys for keys in FORMATS.values())]
    known = [key for name, keys in formats.items() for key in (*keys, *OPTIONAL[name])]
    ways = [way for way in fields_for_examples(values, known) if set(way[0]) <= set(known)]
    typed = ""
    if ways:
        (fields, _), *others = ways
        typed = f"; name them: {flags(fields)}"
        for other, ignored in others:
            typed += f" (or without {ignored!r}: {flags(other)} --config.data.ignore={ignored})"
        if as_messages and {"prompt", "completion"} == fields.keys() and "alpaca" in formats:
            chat = {"instruction": fields["prompt"], "output": fields["completion"]}
            typed += f" (or, to be written by the chat template: {flags(chat)})"
    return f"{origin}: keys found: {found}; a row needs {needed}{misspelt(strange, wanted)}{typed}"


def misspelt(keys: Iterable[str], wanted: Sequence[str]) -> str:
    """The wanted keys that are nearly written, ready to end a message.

    >>> misspelt(["promt", "question"], ["prompt", "conversations"])
    " (nearest: 'prompt')"
    """
    found = dict.fromkeys(itertools.chain.from_iterable(
        difflib.get_close_matches(key[:200], wanted, n=1, cutoff=CLOSE) for key in keys
    ))  # fmt: skip
    return f" (nearest: {', '.join(map(repr, found))})" if found else ""


def fields_for_examples(
    values: Mapping[str, Any], known: Iterable[str]
) -> list[tuple[dict[str, str], str]]:
    """Ways to name the keys of a row of no format, the likeliest first, each with the keys that it leaves out.

    >>> fields_for_examples({"question": "Why?", "answer": "So.", "id": 3}, ())
    [({'prompt': 'question', 'completion': 'answer'}, '')]
    >>> fields_for_examples({"instruction": "Add.", "context": "2, 3", "response": "5"}, ("instruction",))
    [({'output': 'response', 'input': 'context'}, '')]

    Args:
        values: the row.
        known: the keys of all formats, which are called so already.
    """
    talks = [key for key, value in values.items() if _is_talk(value)]
    if talks:
        name = "conversations" if "from" in values[talks[0]][0] else "messages"
        return [({name: talks[0]}, "")]
    said, both = _texts(values), ("prompt", "completion")
    if is_turn(values):  # a message a line
        return []
    if "instruction" in values:
        fields = _named(said, ("output", "input"), taken=("instruction",), have=values)
        return [(fields, "")] if "output" in fields else []
    pair = _named(said, ("completion", "prompt"), have=values)
    free = [key for key in said if key not in (*pair.values(), *both)]
    if len(free) == 1 and pair.get("prompt") in CALLED["input"]:
        free, pair["prompt"] = [pair["prompt"]], free[0]  # a context asks where nothing else does
    for key in both:  # of names that nobody knows, the first asks
        if key in pair or key in values or not free or len(free) + len(pair) > 2:
            continue
        if not (key == "completion" and set(CALLED["input"]) & set(words_of(free[0])[-1:])):
            pair[key] = free.pop(0)  # what stands beside a question is no answer to it
    made = {str(key): pair[key] for key in both if key in pair}
    if not set(both) <= {*made, *values}:
        only = len(said) == 1 and said[0] not in known
        return [({"text": said[0]}, "")] if only else []
    beside = _named(free, ("input",), taken=tuple(made.values()), have={})
    system = next((key for key in ("system", "system_prompt") if values.get(key)), "")
    if not (beside or system) or set(made) != set(both):
        return [(made, "")]
    whole = {"instruction": made["prompt"], **beside, "output": made["completion"]}
    left = ",".join((*beside.values(), *((system,) if system else ())))
    return [(whole, ""), (made, left)]


def fields_for_preferences(
    values: Mapping[str, Any], wanted: Sequence[str], needs: Sequence[str]
) -> dict[str, str]:
    """What the wanted ones of the needed keys are called in a row, as far as that can be told.

    >>> keys = ("prompt", "chosen", "rejected")
    >>> fields_for_preferences({"question": "", "response_j": "", "response_k": ""}, keys, keys)
    {'prompt': 'question', 'chosen': 'response_j', 'rejected': 'response_k'}
    """
    answers_first = sorted(wanted, key=lambda key: key == "prompt")
    found = _named([key for key in values if key not in needs], answers_first, have=values)
    rest = {key: value for key, value in values.items() if key not in (*found.values(), *needs)}
    free = [key for key, value in rest.items() if _is_talk(value)] or _texts(rest)
    if "prompt" in wanted and "prompt" not in found and len(free) == 1:
        found["prompt"] = free[0]
    return {key: found[key] for key in needs if key in found}


def _named(
    keys: Sequence[str],
    wanted: Sequence[str],
    *,
    have: Mapping[str, Any],
    taken: Sequence[str] = (),
) -> dict[str, str]:
    """{wanted: key} for those that the row lacks and that one of the keys means."""
    found: dict[str, str] = {}
    for name in wanted:
        if name in have:
            continue
        free = [key for key in keys if key not in (*found.values(), *taken)]
        words = {key: words_of(key.split(".")[0].replace("non_", "non")) for key in free}
        heads = sorted(free, key=lambda key: len(words[key]))  # a question before an original one
        ranked = [key for called in CALLED[name] for key in heads if called in words[key][-1:]]
        if name in (*SIDES, "label"):  # by their first word: chosen_response, thumbs_up
            ranked += [key for called in CALLED[name] for key in free if called in words[key]]
        if ranked:
            found[name] = ranked[0]
    return found


def _texts(values: Mapping[str, Any]) -> list[str]:
    """Keys whose values are texts that may be of an example; the one text of an object is reached by a dot."""
    found = dict(values)
    for key, value in values.items():
        inner = value.items() if isinstance(value, Mapping) else ()
        texts = [name for name, part in inner if isinstance(part, str)]
        if len(texts) == 1:
            found[f"{key}.{texts[0]}"] = value[texts[0]]
    said = [key for key, value in found.items() if isinstance(value, str) and value.strip()]
    called = {word for names in CALLED.values() for word in names}
    return [
        key
        for key in said
        if key not in ("system", "system_prompt")
        and (verdict_of(key) != "other" or called & set(words_of(key)[-1:]))
    ]


def _is_talk(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(is_turn(turn) for turn in value)


def _quoted(name: str) -> str:
    return name if all(letter.isalnum() or letter in "_-." for letter in name) else f"'{name}'"
