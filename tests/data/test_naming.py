"""Rows whose keys have other names: the error says exactly what to type, and typing it works."""

from __future__ import annotations

import re

import pytest

from jaxft.data.preference_rows import read_preferences
from jaxft.data.sources import read_rows
from jaxft.errors import UserError

TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


def typed(message):
    """What the message says to type first: fields, and keys that are left out."""
    message = re.split(r" \(or ", message)[0]
    return dict(re.findall(r"--config\.data\.fields\.(\w+)=(\S+)", message))


def refused(path, read):
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:1: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


EXAMPLES = [
    ({"question": "Why?", "answer": "So."}, {"prompt": "question", "completion": "answer"}),
    ({"id": "x", "question": "Why?", "answer": "So."}, {"prompt": "question", "completion": "answer"}),
    ({"prompt": "Why?", "response": "So."}, {"completion": "response"}),
    ({"context": "Paris.", "response": "So."}, {"prompt": "context", "completion": "response"}),
    ({"query": "Why?", "response": "So.", "type": "x"}, {"prompt": "query", "completion": "response"}),
    ({"instruction": "a", "response": "b"}, {"output": "response"}),
    (
        {"instruction": "a", "context": "b", "response": "c", "category": "open_qa"},
        {"output": "response", "input": "context"},
    ),
    (
        {"question": "a", "context": "b", "answer": "c"},
        {"instruction": "question", "input": "context", "output": "answer"},
    ),
    (
        {"system_prompt": "s", "question": "a", "response": "c"},
        {"instruction": "question", "output": "response"},
    ),
    ({"question": "Why?", "answer": {"text": "So."}}, {"prompt": "question", "completion": "answer.text"}),
    ({"frage": "Warum?", "antwort": "Darum."}, {"prompt": "frage", "completion": "antwort"}),
    ({"Prompt": "a", "Completion": "b"}, {"prompt": "Prompt", "completion": "Completion"}),
    ({"article": "a", "highlights": "b"}, {"prompt": "article", "completion": "highlights"}),
    ({"content": "Some text."}, {"text": "content"}),
    ({"dialog": TALK}, {"messages": "dialog"}),
    ({"dialog": SHAREGPT}, {"conversations": "dialog"}),
]  # fmt: skip


@pytest.mark.parametrize(("row", "fields"), EXAMPLES)
def test_what_to_type_for_examples(row, fields, write):
    """What is typed is read, and leaves no text unread."""
    path = write(row)
    said = refused(path, lambda path: list(read_rows(path)))
    assert typed(said) == fields
    assert "nearest: 'conversations'" not in said
    (read,) = read_rows(path, fields=fields, strict=True)
    assert read.unread == ()


def test_exact_words_for_question_and_answer(write):
    said = refused(write({"question": "Why?", "answer": "So."}), lambda path: list(read_rows(path)))
    assert said.endswith(
        "name them: --config.data.fields.prompt=question --config.data.fields.completion=answer"
    )


def test_without_the_context_too(write):
    """The second way leaves it out in so many words."""
    path = write({"question": "a", "context": "b", "answer": "c"})
    said = refused(path, lambda path: list(read_rows(path)))
    assert said.endswith(
        "(or without 'context': --config.data.fields.prompt=question "
        "--config.data.fields.completion=answer --config.data.ignore=context)"
    )


def test_where_nothing_can_be_told_nothing_is_typed(write):
    for row in ({"foo": 3}, {"role": "user", "content": "a"}):
        assert "--config" not in refused(write(row), lambda path: list(read_rows(path)))


def test_what_stands_beside_a_question_is_not_taken_for_its_answer(write):
    """As in SQuAD, whose answers are a list."""
    row = {"question": "a", "context": "b", "answers": {"text": ["c"], "answer_start": [0]}}
    assert typed(refused(write(row), lambda path: list(read_rows(path)))) == {}


def test_a_row_of_preferences_names_its_recipe(write):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert "--config configs/dpo.py:lora" in refused(write(row), lambda path: list(read_rows(path)))


PAIRS = [
    ({"frage": "Was?", "chosen": "a", "rejected": "b"}, {"prompt": "frage"}),
    (
        {"question": "a", "response_j": "b", "response_k": "c"},
        {"chosen": "response_j", "rejected": "response_k"},
    ),
    (
        {"instruction": "a", "chosen_response": "b", "rejected_response": "c"},
        {"chosen": "chosen_response", "rejected": "rejected_response"},
    ),
    (
        {"prompt": "a", "preferred": "b", "dispreferred": "c"},
        {"chosen": "preferred", "rejected": "dispreferred"},
    ),
]
PAIRS += [
    (
        {"trajectory": SHAREGPT[:1], "task": "qa", "chosen": "b", "rejected": "c"},
        {"prompt": "trajectory"},
    ),
    (
        {"dialog": TALK[:1], "chosen": TALK[1:], "rejected": [TALK[1] | {"content": "c"}]},
        {"prompt": "dialog"},
    ),
    (
        {"frage": "Was?", "chosen": TALK[1:], "rejected": [TALK[1] | {"content": "c"}]},
        {"prompt": "frage"},
    ),
]
JUDGED = [
    ({"question": "a", "answer": "b", "label": True}, {"completion": "answer"}),
    ({"prompt": "a", "response": "b", "label": True}, {"completion": "response"}),
    ({"prompt": "a", "completion": "b", "is_good": True}, {"label": "is_good"}),
    (
        {"prompt": "a", "answer": "b", "thumbs_up": True},
        {"completion": "answer", "label": "thumbs_up"},
    ),
]


@pytest.mark.parametrize(
    ("row", "fields", "judged"), [(*case, False) for case in PAIRS] + [(*case, True) for case in JUDGED]
)  # fmt: skip
def test_what_to_type_for_preferences(row, fields, judged, write):
    """Only what is not called so already; and it is read."""
    other = {key: not value if value is True else value for key, value in row.items()}
    path = write(row, other) if judged else write(row)
    settings = {"judged": judged, "skip": False}
    assert typed(refused(path, lambda path: read_preferences(path, **settings))) == fields
    rows, _ = read_preferences(path, fields=fields, strict=True, **settings)
    assert rows[0].unread == ()
    turned = {own: key for key, own in fields.items()}
    assert read_preferences(path, fields=turned, strict=True, **settings)[0][0] == rows[0]
