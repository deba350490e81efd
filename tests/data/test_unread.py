"""Which unused keys look like text of the example, and which say nothing that is not said."""

from __future__ import annotations

import json

import pytest

from jaxft.data.sources import read_rows
from jaxft.data.unread import unread
from jaxft.errors import UserError

USED = {"prompt": "What is the capital of France?", "completion": "The capital is Paris."}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("context", "Paris"),
        ("system", "Be brief."),
        ("input", "7"),
        ("history", [["a", "b"]]),
        ("choices", ["Lyon", "Paris"]),
        ("notes", "One should look into an atlas"),
        ("background", "France?"),
        ("hinweis", "Das steht im Atlas."),
        ("turns", [{"role": "user", "content": "hi"}]),
        ("conv", [{"from": "human", "value": "hi"}]),
        ("extra", {"passage": "Paris"}),
        ("extra", '{"passage": "Paris"}'),
        ("source_text", "Hallo"),
        ("userQuestion", "Hallo"),
        ("ヒント", "フランスの首都はどこですか"),
        ("source", "word " * 30),
        ("output", "Lyon"),
    ],
)
def test_text_of_the_example(key, value):
    assert unread({key: value}, USED) == (key,)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("id", "a b c d e f g"),
        ("prompt_id", "a b c d e f"),
        ("source", "Open Orca, the first million rows"),
        ("category", "open question answering about the world"),
        ("url", "https://example.org/a b c d e f"),
        ("score", 3.5),
        ("label", "good one indeed"),
        ("created_at", "Mon Jan 5 10:00:00 2026"),
        ("metadata", {"note": "Seen by one of us, twice."}),
        ("answer_type", "a name of some place, one"),
        ("context", ""),
        ("context", None),
        ("choices", []),
        ("foo", "bar baz"),
        ("file", "a/b/c/d/e/f.txt"),
        ("system_fingerprint_hash", "fp x"),
        ("tokens", [1, 2, 3]),
    ],
)
def test_ids_sources_scores_and_nothing(key, value):
    assert unread({key: value}, USED) == ()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("question", "What is  the capital of France? "),  # the same text
        ("messages", [{"role": "user", "content": USED["prompt"]}]),
        ("answer", "Paris"),  # a word of the completion
        ("text", f"### Q: {USED['prompt']}\n### A: {USED['completion']}"),  # the whole, otherwise
        ("responses", ["The capital is Lyon.", "The capital is Paris."]),  # where it was taken from
    ],
)
def test_what_is_said_elsewhere_is_no_loss(key, value):
    assert unread({key: value}, USED) == ()


ROW = {"prompt": "Where?", "completion": " Paris.", "context": "Paris is big.", "id": 3}


def test_such_a_row_is_refused_where_it_is_asked_for(write):
    """With file and line, the key, and both ways out."""
    path = write({"prompt": "a", "completion": "b"}, ROW)
    assert [row.unread for row in read_rows(path)] == [(), ("context",)]
    with pytest.raises(UserError) as caught:
        list(read_rows(path, strict=True))
    said = str(caught.value)
    assert said.startswith(f"{path}:2: 'context': text of the example that would not be used")
    assert said.endswith("config.data.fields, or leave it out: --config.data.ignore=context")


def test_a_key_is_left_out_on_purpose(write):
    (row,) = read_rows(write(ROW), ignore=("context",), strict=True)
    assert (row.unused, row.unread) == (("id",), ())


def test_a_text_has_no_place_for_what_the_system_says(write):
    """Without a chat template it is told, with the way out; with one it is written."""
    row = {"prompt": "Where?", "completion": "Paris.", "system_prompt": "Be brief."}
    with pytest.raises(UserError, match=r"'system_prompt'.*config\.data\.chat_template"):
        list(read_rows(write(row), strict=True))
    (chat,) = read_rows(write(row), strict=True, as_messages=True)
    assert [message["role"] for message in chat.values["prompt"]] == ["system", "user"]


def test_a_text_has_no_place_for_tools(write):
    """A conversation has."""
    tools = [{"type": "function", "function": {"name": "add"}}]
    (row,) = read_rows(write({"prompt": "a", "completion": "b", "tools": tools}))
    assert row.unread == ("tools",)
    turns = [[{"role": role, "content": "a"}] for role in ("user", "assistant")]
    (row,) = read_rows(write({"prompt": turns[0], "completion": turns[1], "tools": tools}))
    assert row.unread == ()


def test_the_words_to_type_are_all_there(write):
    row = json.loads(json.dumps(ROW)) | {"hint": "It is in France."}
    with pytest.raises(UserError, match=r"--config\.data\.ignore=context,hint$"):
        list(read_rows(write(row), strict=True))
