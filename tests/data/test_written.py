"""What of a conversation a text does not hold: found where it is missing, and no false alarm where it is not."""

from __future__ import annotations

import json

import pytest

from jaxft.data.messages import Parts
from jaxft.data.written import missing

CALL = {
    "function": {
        "name": "look_up",
        "arguments": {"city": 'Rome "é"', "days": 3, "deep": {"all": [True, None, 1.5]}},
    }
}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Where?\n"},
    {"role": "assistant", "content": "<think>\nIt is there.\n</think>\n\nThere."},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "In a\n  house", "reasoning_content": "Which one?"},
]


def lost(messages, text, tools=None):
    return [(part.index, part.what, part.text) for part in missing(messages, text, tools)]


def as_chatml(messages):
    return "".join(
        f"<{m['role']}>{m.get('reasoning_content', '')}|{m['content']}</>" for m in messages
    )


def test_a_text_that_holds_everything_misses_nothing():
    assert lost(TALK, as_chatml(TALK)) == []


@pytest.mark.parametrize(
    "text",
    [
        "Be brief.\n\nWhere?It is there.[/]There. a Which one? In a\n  house",  # trimmed, marks of its own
        "Be brief. Where? <think> It is there. </think> There. a Which one? In a house",  # white space
        json.dumps(["Be brief.", " Where?\n", "It is there.", "There.", "a", "Which one?", "In a\n  house"]),
        "Where? <think>\nIt is there.\n</think>\n\nThere. Be brief. a In a\n  house Which one?",  # moved
        "Where? It is there. There. Be brief. a Which one? In a\\n  house",
        repr(" Where?\nIt is there. There. Be brief. a Which one? In a\n  house"),
    ],
)  # fmt: skip
def test_other_spellings_are_no_loss(text):
    assert lost(TALK, text) == []


def test_what_stands_before_the_mark_of_thinkings_end_is_reasoning():
    text = as_chatml(TALK).replace("<think>\nIt is there.\n</think>\n\n", "")
    assert lost(TALK, text) == [(2, "reasoning", "It is there.")]


def test_each_kind_of_loss_is_named():
    assert lost(TALK, as_chatml(TALK).replace("Which one?", "")) == [(4, "reasoning", "Which one?")]
    assert lost(TALK, as_chatml(TALK[1:])) == [(0, "content", "Be brief.")]
    assert lost(TALK, as_chatml(TALK[:-1])) == [
        (4, "content", "In a\n  house"),
        (4, "reasoning", "Which one?"),
    ]


def test_a_turn_that_only_stands_before_its_place_is_missing():
    talk = [
        {"role": "user", "content": "Yes?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    assert lost(talk, "Yes? Yes. Sure?") == [(3, "content", "Yes.")]
    assert lost(talk, "Yes? Yes. Sure? Yes.") == []


def test_empty_contents_are_never_missing():
    assert lost([{"role": "assistant", "content": " "}, {"role": "assistant"}], "") == []


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(CALL, ensure_ascii=False),
        json.dumps(CALL, indent=2),
        str(CALL),
        "look_up(city='Rome \"é\"', days=3, deep=(all=[true, null, 1.5]))",
        "<name>look_up</name><city>Rome \"é\"</city><days>3</days><deep>all: True, None, 1.5</deep>",
    ],
)  # fmt: skip
def test_a_call_may_be_written_in_any_form(text):
    call = {"role": "assistant", "tool_calls": [CALL]}
    assert lost([call], text) == []
    text_of = {
        "function": CALL["function"] | {"arguments": json.dumps(CALL["function"]["arguments"])}
    }
    assert lost([call | {"tool_calls": [text_of]}], text) == []


def test_a_call_whose_name_or_value_is_missing_is_found():
    call = {"role": "assistant", "content": "Wait.", "tool_calls": [CALL]}
    assert lost([call], "Wait.") == [(0, "tool_calls", "look_up")]
    cut = "Wait. " + json.dumps(CALL).replace("3", "")
    assert lost([call], cut) == [(0, "tool_calls", "look_up: 3")]


def test_tools_are_looked_for_by_their_names():
    tools = [{"type": "function", "function": {"name": "look_up"}}, {"name": "count"}]
    assert lost([], "look_up, count", tools) == []
    assert lost([], "look_up", tools) == [(-1, "tools", "count")]


def test_parts_of_a_content_may_be_written_apart():
    said = [{"role": "user", "content": Parts.of(["One. ", "Two."])}]
    assert lost(said, "One.<|sep|>Two.") == []
    assert lost(said, "One.") == [(0, "content", "Two.")]


def test_whether_all_of_a_content_is_missing_is_known():
    said = [{"role": "assistant", "content": Parts.of(["One. ", "Two."])}]
    assert [part.whole for part in missing(said, "One.")] == [False]
    assert [part.whole for part in missing(said, "")] == [True]
