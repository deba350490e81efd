"""Rows of prompts to token ids: what is asked, and beside it whatever the graders read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxft.data.chat import Ending, encode_chat, end_of_turn
from jaxft.data.conversions import fields_for, renamed, with_system
from jaxft.data.examples import _check_ids, _encode, _told_of
from jaxft.data.records import json_type
from jaxft.data.sources import Row, Source, check_messages, check_tools, find_sources
from jaxft.data.store import Example, Examples
from jaxft.data.tokenizer import Tokenizer
from jaxft.errors import UserError, counted, nearest

WORDS = ("prompt", "messages", "system", "tools")
# What answers a prompt in the data: shown beside samples, and for the graders to compare with.
ANSWERS = ("completion", "answer", "reference", "solution", "output", "response", "chosen")


class Prompts(Examples):
    """Prompts as `Examples`, none of whose tokens is trained.

    Attributes:
        rows: of each prompt, the row that asks it; its item is what graders read.
    """

    def __init__(self, prompts: Sequence[Example], rows: Sequence[Row]) -> None:
        flat = Examples.of(list(prompts))
        index = (flat.lengths, flat.source, flat.lines, flat.sources, flat.row_lengths)
        super().__init__(flat.tokens, flat.trained, *index)
        self.rows = list(rows)

    @property
    def digest(self) -> str:
        """sha256 of the prompts' tokens and of all that stands in their rows."""
        digest = hashlib.sha256(self.fingerprint.encode())
        for row in self.rows:
            text = json.dumps(row.values["item"], sort_keys=True, default=str)
            digest.update(text.encode("utf-8", "backslashreplace"))
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class PromptSummary:
    """What became of the rows; `str` is the line that the log shows.

    Attributes:
        rows: that were read.
        examples: prompts that are asked.
        skipped: left out because they leave no room, on request; `first_skipped` is the first one's location.
        tokens: of all prompts.
        longest: tokens of the longest prompt.
        room: tokens that a prompt may have.
        columns: keys of the rows beside the prompt, which graders read.
    """

    rows: int
    examples: int
    skipped: int
    first_skipped: str
    tokens: int
    longest: int
    room: int
    columns: tuple[str, ...]

    def __str__(self) -> str:
        """One line; what did not occur is left out."""
        parts = [
            counted(self.examples, "prompt"),
            counted(self.tokens, "token"),
            f"longest {self.longest}",
        ]
        if self.columns:
            parts.append(f"for graders: {', '.join(self.columns)}")
        if self.skipped:
            parts.append(
                f"{counted(self.skipped, 'prompt')} of more than {counted(self.room, 'token')} skipped, "
                f"the first at {self.first_skipped}"
            )
        return "; ".join(parts)


def read_prompt_rows(
    paths: Any,
    *,
    held_out: bool = False,
    fields: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
) -> list[Row]:
    """The rows of sources that ask something.

    A row's `values` are prompt (a text or messages), completion (an answer that stands in the data, "" without one),
    item (the whole row as it stands there), and tools where there are any. Of `messages` the assistant's last turn is
    the answer.

    Args:
        paths: as of `read_rows`.
        held_out: which split to take where a source has several and names none.
        fields: what prompt, messages, system and tools are called in the sources.
        ignore: keys that are left out.

    Raises:
        UserError: a file that cannot be read, a row without a prompt, or none at all; with file and line.
    """
    rows: list[Row] = []
    for source in find_sources(paths, held_out):
        before = len(rows)
        rows.extend(_rows_of(source, fields or {}, ignore))
        if len(rows) == before:
            raise UserError(f"{source.name}: no prompts: it is empty")
    return rows


def _rows_of(source: Source, fields: Mapping[str, str], ignore: Sequence[str]) -> Iterator[Row]:
    own: dict[str, str] = {}
    for origin, values in source.read():
        if fields and not own:
            own = fields_for(fields, values, WORDS, "prompt, or messages")
        item = {key: value for key, value in values.items() if key not in ignore}
        yield _row(origin, renamed(origin, values, own, ignore), item)


def _row(origin: str, values: dict[str, Any], item: Mapping[str, Any]) -> Row:
    asked = Row(origin, "prompt", dict(values))
    check_tools(asked)
    prompt, answer = _asked(asked)
    if system := values.get("system"):
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        prompt = with_system(origin, messages, system)
    if not prompt:
        raise UserError(f"{origin}: the prompt is empty: there is nothing to answer")
    kept = {"prompt": prompt, "completion": answer, "item": dict(item)}
    if "tools" in asked.values:
        kept["tools"] = asked.values["tools"]
    return Row(origin, "prompt", kept)


def _asked(row: Row) -> tuple[Any, str]:
    """What a row asks, and the answer that it holds."""
    origin, values = row.origin, row.values
    if "prompt" not in values and "messages" not in values:
        found = ", ".join(map(repr, values)) or "none"
        hints = "".join(nearest(name, WORDS, count=1) for name in values)
        raise UserError(
            f"{origin}: keys found: {found}; a row needs prompt or messages{hints}; "
            "config.data.fields says what they are called"
        )
    answers = (values[key] for key in ANSWERS if isinstance(values.get(key), (str, int, float)))
    answer = str(next(answers, ""))
    if "prompt" in values:
        if isinstance(values["prompt"], str):
            return values["prompt"], answer
        if not isinstance(values["prompt"], list):
            raise UserError(
                f"{origin}: prompt must be a string or a list of messages, not {json_type(values['prompt'])}"
            )
        check_messages(row, "prompt")
        return values["prompt"], answer
    check_messages(row, "messages")
    messages = values["messages"]
    if messages[-1]["role"] == "assistant":
        return messages[:-1], str(messages[-1].get("content") or "")
    return messages, answer


def prepare_prompts(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    *,
    room: int,
    skip: bool = False,
    vocabulary_size: int | None = None,
) -> tuple[Prompts, PromptSummary]:
    """Tokenizes prompts: a text with the BOS that it has in training, messages by the chat template.

    Args:
        rows: as `read_prompt_rows` gives them.
        tokenizer: the model's.
        room: the tokens that a prompt may have.
        skip: leave out longer ones, rather than raise.
        vocabulary_size: ids at or above it are an error; None skips the check.

    Raises:
        UserError: a prompt without tokens, or one that leaves no room for an answer; with file and line.
    """
    rows = list(rows)
    texts = [row.values["prompt"] for row in rows if isinstance(row.values["prompt"], str)]
    encoded = iter(_encode(tokenizer, texts))
    prompts: list[Example] = []
    asked: list[Row] = []
    columns: dict[str, None] = {}
    skipped, first, longest = 0, "", 0
    for row in rows:
        ids = _ids(row, tokenizer, encoded)
        _check_ids(row, ids, vocabulary_size)
        if not ids:
            raise UserError(
                f"{row.origin}: the prompt has no tokens: there is nothing to go on from"
            )
        longest = max(longest, len(ids))
        if len(ids) > room:
            if not skip:
                raise UserError(
                    f"{row.origin}: the prompt has {counted(len(ids), 'token')}, and {max(room, 0)} leave room for an "
                    "answer of config.rollout.max_new_tokens: raise config.data.max_length, lower max_new_tokens, or "
                    "leave such rows out (config.data.bad_rows=skip)"
                )
            skipped, first = skipped + 1, first or row.origin
            continue
        columns |= dict.fromkeys(key for key in row.values["item"] if key not in WORDS)
        tokens = np.asarray(ids, np.int32)
        prompts.append(Example(tokens, np.zeros(len(ids), bool), row.origin))
        asked.append(row)
    if not prompts:
        raise UserError(
            f"{rows[0].origin}: none of {counted(len(rows), 'prompt')} leaves room for an answer: raise "
            "config.data.max_length, or lower config.rollout.max_new_tokens"
        )
    summary = PromptSummary(
        rows=len(rows),
        examples=len(prompts),
        skipped=skipped,
        first_skipped=first,
        tokens=sum(len(prompt.tokens) for prompt in prompts),
        longest=longest,
        room=room,
        columns=tuple(columns),
    )
    return Prompts(prompts, asked), summary


def _ids(row: Row, tokenizer: Tokenizer, encoded: Iterator[list[int]]) -> list[int]:
    prompt = row.values["prompt"]
    if isinstance(prompt, str):
        return next(encoded)
    with _told_of(row):
        tools = row.values.get("tools")
        return encode_chat(tokenizer, prompt, add_generation_prompt=True, tools=tools)


def ending_of(tokenizer: Tokenizer, chats: bool) -> Ending:
    """How an answer ends beside the tokenizer's EOS."""
    return end_of_turn(tokenizer) if chats else Ending()
