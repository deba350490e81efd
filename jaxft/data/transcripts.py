r"""Whole conversations, twice, to what they have in common and how each ends.

A transcript is a list of messages, or a text with marks of its turns: Anthropic's HH ("\n\nHuman: ...\n\nAssistant:
..."), or what a chat template wrote.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

from jaxft.sequences import common_prefix_length

Messages = list[dict[str, Any]]
MARK = re.compile(
    r"(?:\n\n|^)(?:Human|Assistant):"  # HH
    r"|\n*### ?(?:Human|User|Assistant|Instruction|Input|Response):"
    r"|<\|im_start\|>\w+\n|<\|start_header_id\|>\w+<\|end_header_id\|>\n*|<start_of_turn>\w+\n"
    r"|<\|(?:system|user|assistant)\|>\n?|\[/?INST\]"
)
ANSWERS = re.compile(r"assistant|response|model|/INST", re.IGNORECASE)  # in the mark of an answer
BEFORE = ("system", "developer")


def split_messages(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """The messages with which two conversations begin in common, and the rest of each.

    What is left over is never empty unless the conversations are equal: an answer that both have is
    part of the prompt only if more follows in both.
    """
    shared = common_prefix_length(chosen, rejected)
    shared -= shared > 0 and shared in (len(chosen), len(rejected))
    return chosen[:shared], chosen[shared:], rejected[shared:]


def split_texts(chosen: str, rejected: str) -> tuple[str, str, str] | None:
    r"""The turns with which two texts begin in common, and the rest of each; None for texts without turns.

    The prompt ends with the mark of the turn that differs, if it is the assistant's in both.

    >>> split_texts("\n\nHuman: hi\n\nAssistant: hello", "\n\nHuman: hi\n\nAssistant: yes?")
    ('\n\nHuman: hi\n\nAssistant:', ' hello', ' yes?')
    """
    left, right = text_turns(chosen), text_turns(rejected)
    if not (MARK.search(chosen) and MARK.search(rejected)):
        return None
    turns = common_prefix_length(left, right)
    turns -= turns > 0 and turns in (len(left), len(right))
    prompt = "".join(left[:turns])
    marks = [MARK.match(rest[turns]) if rest[turns:] else None for rest in (left, right)]
    heads = {mark[0] if mark else "" for mark in marks}
    if turns and len(heads) == 1 and ANSWERS.search(head := heads.pop()):
        prompt += head
    return prompt, chosen[len(prompt) :], rejected[len(prompt) :]


def repeated(prompt: str, chosen: str, rejected: str) -> tuple[str, str, str]:
    r"""Prompt and answers, where two texts of turns repeat what is asked before they answer; else as they are.

    >>> repeated("hi", "\n\nHuman: hi\n\nAssistant: yes", "\n\nHuman: hi\n\nAssistant: no")
    ('\n\nHuman: hi\n\nAssistant:', ' yes', ' no')
    >>> repeated("hi", " yes", " no")
    ('hi', ' yes', ' no')
    """
    found = split_texts(chosen, rejected) if MARK.match(chosen) and MARK.match(rejected) else None
    inside = found is not None and " ".join(prompt.split()) in " ".join(found[0].split())
    return found if found and inside and prompt.strip() else (prompt, chosen, rejected)


def text_turns(text: str) -> list[str]:
    r"""The turns of a text, each with its mark; what stands before the first is one.

    >>> text_turns("\n\nHuman: hi\n\nAssistant: yes?")
    ['\n\nHuman: hi', '\n\nAssistant: yes?']
    """
    edges = sorted({0, len(text), *(mark.start() for mark in MARK.finditer(text))})
    return [text[start:end] for start, end in itertools.pairwise(edges)]


def opens(messages: Messages) -> bool:
    """Whether the messages are a conversation from its beginning, and not an answer alone."""
    first = next((m for m in messages if m.get("role") not in BEFORE), {})
    return first.get("role") == "user"


def asked_in(asked: Messages, shared: Messages) -> Messages | None:
    """The prompt where a conversation's common beginning repeats what is asked; None where it does not.

    The beginning holds all that is asked, or goes on from a last part of it.
    """
    said = " ".join(_said(message) for message in shared)
    if all(_said(message) in said for message in asked):
        return shared
    for size in range(min(len(asked), len(shared)), 0, -1):
        if [_turn(m) for m in asked[-size:]] == [_turn(m) for m in shared[:size]]:
            return [*asked, *shared[size:]]
    return None


def behind_system(messages: Messages) -> tuple[Messages, Messages]:
    """What the system says first, and the rest."""
    first = next((i for i, m in enumerate(messages) if m.get("role") not in BEFORE), len(messages))
    return messages[:first], messages[first:]


def _said(message: dict[str, Any]) -> str:
    return " ".join(str(message.get("content") or "").split())


def _turn(message: dict[str, Any]) -> tuple[Any, str]:
    return message.get("role"), _said(message)
