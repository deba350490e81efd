r"""Files of preferences to rows: prompt, chosen and rejected, or prompt, completion and label.

Layouts, recognised by their keys:

    prompt, chosen, rejected        three strings, or three lists of messages
    chosen, rejected                whole conversations: what they begin with in common is the prompt. Strings
                                    are read as Anthropic's HH ("\n\nHuman: ...\n\nAssistant: ..."), by turns
    prompt, chosen, rejected        UltraFeedback, binarized: a string, and two lists of messages that hold it
    instruction, completions        UltraFeedback: the best and the worst answer by `overall_score`; the
                                    instruction is put as Alpaca's, see `from_alpaca`
    prompt, completion, label       KTO: two strings or two lists of messages, and true or false
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxft.data.conversions import from_alpaca
from jaxft.data.sources import Row, check_messages, find_sources
from jaxft.errors import UserError, nearest

TURN = re.compile(r"(?=\n\n(?:Human|Assistant):)")  # of HH
ANSWER = "\n\nAssistant:"
PAIRED = ("prompt", "chosen", "rejected")
JUDGED = ("prompt", "completion", "label")
NEEDS = {
    False: "prompt + chosen + rejected, or chosen + rejected",
    True: "prompt + completion + label",
}


class Bad(UserError):
    """A row that cannot be used, which may be left out on request."""


def read_preferences(
    paths: str | Path | Sequence[str | Path],
    *,
    judged: bool,
    skip: bool,
    held_out: bool = False,
    as_messages: bool = False,
) -> tuple[list[Row], int]:
    """Reads sources as rows of pairs or, if `judged`, of completions with a label.

    Args:
        paths: as of `read_rows`.
        judged: rows are prompt, completion and label (KTO).
        skip: leave out a row that cannot be used, rather than raise.
        held_out: which split to take where a source has several and names none.
        as_messages: whether an instruction becomes a message, as of `read_rows`.

    Returns:
        The rows, and how many were left out. A row's values are strings, or lists of messages: prompt, chosen
        and rejected, or prompt, completion and label.

    Raises:
        UserError: a file that cannot be read or holds no such rows, a row of SFT or of another layout, equal
            completions, an empty one, labels of one kind alone; with file and line.
    """
    rows: list[Row] = []
    skipped, first = 0, ""
    for source in find_sources(paths, held_out):
        for origin, values in source.read():
            first = first or origin
            try:
                rows.append(preference_row(origin, values, judged=judged, as_messages=as_messages))
            except Bad:
                if not skip:
                    raise
                skipped += 1
    if not rows:
        raise UserError(f"{first or paths}: no usable rows: {skipped} were left out")
    if judged:
        _check_both_labels(rows)
    return rows, skipped


def preference_row(
    origin: str, values: Mapping[str, Any], *, judged: bool, as_messages: bool = False
) -> Row:
    """One row, checked.

    Raises:
        Bad: equal completions or an empty one.
        UserError: another layout.
    """
    keys = JUDGED if judged else PAIRED
    made = _judged(origin, values) if judged else _paired(origin, values, as_messages)
    row = Row(
        origin=origin,
        format="judged" if judged else "pair",
        values=dict(zip(keys, made, strict=True)),
        unused=tuple(key for key in values if key not in (*keys, "instruction", "completions")),
    )
    _check_types(row, keys[:2] if judged else keys)
    if not judged and row.values["chosen"] == row.values["rejected"]:
        raise Bad(f"{origin}: chosen and rejected are equal{_HINT}")
    for key in keys[1:2] if judged else keys[1:]:
        if not _text(row.values[key]).strip():
            raise Bad(f"{origin}: {key} is empty{_HINT}")
    return row


_HINT = " (data.bad_rows=skip leaves such rows out)"


def _paired(origin: str, values: Mapping[str, Any], as_messages: bool) -> tuple[Any, Any, Any]:
    """prompt, chosen, rejected of any layout of pairs."""
    if {"instruction", "completions"} <= values.keys() and "chosen" not in values:
        return _rated(origin, values, as_messages)
    if not {"chosen", "rejected"} <= values.keys():
        raise UserError(_other_layout(origin, values, judged=False))
    chosen, rejected, prompt = values["chosen"], values["rejected"], values.get("prompt")
    if isinstance(chosen, list) and isinstance(rejected, list) and not isinstance(prompt, list):
        for key in ("chosen", "rejected"):
            check_messages(Row(origin, "pair", dict(values)), key)
        shared, chosen, rejected = split_messages(chosen, rejected)
        if not shared and isinstance(prompt, str):
            shared = [{"role": "user", "content": prompt}]
        if not shared:
            raise Bad(f"{origin}: chosen and rejected have no prompt in common{_HINT}")
        return shared, chosen, rejected
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        return split_texts(chosen, rejected)
    return prompt, chosen, rejected


def split_messages(
    chosen: list[Any], rejected: list[Any]
) -> tuple[list[Any], list[Any], list[Any]]:
    """The messages with which two conversations begin in common, and the rest of each.

    What is left over is never empty unless the conversations are equal: an answer that both have is
    part of the prompt only if more follows in both.
    """
    shared = _common(chosen, rejected)
    shared -= shared > 0 and shared in (len(chosen), len(rejected))
    return chosen[:shared], chosen[shared:], rejected[shared:]


def split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    r"""The turns with which two of HH's conversations begin in common, and the rest of each.

    The prompt ends with the mark of the turn that differs, if both have the same mark. Texts without
    marks are parted at the last space before they differ.

    >>> split_texts("\n\nHuman: hi\n\nAssistant: hello", "\n\nHuman: hi\n\nAssistant: yes?")
    ('\n\nHuman: hi\n\nAssistant:', ' hello', ' yes?')
    >>> split_texts("the sky is blue", "the sky is black")
    ('the sky is', ' blue', ' black')
    """
    left, right = TURN.split(chosen), TURN.split(rejected)
    if len(left) > 1 and len(right) > 1:
        turns = _common(left, right)
        turns -= turns > 0 and turns in (len(left), len(right))
        prompt = "".join(left[:turns])
        if all(turn.startswith(ANSWER) for turn in (left[turns], right[turns])):
            prompt += ANSWER
        return prompt, chosen[len(prompt) :], rejected[len(prompt) :]
    same = _common(chosen, rejected)
    same = max(chosen.rfind(" ", 0, same), 0)
    return chosen[:same], chosen[same:], rejected[same:]


def _common(left: Sequence[Any], right: Sequence[Any]) -> int:
    """How many leading items two sequences share."""
    shorter = min(len(left), len(right))
    return next((i for i in range(shorter) if left[i] != right[i]), shorter)


def _rated(origin: str, values: Mapping[str, Any], as_messages: bool) -> tuple[Any, Any, Any]:
    """UltraFeedback's own layout: the answers of the highest and of the lowest score, the first of equals."""
    answers = values["completions"]
    wanted = ("response", "overall_score")
    if not isinstance(answers, list) or not all(
        isinstance(answer, dict) and set(wanted) <= answer.keys() for answer in answers
    ):
        raise UserError(f"{origin}: completions must be objects with response and overall_score")
    if len(answers) < 2:
        raise Bad(f"{origin}: {len(answers)} completions: a pair needs two{_HINT}")
    scores = [answer["overall_score"] for answer in answers]
    if not all(isinstance(score, (int, float)) for score in scores):
        raise UserError(f"{origin}: overall_score must be a number")
    if max(scores) == min(scores):
        raise Bad(f"{origin}: all completions have the score {scores[0]}{_HINT}")
    instruction = values["instruction"]
    best, worst = (
        from_alpaca(origin, {"instruction": instruction, "output": answer["response"]}, as_messages)
        for answer in (answers[scores.index(end(scores))] for end in (max, min))
    )
    return best["prompt"], best["completion"], worst["completion"]


def _judged(origin: str, values: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """prompt, completion, label."""
    if not set(JUDGED) <= values.keys():
        raise UserError(_other_layout(origin, values, judged=True))
    if not isinstance(values["label"], bool):
        raise UserError(f"{origin}: label must be true or false, not {values['label']!r}")
    return values["prompt"], values["completion"], values["label"]


def _other_layout(origin: str, values: Mapping[str, Any], *, judged: bool) -> str:
    """What stands there instead."""
    needs, found = NEEDS[judged], ", ".join(map(repr, values)) or "none"
    if {"prompt", "completion"} <= values.keys() or values.keys() & {"messages", "text"}:
        kind = "a row of KTO" if "label" in values else "a row for SFT"
        return f"{origin}: {kind} (keys {found}); this objective needs {needs}"
    if {"chosen", "rejected"} <= values.keys():
        return f"{origin}: a row of pairs (keys {found}); this objective needs {needs}"
    wanted = [key for key in (JUDGED if judged else PAIRED) if key not in values]
    hints = "".join(dict.fromkeys(nearest(key, wanted, count=1) for key in values))
    return f"{origin}: keys found: {found}; a row needs {needs}{hints}"


def _check_types(row: Row, keys: Sequence[str]) -> None:
    """All strings, or all lists of messages."""
    kinds: dict[str, type] = {key: type(row.values[key]) for key in keys}
    if set(kinds.values()) == {list}:
        for key in keys:
            check_messages(row, key)
    elif set(kinds.values()) != {str}:
        names = {str: "a string", list: "a list", type(None): "null"}
        found = ", ".join(f"{k} {names.get(kind, kind.__name__)}" for k, kind in kinds.items())
        raise UserError(
            f"{row.origin}: all strings or all lists of messages are needed, not {found}"
        )


def _text(completion: Any) -> str:
    """What a completion says."""
    if isinstance(completion, str):
        return completion
    return "".join(message["content"] for message in completion)


def _check_both_labels(rows: Sequence[Row]) -> None:
    labels = {row.values["label"] for row in rows}
    if len(labels) == 1:
        only = str(labels.pop()).lower()
        raise UserError(
            f"{rows[0].origin}: every label is {only}, in {len(rows)} rows: KTO needs both kinds"
        )
