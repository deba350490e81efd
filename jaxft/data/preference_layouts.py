"""Layouts of preferences to one: a prompt with two answers, or with one and its label.

What is asked stands under `prompt`, `conversations`, `messages`, `instruction` (with `input`), `question`, `query` or
`input`, the first of these that there is, with `system`, `history` and `tools` about it; or the answers are whole
conversations, and what they begin with in common is the prompt.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from jaxft.data.conversions import as_message, from_alpaca, listed, with_system
from jaxft.data.naming import fields_for_preferences
from jaxft.data.records import json_type
from jaxft.data.sources import Row, check_messages
from jaxft.data.transcripts import (
    Messages,
    asked_in,
    behind_system,
    opens,
    repeated,
    split_messages,
    split_texts,
)
from jaxft.data.unread import is_turn
from jaxft.errors import UserError, counted, shown

TALKS = ("conversations", "messages")
QUESTIONS = ("instruction", "question", "query", "input")
BESIDE = ("system", "history", "tools")
LABELS = ("label", "kto_tag")
HINT = " (data.bad_rows=skip leaves such rows out)"
# Texts that mean a label, as tables hold them.
TRUTH = {"true": True, "1": True, "desirable": True} | {"false": False, "0": False, "undesirable": False}  # fmt: skip


class Bad(UserError):
    """A row that cannot be used, which may be left out on request."""


@dataclasses.dataclass(frozen=True)
class Made:
    """What a layout says.

    Attributes:
        values: prompt, chosen and rejected, or prompt, completion and label; perhaps tools.
        used: keys of the row that are in it.
        passed: keys of the row that the layout has besides them.
        system: what the system says, where nothing is asked before the answers.
    """

    values: dict[str, Any]
    used: frozenset[str]
    passed: frozenset[str] = frozenset()
    system: Any = None


def paired_row(origin: str, values: Mapping[str, Any], as_messages: bool) -> Made | None:
    """prompt, chosen and rejected of any layout of pairs; None if there are no two answers.

    Raises:
        Bad: the two answers share no prompt.
    """
    values, used, passed = _opened(origin, values)
    if any(values.get(key) is None for key in ("chosen", "rejected")):
        return None
    chosen, rejected = (turns(origin, key, values[key]) for key in ("chosen", "rejected"))
    made = _asked(origin, values, [chosen, rejected], as_messages)
    used |= made.used
    prompt = made.values.get("prompt")
    kinds = {type(chosen), type(rejected)}
    if prompt is None and kinds == {str}:
        found = split_texts(chosen, rejected)
        if found is None:
            return None
        if not found[0].strip():
            raise Bad(f"{origin}: chosen and rejected have no prompt in common{HINT}")
        prompt, chosen, rejected = found
    elif isinstance(prompt, str) and kinds == {str}:
        prompt, chosen, rejected = repeated(prompt, chosen, rejected)
    elif isinstance(prompt, list) and kinds == {str}:
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    elif kinds == {list}:
        alone = prompt is None and not (opens(chosen) or opens(rejected))
        if alone and fields_for_preferences(values, ("prompt",), ("prompt", "chosen", "rejected")):
            return None
        prompt, chosen, rejected = _parted(origin, made, chosen, rejected)
    made_of = made.values | {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return Made(made_of, frozenset(used | {"chosen", "rejected"}), passed)


def judged_row(origin: str, values: Mapping[str, Any], as_messages: bool) -> Made | None:
    """prompt, completion and label of any layout of KTO; None if the answer or its label is missing.

    Raises:
        UserError, or Bad for the row alone: the answer is not the assistant's, or nothing is asked.
    """
    named = next((key for key in LABELS if values.get(key) is not None), "")
    if not named:
        return None
    asks = any(values.get(key) is not None for key in QUESTIONS)
    answer = next((key for key in ("completion", *("output",) * asks) if key in values), "")
    if answer:
        completion = turns(origin, answer, values[answer])
    else:
        answer = next((key for key in TALKS if values.get(key) is not None), "")
        if not answer:
            return None
        completion = turns(origin, answer, values[answer])
        if not isinstance(completion, list):
            found = json_type(completion)
            raise UserError(f"{origin}: {answer} must be a list of messages, not {found}")
        values = {key: part for key, part in values.items() if key != answer}
    made = _asked(origin, values, [completion], as_messages)
    prompt = made.values.get("prompt")
    if isinstance(completion, list) and (prompt is None or isinstance(prompt, list)):
        if completion[-1]["role"] != "assistant":
            raise Bad(f"{origin}: {answer} does not end with the assistant's turn{HINT}")
        if prompt is None and len(completion) == 1:
            raise Bad(f"{origin}: {answer} is an answer alone, and nothing is asked{HINT}")
        prompt, completion, _ = _parted(origin, made, completion, completion)
    elif isinstance(prompt, list) and isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    elif prompt is None:
        return None
    label = label_of(origin, named, values[named])
    made_of = made.values | {"prompt": prompt, "completion": completion, "label": label}
    return Made(made_of, made.used | {answer, named})


def label_of(origin: str, key: str, value: Any) -> bool:
    """Whether a completion is desirable: true or false, also as 1 or 0 or as a text.

    >>> label_of("a:1", "label", 1.0), label_of("a:1", "label", "False")
    (True, False)

    Raises:
        UserError: it is none of these.
    """
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in TRUTH:
        return TRUTH[value.strip().lower()]
    raise UserError(f"{origin}: {key} must be true or false, not {shown(value)}")


def turns(origin: str, key: str, value: Any) -> Any:
    """Checked messages for a list of them, for one alone, for ShareGPT's turns and for what tables hold.

    Else the value as it is: a text may begin like JSON.
    """
    found = value
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        with contextlib.suppress(UserError):
            found = listed(origin, key, value)
        if not is_turn(found) and not (isinstance(found, list) and any(map(is_turn, found))):
            return value
    elif isinstance(value, Mapping) and not is_turn(value):
        found = listed(origin, key, value)
    if is_turn(found):
        found = [found]
    if not isinstance(found, list):
        return value
    messages = [
        as_message(f"{origin}: {key}, message {number}", turn) if _is_foreign(turn) else turn
        for number, turn in enumerate(found, start=1)
    ]
    row = Row(origin, "messages", {key: messages})
    check_messages(row, key)
    return row.values[key]


def _is_foreign(turn: Any) -> bool:
    return isinstance(turn, Mapping) and "from" in turn and "role" not in turn


def _asked(origin: str, values: Mapping[str, Any], answers: list[Any], as_messages: bool) -> Made:
    """What is asked, a text or messages or nothing at all, with what belongs to it."""
    lists = all(isinstance(answer, list) for answer in answers)
    key = next((key for key in ("prompt", *TALKS, *QUESTIONS) if _is_there(values.get(key))), "")
    asked: Any = turns(origin, key, values[key]) if key else None
    spoken = "system" if values.get("system") or "system_prompt" not in values else "system_prompt"
    chat = lists or isinstance(asked, list)
    if as_messages and key and not chat:
        chat = key != "prompt" or spoken in values  # a prompt alone is a text as it stands
    if not chat and key in ("prompt", ""):
        return Made({"prompt": asked} if key else {}, frozenset({key} if key else ()))
    used = {name for name in (spoken, *("tools",) * chat) if name in values}
    tools = {"tools": values["tools"]} if chat and values.get("tools") else {}
    system = values.get(spoken)
    if asked is None:
        return Made(tools, frozenset(used), system=system)
    if isinstance(asked, list):
        before = with_system(origin, _unanswered(origin, key, asked, answers), system)
        return Made({"prompt": before, **tools}, frozenset({key, *used}))
    others = {name: values[name] for name in ("history",) if isinstance(values.get(name), list)}
    if key == "instruction" and "input" in values:
        others["input"] = values["input"]
    row = {"instruction": asked, "output": "", "system": system, **others}
    prompt = from_alpaca(origin, row, chat)["prompt"]
    return Made({"prompt": prompt, **tools}, frozenset({key, *used, *others}))


def _is_there(value: Any) -> bool:
    return value is not None and value not in ("", [])


def _unanswered(origin: str, key: str, asked: Messages, answers: list[Any]) -> Messages:
    """What is asked: the conversation, without its last turn where that repeats one of the answers."""
    if key == "prompt" or asked[-1].get("role") != "assistant":
        return asked
    said = asked[-1].get("content")
    ends = [a[-1].get("content") if isinstance(a, list) and a else a for a in answers]
    if said not in ends:
        raise UserError(
            f"{origin}: {key} ends with an answer that is none of those compared; leave it out of "
            f"{key}, or {key} out of the row: --config.data.ignore={key}"
        )
    return asked[:-1]


def _parted(
    origin: str, made: Made, chosen: Messages, rejected: Messages
) -> tuple[Messages, Messages, Messages]:
    """Prompt and answers of lists, which are answers alone or repeat the conversation before them."""
    asked = made.values.get("prompt")
    whole = [opens(answer) for answer in (chosen, rejected)]
    if asked is None or all(whole):
        shared, left, right = split_messages(chosen, rejected)
        spoken, rest = behind_system(shared)
        if not (shared if asked is None else rest):
            raise Bad(f"{origin}: chosen and rejected have no prompt in common{HINT}")
        if asked is None:
            return with_system(origin, shared, made.system), left, right
        before, body = behind_system(asked)
        prompt = asked_in(body, rest)
        if prompt is None:
            key = ",".join(sorted(made.used - {*BESIDE, "system_prompt"}))
            raise UserError(
                f"{origin}: the answers are whole conversations, in which {key} does not stand; leave it "
                f"out: --config.data.ignore={key}"
            )
        said = before[0].get("content") if before else None
        return with_system(origin, [*spoken, *prompt], said), left, right
    if any(whole):
        raise Bad(f"{origin}: of chosen and rejected, one alone repeats the prompt{HINT}")
    before, left = behind_system(chosen)
    if before and before == rejected[: len(before)]:  # what the system says stands in the answers
        said = before[0].get("content")
        return with_system(origin, asked, said), left, rejected[len(before) :]
    return asked, chosen, rejected


def _opened(
    origin: str, values: Mapping[str, Any]
) -> tuple[Mapping[str, Any], set[str], frozenset[str]]:
    """The values with chosen and rejected where they stand elsewhere; keys used for that; keys passed over."""
    none = frozenset[str]()
    sides = ("preferred_output", "non_preferred_output")
    if values.keys() >= {"input", *sides} and isinstance(values["input"], Mapping):  # OpenAI's
        rest = {key: part for key, part in values.items() if key not in ("input", *sides)}
        two = {"chosen": values[sides[0]], "rejected": values[sides[1]]}
        return {**rest, **values["input"], **two}, {"input", *sides}, none
    people = ("human_ref_A", "human_ref_B", "labels")
    if values.keys() >= {"history", *people}:  # SHP: 1 where A is preferred
        first = label_of(origin, "labels", values["labels"])
        chosen, rejected = people[:2] if first else people[1::-1]
        rest = {key: part for key, part in values.items() if key not in ("history", *people)}
        two = {"chosen": values[chosen], "rejected": values[rejected]}
        return {**rest, "question": values["history"], **two}, {"history", *people}, none
    if "chosen" in values:
        return values, set(), none
    ratings = next((key for key in ("ratings", "rating") if isinstance(values.get(key), list)), "")
    if "instruction" in values and "completions" in values:  # UltraFeedback
        others = frozenset(("models", "source", "correct_answers", "incorrect_answers"))
        return _rated(origin, values, *_scored(origin, values)), {"completions"}, others
    if ratings and isinstance(values.get("generations"), list):  # distilabel
        answers, scores = values["generations"], values[ratings]
        return _rated(origin, values, answers, scores), {"generations", ratings}, none
    return values, set(), none


def _scored(origin: str, values: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    """Answers and scores of UltraFeedback."""
    answers, wanted = values["completions"], ("response", "overall_score")
    if not isinstance(answers, list) or not all(
        isinstance(answer, dict) and set(wanted) <= answer.keys() for answer in answers
    ):
        raise UserError(f"{origin}: completions must be objects with response and overall_score")
    return [answer[wanted[0]] for answer in answers], [answer[wanted[1]] for answer in answers]


def _rated(
    origin: str, values: Mapping[str, Any], answers: list[Any], scores: list[Any]
) -> dict[str, Any]:
    """The row with the answers of the highest and of the lowest score, the first of equals."""
    if len(answers) < 2:
        raise Bad(f"{origin}: {counted(len(answers), 'completion')}: a pair needs two{HINT}")
    if len(answers) != len(scores):
        raise UserError(
            f"{origin}: {counted(len(answers), 'answer')} with {counted(len(scores), 'score')}"
        )
    for score in scores:
        if not isinstance(score, int | float) or score != score:
            raise Bad(f"{origin}: a score must be a number, not {shown(score)}{HINT}")
    if max(scores) == min(scores):
        raise Bad(f"{origin}: all completions have the score {scores[0]}{HINT}")
    best, worst = (answers[scores.index(end(scores))] for end in (max, min))
    return {**values, "chosen": best, "rejected": worst}


def words(judged: bool) -> Collection[str]:
    """The keys that a row of preferences may have, which `data.fields` gives their names in the data."""
    own = ("completion", "output", "label") if judged else ("chosen", "rejected")
    return frozenset(("prompt", *own, *TALKS, *QUESTIONS, *BESIDE))
