"""Rows that are too much for the chat template's process: they are counted, and the others are trained on."""

from __future__ import annotations

import dataclasses

import pytest

from jaxft.data import Row, prepare_examples
from jaxft.data.preferences import prepare_preferences
from jaxft.errors import UserError

# Gives up its memory where a message says so, as a text of many megabytes would.
GREEDY = "{% for m in messages %}{{ m.content * (10**9 if m.content == 'long' else 1) }}{{ eos_token }}{% endfor %}"


def conversation(number, said):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": said}]
    return Row(f"t.jsonl:{number}", "messages", {"messages": turns})


def pair(number, said):
    prompt, completion = (
        [{"role": "user", "content": "a"}],
        [{"role": "assistant", "content": said}],
    )
    return Row(
        f"t.jsonl:{number}", "prompt_completion", {"prompt": prompt, "completion": completion}
    )


def prepared(tokenizer, rows, loss_on="completion"):
    tokenizer = dataclasses.replace(tokenizer, chat_template=GREEDY)
    return prepare_examples(rows, tokenizer, max_length=64, loss_on=loss_on)


@pytest.mark.parametrize("make", [conversation, pair])
@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_a_row_that_is_too_much_is_counted_with_its_place(tokenizer, make, loss_on):
    rows = [make(n, said) for n, said in enumerate(["b", "long", "c", "long"], 1)]
    examples, summary = prepared(tokenizer, rows, loss_on)
    assert [example.origin for example in examples] == ["t.jsonl:1", "t.jsonl:3"]
    assert (summary.rows, summary.lost, summary.examples) == (4, 2, 2)
    assert (
        "2 rows left out, too long for the chat template's process (the first at t.jsonl:2)"
        in str(summary)
    )


def test_nothing_but_such_rows_is_an_error_with_the_first_place(tokenizer):
    with pytest.raises(UserError, match=r"t\.jsonl:1: .* more than 128 MB"):
        prepared(tokenizer, [conversation(1, "long"), conversation(2, "long")])


def test_the_template_is_given_up_when_the_first_rows_are_all_too_much(tokenizer):
    """And not only after a whole file of them."""

    def rows():
        yield from (conversation(n, "long") for n in range(1, 1025))
        raise AssertionError("more rows were asked for")

    with pytest.raises(UserError, match=r"t\.jsonl:1: "):
        prepared(tokenizer, rows())


@pytest.mark.parametrize("judged", [False, True])
def test_preferences_lose_such_rows_as_well(tokenizer, judged):
    said = ["b", "c", "long", "d", "long"]
    turns = [[{"role": "assistant", "content": answer}] for answer in said]
    prompt = [{"role": "user", "content": "a"}]
    sides = [{"completion": turn, "label": True} if judged else {"chosen": turn, "rejected": turns[0]}
             for turn in turns]  # fmt: skip
    rows = [
        Row(f"t.jsonl:{n}", "judged" if judged else "pair", {"prompt": prompt, **side})
        for n, side in enumerate(sides, 1)
    ]
    settings = {"max_length": 64, "share": True, "skip": False, "skipped": 0, "group": 2}
    pairs, summary = prepare_preferences(
        rows, dataclasses.replace(tokenizer, chat_template=GREEDY), **settings
    )
    assert [pair.origin for pair in pairs] == ["t.jsonl:1", "t.jsonl:2", "t.jsonl:4"]
    assert (summary.lost, summary.first_lost) == (2, "t.jsonl:3")
    assert "2 rows left out" in str(summary)
