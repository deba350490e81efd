"""What a careful colleague says of pairs and of judged completions, and how they look."""

from __future__ import annotations

import dataclasses

import pytest

from jaxft.data import Row
from jaxft.data.preference_report import marked_pair, pair_findings, side_lines, sides
from jaxft.data.preferences import prepare_preferences
from jaxft.data.report import Part, overlap


def rows_of(*values, judged=False):
    keys = ("prompt", "completion", "label") if judged else ("prompt", "chosen", "rejected")
    kind = "judged" if judged else "pair"
    made = (dict(zip(keys, each, strict=True)) for each in values)
    return [Row(f"p.jsonl:{n}", kind, value) for n, value in enumerate(made, start=1)]


def part_of(rows, tokenizer, **changes):
    settings = {"max_length": 64, "share": True, "skip": False, "skipped": 0, "group": 4}
    return Part("training data", rows, *prepare_preferences(rows, tokenizer, **settings | changes))


def said(rows, tokenizer, vocabulary=1000, weight=1.0, **changes):
    return pair_findings(part_of(rows, tokenizer, **changes), tokenizer, vocabulary, weight)


GOOD = (("a", " b", " c"), ("d", " e", " f"))
LONG = tuple((letter, " b and more", " c") for letter in "uvwxyz")


@pytest.mark.parametrize("share", [True, False])
def test_of_good_pairs_nothing_is_said(share, tokenizer):
    assert said(rows_of(*GOOD), tokenizer, share=share) == []


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ((*GOOD, GOOD[0]), "1 of 3 (33.3 %) examples are duplicates (first: p.jsonl:3 of p.jsonl:1): take"),
        (
            (*GOOD, ("a", " c", " b")),
            "1 of 3 (33.3 %) examples stand the other way round elsewhere: what is chosen there is "
            "rejected here (first: p.jsonl:3): keep the one that is meant",
        ),
        (LONG, "the chosen completion is the longer one in 6 of 6 (100 %)"),
        (((p, r, c) for p, c, r in LONG), "the rejected completion is the longer one in 6 of 6 (100 %)"),
        ((*GOOD, ("a" * 80, " b", " c")), "1 of 3 (33.3 %) prompts lose their beginning"),
        ((*GOOD, ("a", "b" * 80, "c" * 80)), "1 of 3 (33.3 %) rows are dropped"),
    ],
)  # fmt: skip
def test_what_is_said_of_pairs(values, says, tokenizer):
    assert [line.startswith(says) for line in said(rows_of(*values), tokenizer)] == [True]


def test_ids_that_the_model_lacks_and_rows_that_were_left_out(tokenizer):
    lines = said(rows_of(*GOOD), tokenizer, vocabulary=5, skip=True, skipped=3)
    assert lines[0] == "3 rows cannot be used and are left out (data.bad_rows=skip)"
    assert "at or above the model's vocabulary of 5" in lines[1]


def test_labels_out_of_balance_are_told_unless_they_are_weighed(tokenizer):
    """KTO wants desirable to undesirable between 1:1 and 4:3, as weighed."""
    rows = rows_of(*((f"{n}", " b", n > 0) for n in range(4)), judged=True)
    (line,) = said(rows, tokenizer)
    assert line.startswith("3 desirable and 1 undesirable, weighed 1 to 1")
    assert "objective.undesirable_weight=3 and 1" in line
    assert said(rows, tokenizer, weight=1 / 3) == []


@pytest.mark.parametrize("share", [True, False])
def test_a_pair_is_shown_with_its_prompt_once(share, tokenizer):
    part = part_of(rows_of(("a\x1bb", " c", " d e")), tokenizer, share=share)
    lines = marked_pair(part.examples[0], tokenizer, ("[[", "]]"), judged=False)
    assert lines == [
        "  prompt:", "    <s>a\\x1bb", "  chosen:", "    [[ c<|im_end|>]]", "  rejected:", "    [[ d e<|im_end|>]]",
    ]  # fmt: skip
    prompt, chosen, rejected = sides(part.examples[0])
    counts = [int(line.split()[1]) for line in side_lines(part)]
    assert counts == [len(prompt), len(chosen), len(rejected)]


def test_a_judged_completion_is_shown_with_its_label(tokenizer):
    rows = rows_of(("a", " b", True), ("c", " d", False), judged=True)
    part = part_of(rows, tokenizer)
    for example, name in zip(part.examples.pairs(), ("desirable", "undesirable"), strict=True):
        lines = marked_pair(example, tokenizer, ("[[", "]]"), judged=True)
        assert f"  {name}:" in lines
        place = lines.index("  of another prompt, for the KL:")
        assert "[[" not in lines[place + 1]
    assert [line.split()[0] for line in side_lines(part)] == ["prompts", "completions"]


def test_pairs_that_stand_in_both_parts_are_told(tokenizer):
    train, held = (part_of(rows_of(*values), tokenizer) for values in (GOOD, (GOOD[0],)))
    (line,) = overlap(train.examples, held.examples)
    assert line.startswith("1 of 1 (100 %) examples stand in the training data as well")
    other = part_of(rows_of(("a", " x", " y")), tokenizer)
    assert "have a prompt that the training data has" in overlap(train.examples, other.examples)[0]
    assert dataclasses.asdict(held.summary)["examples"] == 1
