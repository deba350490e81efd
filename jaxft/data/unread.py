"""Which keys that nobody reads look like text of the example: a question, a context, a system prompt."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jaxft.errors import UserError, shown

# The last word of a key that either of these has decides: prompt_id is an id, source_text a text.
_TEXTS = """
answer background chat choice chosen completion content context conversation cot dialog dialogue function highlight
history hypothesis input instruction message option output passage premise prompt query question rationale
reasoning rejected reply response solution summary system target text thinking thought tool translation
"""
_OTHERS = """
annotator author category checksum class confidence config copyright count country created dataset date
difference difficulty domain email engine file filename flag folder format from genre grade hash href id
identifier idx index job keyword kind label lang language len length level license like likelihood link locale
logprob md5 meta metadata model name num number order origin path probability quality rank rating ratio revision
reward role score sha size source split state status style subject subset tag time timestamp title token topic
type updated upvote uri url username uuid version vote weight worker year
"""
TEXTS, OTHERS = frozenset(_TEXTS.split()), frozenset(_OTHERS.split())
ANSWERS = frozenset(
    ("answer", "candidate", "completion", "generation", "output", "response", "solution")
)
TOOLS = frozenset(("tool", "function"))  # which have names, and no texts
LONG = 25  # words of a text that is one whatever its key is called
FEW = 5  # words of a text whose key says nothing
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
LETTERS = re.compile(r"[^\W\d_]+")
UNSPACED = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]")  # scripts that part no words
ENDS = (".", "?", "!", ":", "\u2026", "\u3002", "\uff1f", "\uff01", "\u061f")


def unread(unused: Mapping[str, Any], used: Any) -> tuple[str, ...]:
    """The keys of `unused` that look like text of the example and say more than what is used does.

    A key is known by its name (`context`: any text; `source`: no text but a long one), else by whether its value is
    prose. A text that stands in what is used is no loss, nor one that holds all of it, nor a list of answers from
    which a used one was taken.

    >>> unread({"context": "Paris", "id": "a b c d e f", "note": "Ask again, please."}, {"prompt": "Where?"})
    ('context', 'note')

    Args:
        unused: values by key.
        used: the values that are trained on, of any shape.
    """
    if not unused:
        return ()
    found = {key: list(_looking(key, value)) for key, value in unused.items()}
    if not any(found.values()):
        return ()
    said = [_plain(text) for text in strings(used)]
    return tuple(
        key
        for key, texts in found.items()
        if texts
        and not (_is_pool(key, unused[key], said) or all(_held(key, t, said) for t in texts))
    )


def refuse_unread(origin: str, keys: Iterable[str], why: str = "") -> None:
    """Raises UserError where a row has text that is not used."""
    if keys:
        raise UserError(f"{origin}: {unread_words(tuple(keys))}{why}")


def unread_words(keys: tuple[str, ...]) -> str:
    """What is wrong with keys that are text and not used, and what to type."""
    names = ", ".join(shown(key, 60) for key in keys)
    ignored = ",".join(keys)
    chat = " (a chat template writes what the system says: config.data.chat_template)"
    return (
        f"{names}: text of the example that would not be used"
        f"{chat if {'system', 'system_prompt'} & set(keys) else ''}; give it a column with "
        f"config.data.fields, or leave it out: --config.data.ignore={ignored}"
    )


def strings(value: Any) -> Iterator[str]:
    """All texts in a value, but for roles and the like."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            if verdict_of(str(key)) != "other":
                yield from strings(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from strings(part)


def is_turn(value: Any) -> bool:
    """Whether a value is a message: role and content, or from and value."""
    names = ("role", "from") if isinstance(value, Mapping) else ()
    return any(isinstance(value.get(name), str) for name in names)


def is_prose(text: str) -> bool:
    """Whether a text reads like something said: some words, or a short sentence.

    >>> [is_prose(text) for text in ("It rains.", "open qa", "https://a.b/c-d-e-f-g", "2024-01-01 10:00:00")]
    [True, False, False, False]
    """
    head = text[:2000].strip()
    unspaced = len(UNSPACED.findall(head))
    if not unspaced and not re.search(r"\s", head):
        return False
    words = len(LETTERS.findall(head)) + unspaced // 2
    return words >= FEW or (words >= 2 and head.endswith(ENDS))


def _looking(name: str, value: Any, verdict: str = "") -> Iterator[str]:
    """The texts in a value that look like text of the example."""
    verdict = verdict_of(name) or verdict
    if TOOLS & set(words_of(name)[-1:]) and isinstance(value, list | dict):
        yield from [str(value)] if value else []
    elif isinstance(value, str):
        if verdict == "text":
            if value.strip():
                yield value
        elif verdict == "other":
            if len(value.split()) >= LONG and not isinstance(_of_json(value), dict | list):
                yield value
        elif isinstance(inner := _of_json(value), dict | list):
            yield from _looking(name, inner)
        elif is_prose(value):
            yield value
    elif is_turn(value):
        yield from (text for text in strings(value) if text.strip())
    elif isinstance(value, Mapping) and verdict != "other":
        for key, part in value.items():
            yield from _looking(str(key), part, verdict)
    elif isinstance(value, list | tuple) and verdict != "other":
        for part in value:
            yield from _looking(name, part, verdict)


def _of_json(text: str) -> Any:
    """What a text means that is JSON, as tables hold objects; None for others."""
    if text.strip()[:1] not in ("{", "["):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


@functools.cache
def verdict_of(name: str) -> str:
    """text, other, or "" for a name that says nothing."""
    for word in reversed(words_of(name)):
        if word in TEXTS:
            return "text"
        if word in OTHERS:
            return "other"
    return ""


def words_of(name: str) -> list[str]:
    """The words of a key, in small letters and the singular.

    >>> words_of("source_texts"), words_of("userQuestion"), words_of("prompt-id")
    (['source', 'text'], ['user', 'question'], ['prompt', 'id'])
    """
    words = [word.lower() for word in WORD.findall(name[:200])]
    return [
        word[:-1] if word.endswith("s") and len(word) > 3 and word[-2] != "s" else word
        for word in words
    ]


def _plain(text: str) -> str:
    return " ".join(text.split())


def _held(key: str, text: str, said: list[str]) -> bool:
    """Whether what is used says the text, or the text says all that is used."""
    plain = _plain(text)
    if plain in said:
        return True
    if len(plain.split()) >= FEW and any(plain in other for other in said):
        return True
    if ANSWERS & set(words_of(key)):  # as the 42 of "... = 42"
        whole = re.compile(rf"(?<!\w){re.escape(plain)}(?!\w)")
        if any(whole.search(other) for other in said):
            return True
    return len(said) > 1 and all(other in plain for other in said)


def _is_pool(key: str, value: Any, said: list[str]) -> bool:
    """Whether a list of answers holds a used one: the others were left out on purpose."""
    if not isinstance(value, list | tuple) or not ANSWERS & set(words_of(key)):
        return False
    return any(text and text in said for part in value for text in map(_plain, strings(part)))
