"""The text of an answer is that of its tokens, however it comes, and ends before the first stop."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.assets import model_folder
from jaxft.data.tokenizer import load_tokenizer
from jaxft.inference.serving.text import Text

tokenizer = load_tokenizer(model_folder("tiny"))


def parts(ids, stops=()):
    text = Text(tokenizer, stops)
    return [*(text.add(number) for number in ids), text.rest()], text


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30))
def test_parts_put_together_are_the_text(words):
    ids = tokenizer.encode(words + "ä 漢 😀", add_special_tokens=False)
    assert "".join(parts(ids)[0]) == tokenizer.decode(ids)


def test_no_part_shows_half_of_a_character():
    told, _ = parts(tokenizer.encode("a 漢字 😀 b", add_special_tokens=False))
    assert not any("�" in part for part in told)
    assert len([part for part in told if part]) > 3


@settings(max_examples=60, deadline=None)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_an_answer_ends_before_the_first_stop(words, stops):
    ids = tokenizer.encode(words, add_special_tokens=False)
    whole = tokenizer.decode(ids)
    found = [start for stop in stops if (start := whole.find(stop)) >= 0]
    told, text = parts(ids, stops)
    said = "".join(told)
    if not found:
        assert said == whole
    else:  # as soon as one of them is whole: another may begin earlier, and end later
        assert text.stopped
        assert any(whole.startswith(said + stop) for stop in stops)
        assert not any(stop in said for stop in stops)


def test_what_may_begin_a_stop_is_held_back():
    text = Text(tokenizer, ("### end",))
    said = "".join(
        text.add(number) for number in tokenizer.encode("yes ### en", add_special_tokens=False)
    )
    assert said == "yes "
    assert text.rest() == "### en"


@pytest.mark.parametrize("stop", ["a b", "b"])
def test_nothing_is_told_after_a_stop(stop):
    told, text = parts(tokenizer.encode("x a b c d", add_special_tokens=False), [stop])
    assert text.stopped
    assert "".join(told) == "x a b"[: "x a b".index(stop)]
