"""Rows that ask something: what is asked, and what graders read."""

from __future__ import annotations

import json

import pytest

from jaxft.assets import tiny_folder
from jaxft.data import load_tokenizer
from jaxft.data.prompts import prepare_prompts, read_prompt_rows
from jaxft.errors import UserError


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(tiny_folder()), "chatml")


def rows(folder, *values, **settings):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in values))
    return read_prompt_rows(str(path), **settings)


def test_the_whole_row_is_the_graders_item(tmp_path):
    [row] = rows(tmp_path, {"prompt": "2 + 2 =", "answer": 4, "level": "easy"})
    assert row.values["prompt"] == "2 + 2 ="
    assert row.values["completion"] == "4"
    assert row.values["item"] == {"prompt": "2 + 2 =", "answer": 4, "level": "easy"}
    assert row.origin.endswith("rows.jsonl:1")


def test_of_messages_the_last_answer_is_not_asked(tmp_path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    both = rows(tmp_path, {"messages": turns}, {"messages": turns[:1], "system": "Be brief."})
    assert [len(row.values["prompt"]) for row in both] == [1, 2]
    assert [row.values["completion"] for row in both] == ["Hello", ""]
    assert both[1].values["prompt"][0] == {"role": "system", "content": "Be brief."}


def test_fields_say_what_the_prompt_is_called(tmp_path):
    [row] = rows(tmp_path, {"question": "Where?", "answer": "Here"}, fields={"prompt": "question"})
    assert row.values["prompt"] == "Where?"
    assert row.values["item"] == {"question": "Where?", "answer": "Here"}


def test_tokens_are_those_that_generate_asks_with(tmp_path, tokenizer):
    chat = {"prompt": [{"role": "user", "content": "Where?"}]}
    prompts, summary = prepare_prompts(
        rows(tmp_path, {"prompt": "Where?"}, chat), tokenizer, room=99
    )
    assert prompts[0].tokens.tolist() == tokenizer.encode("Where?")
    assert tokenizer.decode(prompts[1].tokens.tolist()).endswith("assistant\n")
    assert not prompts.trained.any()
    assert str(summary).startswith("2 prompts; ")


def test_what_stands_beside_a_prompt_changes_the_digest(tmp_path, tokenizer):
    made = [
        prepare_prompts(rows(tmp_path, {"prompt": "a", "answer": answer}), tokenizer, room=9)[
            0
        ].digest
        for answer in ("x", "y", "x")
    ]
    assert made[0] == made[2] != made[1]


def test_a_prompt_that_leaves_no_room_is_an_error_or_left_out(tmp_path, tokenizer):
    found = rows(tmp_path, {"prompt": "a"}, {"prompt": "a b c d e f g h i j"})
    with pytest.raises(
        UserError, match=r"rows.jsonl:2: the prompt has \d+ tokens, and 5 leave room"
    ):
        prepare_prompts(found, tokenizer, room=5)
    prompts, summary = prepare_prompts(found, tokenizer, room=5, skip=True)
    assert len(prompts) == summary.examples == summary.skipped == 1
    with pytest.raises(UserError, match="none of 1 prompt"):
        prepare_prompts(found[1:], tokenizer, room=5, skip=True)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"promt": "a"}, r"rows.jsonl:1: keys found: 'promt'.*nearest: 'prompt'"),
        ({"prompt": 3}, "prompt must be a string or a list of messages, not a number"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "the prompt is empty"),
    ],
)
def test_a_row_that_asks_nothing_is_refused(row, said, tmp_path):
    with pytest.raises(UserError, match=said):
        rows(tmp_path, row)
