r"""Files of preferences to rows: prompt, chosen and rejected, or prompt, completion and label.

Layouts, recognised by their keys (see `preference_layouts`):

    prompt, chosen, rejected        three strings, or three lists of messages
    chosen, rejected                whole conversations: what they begin with in common is the prompt. Strings
                                    are read as Anthropic's HH ("\n\nHuman: ...\n\nAssistant: ..."), by turns
    prompt, chosen, rejected        UltraFeedback, binarized: a string, and two lists of messages that hold it
    question, chosen, rejected      Orca's, with `system`; the same with `instruction` and `input` (Alpaca's), with
                                    `conversations` or `messages` (LLaMA-Factory, Axolotl)
    instruction, completions        UltraFeedback: the best and the worst answer by `overall_score`; the
                                    instruction is put as Alpaca's, see `from_alpaca`
    instruction, generations, ratings           distilabel
    input, preferred_output, non_preferred_output           OpenAI's
    history, human_ref_A, human_ref_B, labels               SHP
    prompt, completion, label       KTO: two strings or two lists of messages, and true or false; `messages` and
                                    label, whose last turn is judged; question or instruction as above
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxft.data.conversions import fields_for, renamed
from jaxft.data.naming import fields_for_preferences, flags, misspelt
from jaxft.data.preference_layouts import HINT, QUESTIONS, TALKS, Bad, judged_row, paired_row, words
from jaxft.data.sources import Row, check_messages, check_tools, find_sources
from jaxft.data.unread import refuse_unread, strings, unread
from jaxft.errors import UserError, counted, worded

PAIRED = ("prompt", "chosen", "rejected")
JUDGED = ("prompt", "completion", "label")
NEEDS = {
    False: "prompt + chosen + rejected, or chosen + rejected",
    True: "prompt + completion + label",
}


def read_preferences(
    paths: str | Path | Sequence[str | Path],
    *,
    judged: bool,
    skip: bool,
    held_out: bool = False,
    as_messages: bool = False,
    fields: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    strict: bool = False,
) -> tuple[list[Row], int]:
    """Reads sources as rows of pairs or, if `judged`, of completions with a label.

    Args:
        paths: as of `read_rows`.
        judged: rows are prompt, completion and label (KTO).
        skip: leave out a row that cannot be used, rather than raise.
        held_out: which split to take where a source has several and names none.
        as_messages: whether an instruction becomes a message, as of `read_rows`.
        fields: what the layouts' keys are called, as of `read_rows`; of each source its first row decides which way
            round they are written.
        ignore: keys that are left out.
        strict: refuse a row with text that is not used.

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
        own: dict[str, str] = {}
        for origin, values in source.read():
            first = first or origin
            if fields and not own:
                own = fields_for(fields, values, words(judged), NEEDS[judged])
            values = renamed(origin, values, own, ignore)
            try:
                row = preference_row(origin, values, judged=judged, as_messages=as_messages)
                if strict:
                    refuse_unread(origin, row.unread)
                rows.append(row)
            except Bad:
                if not skip:
                    raise
                skipped += 1
    if not rows:
        raise UserError(
            f"{first or paths}: no usable rows: {skipped} {worded(skipped, 'was', 'were')} left out"
        )
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
    made = (judged_row if judged else paired_row)(origin, values, as_messages)
    if made is None:
        raise UserError(_other_layout(origin, values, judged=judged, as_messages=as_messages))
    left = {key: part for key, part in values.items() if key not in made.used}
    layout = " + ".join(key for key in values if key in made.used and key != "tools")
    heard = {key: values[key] for key in made.used if key in values} | made.values
    row = Row(
        origin=origin,
        format="judged" if judged else "pair",
        values={
            key: made.values.get(key) for key in (*keys, "tools") if key in (*keys, *made.values)
        },
        unused=tuple(key for key in left if key not in made.passed),
        written="" if made.used - {"tools"} == set(keys) else layout,
        unread=unread({key: part for key, part in left.items() if key not in made.passed}, heard),
    )
    _check_types(row, keys[:2] if judged else keys)
    check_tools(row)
    if not judged and row.values["chosen"] == row.values["rejected"]:
        raise Bad(f"{origin}: chosen and rejected are equal{HINT}")
    for key in keys[1:2] if judged else keys[1:]:
        if not says_anything(row.values[key]):
            raise Bad(f"{origin}: {key} is empty{HINT}")
    return row


def says_anything(completion: Any) -> bool:
    """Whether a completion has a text that is not blank, or a call of a function.

    >>> says_anything([{"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}]), says_anything(" ")
    (True, False)
    """
    if isinstance(completion, str):
        return bool(completion.strip())
    return any(
        message.get("tool_calls") or any(text.strip() for text in strings(message))
        for message in completion
    )


def _other_layout(
    origin: str, values: Mapping[str, Any], *, judged: bool, as_messages: bool
) -> str:
    """What stands there instead, and what to type if it is the same under other names."""
    needs, found = NEEDS[judged], ", ".join(map(repr, values)) or "none"
    keys, pairs = JUDGED if judged else PAIRED, {"chosen", "rejected"}
    nulls = [key for key in keys if key in values and values[key] is None]
    if nulls:
        return f"{origin}: {nulls[0]} is null; a row needs {needs}"
    if judged and pairs <= values.keys():
        return f"{origin}: a row of pairs (keys {found}); this objective needs {needs}"
    asks = values.keys() & {*TALKS, *QUESTIONS}
    wanted = [key for key in keys if key not in values and not (key == "prompt" and asks)]
    fields = fields_for_preferences(values, wanted, keys)
    whole = set(wanted) <= set(fields)
    sft = ({"prompt", "completion"}, {"messages"}, {"text"}, {"conversations"})
    if not whole and any(other <= values.keys() for other in sft) and not pairs & values.keys():
        kind = "a row of KTO" if "label" in values else "a row for SFT"
        return f"{origin}: {kind} (keys {found}); this objective needs {needs}"
    if pairs <= values.keys() and not fields:
        return (
            f"{origin}: chosen and rejected are texts without turns, and no key says what is asked "
            f"(keys {found}); a row needs {needs}"
        )
    typed = f"; name them: {flags(fields)}" if whole else ""
    if whole and as_messages and "prompt" in fields:
        chat = flags({"question": fields["prompt"]})
        typed += f" (or, for what the chat template is to write as the user's: {chat})"
    return f"{origin}: keys found: {found}; a row needs {needs}{misspelt(values, wanted)}{typed}"


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


def _check_both_labels(rows: Sequence[Row]) -> None:
    labels = {row.values["label"] for row in rows}
    if len(labels) == 1:
        only = str(labels.pop()).lower()
        raise UserError(
            f"{rows[0].origin}: every label is {only}, in {counted(len(rows), 'row')}: KTO needs both kinds"
        )
