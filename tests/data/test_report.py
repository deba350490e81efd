"""What a careful colleague says of data, and nothing where all is well."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jaxft.data import Example, Examples, Row, prepare_examples, report
from jaxft.data.defects import has_empty_completion
from jaxft.data.report import Part, findings, overlap, tokens_by_source


def rows_of(*values, format="prompt_completion", source="train.jsonl", unused=()):
    return [Row(f"{source}:{i}", format, v, unused) for i, v in enumerate(values, start=1)]


def pair(prompt, completion):
    return {"prompt": prompt, "completion": completion}


def part_of(rows, tokenizer, max_length=64, **arguments):
    arguments = {"max_length": max_length, "loss_on": "completion"} | arguments
    return Part("training data", rows, *prepare_examples(rows, tokenizer, **arguments))


def said(rows, tokenizer, vocabulary=1000, **arguments):
    return findings(part_of(rows, tokenizer, **arguments), tokenizer, vocabulary)


EMPTY = "take them out, unless the model is to answer with nothing"
GOOD = (pair("a", " b"), pair("c", " d"))


def test_of_good_data_nothing_is_said(tokenizer):
    assert said(rows_of(*GOOD), tokenizer) == []


@pytest.mark.parametrize(
    ("values", "lines"),
    [
        (
            (pair("e", ""),),
            [f"1 of 3 (33.3 %) rows have an empty completion (first: t:3): {EMPTY}"],
        ),
        (
            (pair("e", " \n"),),
            [f"1 of 3 (33.3 %) rows have an empty completion (first: t:3): {EMPTY}"],
        ),
        (
            (pair("a", " b"), pair("c", " d"), pair("a", " d")),
            [
                "2 of 5 (40 %) examples are duplicates (first: t:3 of t:1): take the further ones out, unless they are "
                "meant to weigh more"
            ],
        ),
        (
            (pair("the riv", "er"),),
            [
                "1 of 3 (33.3 %) prompts have other tokens alone than before their completion (first: t:3): a space "
                "at the prompt's end belongs at the completion's beginning"
            ],
        ),
    ],
    ids=["empty", "blank", "duplicates", "merging"],
)
def test_each_defect_is_told_with_its_place(tokenizer, values, lines):
    assert said(rows_of(*GOOD, *values, source="t"), tokenizer) == lines


def test_what_max_length_costs_is_told(tokenizer):
    rows = rows_of(*GOOD, pair("a", " b c d e f g h i"), pair("a b c d e f g h i j", " k"))
    lines = said(rows, tokenizer, max_length=8)
    assert "2 of 4 (50 %) rows are longer than max_length 8 and lose their end" in lines[0]
    assert "first: train.jsonl:3): a larger data.max_length keeps more of them" in lines[0]
    assert (
        "1 of 4 (25 %) rows are dropped: they have no trained token (first: train.jsonl:4): a larger"
        in lines[1]
    )
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("said_as", "remedy"),
    [
        ("{{ m.content }}", "let the chat template write <|im_end|> after each answer"),
        ("{{ m.content }}", "take config.data.chat_template=chatml"),
        ("{{ m.content + '<pad>' }}", "an answer ends with <pad>: name that as eos_token in tokenizer_config.json"),
        (
            "{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>' }}",
            "writes <|im_end|> outside of {% generation %}: it belongs inside",
        ),
    ],
)  # fmt: skip
def test_data_that_never_ends_is_told_and_how_to_end_it(tokenizer, said_as, remedy):
    template = "{% for m in messages %}{{ m.role + ':' }}" + said_as + "{% endfor %}"
    endless = dataclasses.replace(
        tokenizer,
        chat_template=template + "{% if add_generation_prompt %}assistant:{% endif %}",
    )
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (line,) = said(rows_of({"messages": talk}, format="messages"), endless)
    assert line.startswith("1 of 1 (100 %) examples train no EOS")
    assert "(first: train.jsonl:1): " in line
    assert remedy in line


def test_many_examples_are_looked_at_in_blocks(tokenizer, monkeypatch):
    rows = rows_of(
        *(pair(f"{n}", f" {n % 7}") for n in range(40)), pair("1", " 1"), pair("<s><s>a", " b")
    )
    whole = said(rows, tokenizer, vocabulary=60)
    assert [line.split("examples ")[1].split(" ")[0] for line in whole] == ["begin", "have", "are"]
    for block in (1, 7, 64):
        monkeypatch.setattr(report, "BLOCK", block)
        assert said(rows, tokenizer, vocabulary=60) == whole


def test_ids_that_the_model_lacks_are_told(tokenizer):
    rows = rows_of(*GOOD)
    largest = int(part_of(rows, tokenizer).examples.tokens.max())
    (line,) = said(rows, tokenizer, vocabulary=largest)
    assert f"at or above the model's vocabulary of {largest} (the largest is {largest})" in line
    assert said(rows, tokenizer, vocabulary=largest + 1) == []


def test_a_second_bos_and_unused_keys_are_told(tokenizer):
    rows = rows_of(pair("<s><s>a", " b"), unused=("id", "note"))
    doubled, unused = said(rows, tokenizer)
    assert "begin with two BOS (first: train.jsonl:1)" in doubled
    assert unused == "keys of the rows that are not used: id, note"


def turns(*pairs, **extra):
    return {"messages": [{"role": role, "content": text, **extra} for role, text in pairs]}


@pytest.mark.parametrize(
    ("format", "values", "empty"),
    [
        ("messages", turns(("user", "a"), ("assistant", "")), True),
        ("messages", turns(("assistant", " "), ("user", "a"), ("assistant", "b")), True),
        ("messages", turns(("user", ""), ("assistant", "b")), False),
        ("messages", turns(("assistant", ""), tool_calls=[{}]), False),
        ("messages", turns(("assistant", ""), weight=0), False),
        ("prompt_completion", pair([], turns(("assistant", ""))["messages"]), True),
        ("text", {"text": " "}, True),
        ("text", {"text": "a"}, False),
    ],
)
def test_an_empty_turn_is_an_empty_completion(format, values, empty):
    assert has_empty_completion(Row("t:1", format, values)) == empty


def test_held_out_examples_and_prompts_that_are_trained_on_are_told(tokenizer):
    train = part_of(rows_of(pair("a b c", " d"), pair("e f g", " h")), tokenizer).examples
    values = (pair("x y z", " d"), pair("e f g", " h"), pair("a b c", " other"))
    held_out = part_of(rows_of(*values, source="eval.jsonl"), tokenizer).examples
    assert overlap(train, held_out) == [
        "1 of 3 (33.3 %) examples stand in the training data as well (first: eval.jsonl:2): take them out of one of "
        "the two, or what is held out tells what was memorised",
        "1 of 3 (33.3 %) examples have a prompt that the training data has with another completion "
        "(first: eval.jsonl:3): take them out of one of the two, unless both answers are wanted",
    ]
    assert overlap(train, held_out.of(held_out[:1])) == []


def test_texts_have_no_prompt_in_common(tokenizer):
    """They all begin with BOS, which says nothing."""
    texts = [rows_of({"text": text}, format="text") for text in ("a b", "a c")]
    train, held_out = (part_of(rows, tokenizer).examples for rows in texts)
    assert overlap(train, held_out) == []


def test_tokens_are_counted_by_source():
    def example(length, trained, origin):
        return Example(np.zeros(length, np.int32), np.arange(length) >= length - trained, origin)

    stored = Examples.of([example(3, 1, "a:1"), example(5, 2, "b:1"), example(2, 1, "a:2")])
    assert tokens_by_source(stored) == [("a", 2, 5, 2), ("b", 1, 5, 2)]
