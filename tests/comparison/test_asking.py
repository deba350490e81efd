"""How levers ask: examples before a question, as text and as turns, as many as there is room for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jaxft.assets import tiny_folder
from jaxft.comparison.asking import plainly, with_examples
from jaxft.comparison.given import check_enough, without_overlap
from jaxft.comparison.levers import LEVERS, NEEDS, chosen_levers
from jaxft.configuration import load_config
from jaxft.data.tokenizer import Tokenizer, load_tokenizer
from jaxft.errors import UserError
from jaxft.evaluation.asking import as_chats
from jaxft.evaluation.reading import read_items

RECIPE = str(Path(__file__).parents[2] / "configs" / "compare.py")
CONFIG = load_config(RECIPE)
ROWS = [{"prompt": f"How many is {n}?", "completion": f" It is {n}."} for n in range(30)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(tiny_folder())


def given(tokenizer: Tokenizer, chat: bool = False, rows: Any = ROWS) -> Any:
    items = as_chats(read_items(rows), chat, "Be brief." if chat else "")
    return SimpleNamespace(train=items, config=CONFIG, tokenizer=tokenizer)


def test_examples_stand_before_a_text(tokenizer: Tokenizer) -> None:
    """Each with its answer, a blank line between; an answer ends where the model would go on with another."""
    way = with_examples(given(tokenizer), {"examples": 2}, 1)
    assert way.before is not None
    [asked] = way.before({"row 1": "How many is 99?"}, 500)
    first, second, last = asked.prompt.split("\n\n")
    assert last == "How many is 99?"
    assert {first, second} <= {row["prompt"] + row["completion"] for row in ROWS}
    assert way.stop == "\n\n"


def test_examples_stand_as_turns_before_a_message(tokenizer: Tokenizer) -> None:
    """Behind what the system says, once."""
    way = with_examples(given(tokenizer, chat=True), {"examples": 2}, 1)
    question = [{"role": "system", "content": "S"}, {"role": "user", "content": "How many is 99?"}]
    [asked] = way.before({"row 1": question}, 500)  # type: ignore[misc]
    assert [turn["role"] for turn in asked.prompt] == [
        "system", "user", "assistant", "user", "assistant", "user",
    ]  # fmt: skip
    assert asked.prompt[0]["content"] == "S"
    assert asked.prompt[-1] == question[-1]


def test_there_are_as_many_examples_as_there_is_room_for(tokenizer: Tokenizer) -> None:
    """Down to none."""
    way = with_examples(given(tokenizer), {"examples": 8}, 1)
    lengths = []
    for room in (500, 60, 10):
        [asked] = way.before({"row 1": "How many is 99?"}, room)  # type: ignore[misc]
        lengths.append(len(asked.prompt.split("\n\n")))
        assert room == 10 or len(tokenizer.encode(asked.prompt)) <= room
    assert lengths[0] == 9
    assert 1 < lengths[1] < 9
    assert lengths[2] == 1


def test_seeds_draw_other_examples(tokenizer: Tokenizer) -> None:
    ways = [with_examples(given(tokenizer), {"examples": 3}, seed) for seed in (1, 1, 2)]
    one, same, other = (way.before({"row 1": "?"}, 500)[0].prompt for way in ways)  # type: ignore[misc]
    assert one == same != other


def test_blank_lines_in_an_example_are_not_its_end(tokenizer: Tokenizer) -> None:
    rows = [{"prompt": f"Poem {n}:", "completion": " A line.\n\nAnother."} for n in range(30)]
    assert "---" in with_examples(given(tokenizer, rows=rows), {"examples": 2}, 1).stop
    assert plainly(given(tokenizer), {}, 0).stop == ""


def test_every_lever_needs_what_can_be_given_and_says_what_it_lacks() -> None:
    """With all that can be given every lever is measured; with nothing, the plain prompt alone."""
    everything, left = chosen_levers(CONFIG, dict.fromkeys(NEEDS, True))
    assert [lever.name for lever in everything] == list(LEVERS)
    assert not left
    nothing, left = chosen_levers(CONFIG, dict.fromkeys(NEEDS, False))
    assert [lever.name for lever in nothing] == ["prompt"]
    assert left["dpo"] == NEEDS["pairs"]
    assert left["retrieval"] == NEEDS["documents"]
    assert left["raft"] == f"{NEEDS['answers']}; {NEEDS['documents']}"


def test_test_questions_that_stand_in_training_are_left_out() -> None:
    """Whatever their case and spaces; of what is left there must be enough."""
    learned = read_items(ROWS)
    tested = read_items(
        [
            {"prompt": "how many  is 3?", "completion": " it is 3"},
            {"prompt": "What?", "completion": "x"},
        ]
    )
    kept, gone = without_overlap(tested, learned)
    assert ([item.prompt for item in kept], gone) == (["What?"], ["row 1"])
    with pytest.raises(UserError, match=r"1 question .and 1 that stand"):
        check_enough(CONFIG, learned, tested, kept)
