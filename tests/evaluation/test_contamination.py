"""Held-out items that stand in the training data."""

from __future__ import annotations

import json

from jaxft.evaluation.contamination import Found, found_in_training
from jaxft.evaluation.reading import read_items

LONG = "one two three four five six seven eight nine ten eleven twelve"


def found(tmp_path, items, training):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in training))
    seen = found_in_training(read_items(items), str(path))
    return [(one.origin, one.kind, one.training.rsplit(":", 1)[1]) for one in seen]


def test_an_item_is_found_whatever_its_case_punctuation_and_format(tmp_path):
    items = [{"prompt": "Where is it?", "completion": " In Paris."}]
    training = [
        {"prompt": "Where is it?", "completion": "In Rome."},
        {"prompt": "where is  it", "completion": "in Paris!"},
    ]
    assert found(tmp_path, items, training) == [("row 1", "exact", "2")]
    talk = [{"messages": [
        {"role": "system", "content": "Answer."},
        {"role": "user", "content": "Where is it?"},
        {"role": "assistant", "content": "In Paris."},
    ]}]  # fmt: skip
    assert found(tmp_path, items, talk) == [("row 1", "exact", "1")]


def test_thirteen_words_in_a_row_are_no_chance_and_twelve_may_be(tmp_path):
    items = [{"prompt": "Go on:", "completion": f"{LONG} thirteen fourteen"}]
    twelve = [{"prompt": "Count!", "completion": f"{LONG} and so on"}]
    assert found(tmp_path, items, twelve) == []
    thirteen = [*twelve, {"prompt": "Count!", "completion": f"{LONG} thirteen and so on"}]
    assert found(tmp_path, items, thirteen) == [("row 1", "13 words in a row", "2")]


def test_any_of_an_items_rows_counts_and_the_first_place_is_named(tmp_path):
    items = [
        {"prompt": "Where?", "completion": "Here."},
        {"prompt": "Where?", "completion": "There."},
    ]
    training = [{"prompt": "Where?", "completion": "There."}] * 2
    assert found(tmp_path, items, training) == [("row 1", "exact", "1")]
    assert found_in_training(read_items(items[:1]), str(tmp_path / "train.jsonl")) == list[Found]()
