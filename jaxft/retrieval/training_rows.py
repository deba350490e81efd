"""Rows to train on with passages before their questions: RAFT (arXiv 2403.10131).

A training row's question has the passage that its answer comes from (the oracle) among its passages, the others
being what a search finds besides (distractors), in an order drawn for the row; a share 1 - P of the rows has
distractors alone, so that the model learns when to lean on what it knows. A held-out row has what a search finds,
as in use.

The paper is given the oracle of each question. Here it is the chunk that is found best by question and answer together.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from jaxft.data.chat import encode_chat
from jaxft.data.questions import prompt_and_reference
from jaxft.data.sources import Row
from jaxft.data.tokenizer import Tokenizer
from jaxft.errors import UserError
from jaxft.retrieval.index import Passage
from jaxft.retrieval.prompts import Retriever, open_retriever, question_of, with_question

TOGETHER = 64  # rows that are searched at once
SPARE = 4  # tokens, where texts meet: BOS, EOS, and what the template puts between
DEPTH = 4  # of a search, in passages asked for: what holds the answer is no distractor


def retrieving(config: ConfigDict, tokenizer: Tokenizer, max_length: int) -> dict[str, Any]:
    """What the reading of a run's rows takes besides: {"rewrite": ...} where `config.data.retrieve` is an index.

    Raises:
        UserError: as of `open_retriever`.
    """
    settings = config.data
    if not settings.retrieve:
        return {}
    retriever = open_retriever(
        settings.retrieve,
        tokenizer,
        passages=settings.retrieve_passages,
        budget=max_length,
        template=settings.retrieve_template,
    )
    return {
        "rewrite": lambda held_out: functools.partial(
            with_passages,
            retriever=retriever,
            max_length=max_length,
            share=None if held_out else settings.retrieve_oracle,
            seed=config.seed,
        )
    }


def with_passages(
    rows: Iterator[Row],
    *,
    retriever: Retriever,
    max_length: int,
    share: float | None,
    seed: int,
) -> Iterator[Row]:
    """Yields the rows with passages before their questions, cut so that the answer keeps its room.

    Of a conversation the last question has them, and the answer to it alone is trained.

    Args:
        rows: prompts with completions, or conversations.
        retriever: the index, and how its passages are put.
        max_length: tokens of a row.
        share: of the rows that have their oracle among the passages; None: the passages are those of a search.
        seed: of what is drawn; a row's draws depend on it and on where the row stands alone.

    Raises:
        UserError: a row that asks nothing, or one whose question and answer leave no room.
    """
    while some := list(itertools.islice(rows, TOGETHER)):
        asked = [_asked(row) for row in some]
        questions = [
            question_of(row.origin, prompt) for row, (prompt, _) in zip(some, asked, strict=True)
        ]
        chosen = _chosen(retriever, some, questions, [answer for _, answer in asked], share, seed)
        for row, (prompt, answer), question, passages in zip(
            some, asked, questions, chosen, strict=True
        ):
            room = max_length - _beside(retriever.tokenizer, row, prompt, answer, question)
            text, _ = retriever.put(row.origin, question, passages, room)
            yield _with_prompt(row, with_question(prompt, text))


def _asked(row: Row) -> tuple[Any, str]:
    """What a row asks, and what answers it."""
    if row.format == "text":
        raise UserError(
            f"{row.origin}: a text asks nothing: config.data.retrieve takes questions with answers"
        )
    return prompt_and_reference(row)


def _chosen(
    retriever: Retriever,
    rows: Sequence[Row],
    questions: Sequence[str],
    answers: Sequence[str],
    share: float | None,
    seed: int,
) -> list[list[Passage]]:
    """The passages of each row."""
    index, count = retriever.index, retriever.passages
    if share is None:
        return index.passages(index.search(questions, count, retriever.how))
    found = index.passages(index.search(questions, DEPTH * count, retriever.how))
    both = [f"{question} {answer}" for question, answer in zip(questions, answers, strict=True)]
    oracles = index.passages(index.search(both, 1, retriever.how))
    chosen = []
    for row, passages, best, answer in zip(rows, found, oracles, answers, strict=True):
        draw = random.Random(f"{seed} {row.origin}")
        oracle = best[:1] if draw.random() < share else []
        others = [
            one
            for one in passages
            if one.key not in {b.key for b in best} and not _holds(one, answer)
        ]
        mixed = [*oracle, *others[: count - len(oracle)]]
        draw.shuffle(mixed)
        chosen.append(mixed)
    return chosen


def _holds(passage: Passage, answer: str) -> bool:
    """Whether the answer stands in a passage, word for word."""
    wanted = " ".join(answer.split()).casefold().strip(". ")
    return bool(wanted) and wanted in " ".join(passage.text.split()).casefold()


def _beside(tokenizer: Tokenizer, row: Row, prompt: Any, answer: str, question: str) -> int:
    """Tokens of a row beside its question: its answer, and what a template writes."""
    if isinstance(prompt, str):
        return len(tokenizer.encode(answer, False)) + SPARE
    talk = row.values.get("messages") or [*prompt, *row.values["completion"]]
    whole = encode_chat(tokenizer, talk, tools=row.values.get("tools"))
    return len(whole) - len(tokenizer.encode(question, False)) + SPARE


def _with_prompt(row: Row, prompt: Any) -> Row:
    """The row with this prompt; a conversation as the prompt and completion that it is."""
    values = dict(row.values)
    if "messages" in values:
        messages = values.pop("messages")
        values["completion"] = messages[len(prompt) :][:1]
    values["prompt"] = prompt
    return dataclasses.replace(row, format="prompt_completion", values=values)
