"""Rows of preferences: their layouts, their tokens as TRL makes them, what is cut, and what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from jaxft.data import load_tokenizer
from jaxft.data.conversions import ALPACA
from jaxft.data.preference_rows import read_preferences
from jaxft.data.preferences import prepare_preferences
from jaxft.data.transcripts import split_messages, split_texts
from jaxft.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden"
PAIR = {"prompt": "a baker", "chosen": " sells bread", "rejected": " sells wool"}
JUDGED = {"prompt": "a baker", "completion": " sells bread", "label": True}


def say(role, content):
    return {"role": role, "content": content}


def read(path, *, judged=False, skip=False):
    return read_preferences(path, judged=judged, skip=skip)


def prepare(rows, tokenizer, **changes):
    settings = {"max_length": 64, "share": True, "skip": False, "skipped": 0, "group": 4}
    return prepare_preferences(rows, tokenizer, **settings | changes)


def parts(example):
    """Prompt, chosen and rejected tokens of an example that shares its prompt."""
    beginning = example.tokens[example.branches == 0].tolist()
    sides = [example.tokens[example.branches == side].tolist() for side in (1, 2)]
    marks = [example.trained[example.branches == side] for side in (1, 2)]
    held = int(np.argmax(marks[0]))  # the prompt's last token stands before each completion
    return beginning + sides[0][:held], sides[0][held:], sides[1][held:]


@pytest.mark.parametrize("kind", ["pairs", "boundary", "messages"])
def test_tokens_are_trls(kind, write):
    """Also where a completion's first letters merge with the prompt's last."""
    known = json.loads((GOLDEN / "preferences" / "tokens.json").read_text())[kind]
    tokenizer = load_tokenizer(GOLDEN / "trl" / "model")
    rows, _ = read(write(*(case["row"] for case in known)))
    examples, _ = prepare(rows, tokenizer, max_length=256)
    for example, case in zip(examples, known, strict=True):
        assert parts(example) == (case["prompt_ids"], case["chosen_ids"], case["rejected_ids"])


def test_strings_and_messages_may_stand_in_one_file(write):
    """Each row has the tokens that it has in a file of its own kind."""
    known = json.loads((GOLDEN / "preferences" / "tokens.json").read_text())
    tokenizer = load_tokenizer(GOLDEN / "trl" / "model")
    cases = [known[kind][0] for kind in ("pairs", "messages", "boundary")]
    rows, _ = read(write(*(case["row"] for case in cases)))
    examples, _ = prepare(rows, tokenizer, max_length=256)
    for example, case in zip(examples, cases, strict=True):
        assert parts(example) == (case["prompt_ids"], case["chosen_ids"], case["rejected_ids"])


def test_an_implicit_prompt_is_the_common_turns():
    """Of HH's texts and of messages: turns, not letters; what follows in one of them alone is completion."""
    start = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: a joke\n\nAssistant:"
    assert split_texts(start + " The one.", start + " The other.") == (
        start,
        " The one.",
        " The other.",
    )
    longer = start + " The one.\n\nHuman: ha\n\nAssistant: Ha."
    assert split_texts(longer, start + " No.")[0] == start
    asked, answer = say("user", "hi"), say("assistant", "yes?")
    assert split_messages([asked, answer], [asked, say("assistant", "no")])[0] == [asked]
    assert split_messages([asked, answer, asked, answer], [asked, answer])[0] == [asked]


def test_layouts(write):
    """Strings, messages, implicit prompts, UltraFeedback's two layouts and a compressed file give the same rows."""
    user, yes, no = say("user", "a baker"), say("assistant", "bread"), say("assistant", "wool")
    messages = {"prompt": [user], "chosen": [yes], "rejected": [no]}
    same = [
        messages,
        {"chosen": [user, yes], "rejected": [user, no]},
        {"prompt": "a baker", "chosen": [user, yes], "rejected": [user, no], "score_chosen": 9.0},
        {"prompt": "a baker", "chosen": [yes], "rejected": [no]},
    ]
    for number, row in enumerate(same):
        (found,), _ = read(write(row, name=f"{number}.jsonl"))
        assert found.values == messages
    answers = [("wool", 4.0), ("bread", 9.0), ("rope", 6.5)]
    rated = {
        "instruction": "a baker",
        "completions": [{"response": text, "overall_score": score} for text, score in answers],
    }
    (found,), _ = read(write(rated))
    assert found.values["prompt"] == ALPACA.format("", "a baker", "")
    assert (found.values["chosen"], found.values["rejected"]) == ("bread", "wool")
    (found,), _ = read_preferences(write(rated), judged=False, skip=False, as_messages=True)
    answers = {"chosen": [say("assistant", "bread")], "rejected": [say("assistant", "wool")]}
    assert found.values == {"prompt": [say("user", "a baker")], **answers}
    path = write(PAIR, name="pairs.jsonl")
    packed = path.with_suffix(".jsonl.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read(packed)[0][0].values == PAIR


def test_the_prompt_is_cut_from_its_left_and_counted(write, tokenizer):
    """Completions stay whole; a pair without room is dropped; both are said with the first place."""
    long = {
        "prompt": "first words " * 30 + "last words",
        "chosen": " yes",
        "rejected": " no, never",
    }
    huge = {"prompt": "a", "chosen": " yes" * 60, "rejected": " no"}
    path = write(PAIR, long, huge)
    rows, _ = read(path)
    examples, summary = prepare(rows, tokenizer, max_length=40)
    whole, _ = prepare(rows[1:2], tokenizer, max_length=1000)
    prompt, chosen, rejected = parts(examples[1])
    full, *completions = parts(whole[0])
    assert [chosen, rejected] == completions
    assert len(prompt) + max(len(chosen), len(rejected)) == 40
    assert full[-len(prompt) :] == prompt
    assert (summary.examples, summary.truncated, summary.dropped) == (2, 1, 1)
    assert f"the first at {path}:2" in str(summary)
    assert f"the first at {path}:3" in str(summary)
    _, skipping = prepare(rows, tokenizer, max_length=40, skip=True)
    assert (skipping.examples, skipping.skipped) == (1, 1)


def test_completions_are_exchanged_in_groups(write, tokenizer):
    """KTO: the one before in the group, in a circle; the label goes along."""
    texts = ["one", "two", "three", "four", "five"]
    rows, _ = read(
        write(*({"prompt": "say", "completion": f" {t}", "label": t != "two"} for t in texts)),
        judged=True,
    )
    examples, _ = prepare(rows, tokenizer, group=2)
    said = [parts(example)[1] for example in examples]
    assert [said.index(parts(example)[2]) for example in examples] == [1, 0, 3, 2, 4]
    assert [example.label for example in examples] == [1.0, 0.0, 1.0, 1.0, 1.0]


BAD = [
    ({**PAIR, "rejected": PAIR["chosen"]}, "chosen and rejected are equal", True),
    ({**PAIR, "chosen": ""}, "chosen is empty", True),
    ({**PAIR, "rejected": " \n"}, "rejected is empty", True),
    ({"chosen": [say("assistant", "a")], "rejected": [say("assistant", "b")]}, "no prompt in common", True),
    ({"prompt": "a", "completion": "b"}, "a row for SFT", False),
    ({"messages": [say("user", "a")]}, "a row for SFT", False),
    (JUDGED, "a row of KTO", False),
    ({"prompt": "a", "choosen": "b", "rejected": "c"}, "nearest: 'chosen'", False),
    ({**PAIR, "chosen": 3}, "all strings or all lists of messages", False),
    ({"prompt": "a", "chosen": [say("assistant", "b")], "rejected": "c"}, "all strings", False),
]  # fmt: skip


@pytest.mark.parametrize(("row", "says", "may_be_skipped"), BAD)
def test_bad_rows_are_told_with_file_and_line(row, says, may_be_skipped, write):
    """One line; those that are but useless may be left out, counted."""
    path = write(PAIR, row, {**PAIR, "prompt": "a weaver"})
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    if may_be_skipped:
        rows, skipped = read(path, skip=True)
        assert (len(rows), skipped) == (2, 1)


def test_bad_judgements(write):
    """A label that is none, labels of one kind, an empty completion, and pairs given to KTO."""
    for rows, says in (
        ([{**JUDGED, "label": "yes"}], ":1: label must be true or false, not 'yes'"),
        ([JUDGED, JUDGED], ":1: every label is true, in 2 rows"),
        ([JUDGED, {**JUDGED, "completion": "", "label": False}], ":2: completion is empty"),
        ([PAIR], ":1: a row of pairs"),
        ([{"prompt": "a", "completion": "b"}], ":1: a row for SFT"),
    ):
        path = write(*rows)
        with pytest.raises(UserError) as caught:
            read(path, judged=True)
        assert f"{path}{says}" in str(caught.value)


def test_all_rows_skipped_is_an_error(write):
    path = write({**PAIR, "rejected": PAIR["chosen"]})
    with pytest.raises(UserError, match=r"no usable rows: 1 was left out"):
        read(path, skip=True)
