"""Messages as people write them: parts of text, weights under many names, calls and tools as JSON text."""

from __future__ import annotations

import json

import pytest

from jaxft.data.messages import Parts, is_silent, read_message, read_tools
from jaxft.errors import UserError

CALL = {"type": "function", "id": "c1", "function": {"name": "ask", "arguments": {"city": "Rome"}}}


def said(content="a", role="assistant", **more):
    return {"role": role, "content": content, **more}


def calling(arguments, **more):
    return {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "ask", "arguments": arguments}, **more}],
    }


def arguments_of(message):
    return message["tool_calls"][0]["function"]["arguments"]


@pytest.mark.parametrize(
    "message", [said(), said(name="Ann", reasoning_content="b"), said(None, tool_calls=[CALL])]
)
def test_a_message_that_templates_know_stays_as_it_is(message):
    assert read_message("a:1", message) == message
    assert read_message("a:1", read_message("a:1", message)) == message


def test_a_content_of_text_parts_is_their_text():
    """OpenAI's parts, those of its Responses, and those that a table fills up with nulls."""
    parts = [
        {"type": "text", "text": "One, "},
        {"type": "input_text", "text": "two, "},
        {"type": "output_text", "text": "three", "image_url": None},
        "!",
    ]
    read = read_message("a:1", said(parts, role="user"))
    assert read == said("One, two, three!", role="user")
    assert read["content"].parts == ("One, ", "two, ", "three", "!")
    assert read_message("a:1", read)["content"].parts == read["content"].parts


def test_one_part_is_a_plain_text():
    content = read_message("a:1", said([{"type": "text", "text": "One"}]))["content"]
    assert content == "One"
    assert not isinstance(content, Parts)


def test_thoughts_among_the_parts_are_reasoning():
    """As Mistral and Anthropic write them."""
    for thought in ("Hm.", [{"type": "text", "text": "Hm."}]):
        parts = [{"type": "thinking", "thinking": thought}, {"type": "text", "text": "Yes."}]
        assert read_message("a:1", said(parts)) == said("Yes.", reasoning_content="Hm.")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            {"type": "image_url", "image_url": {"url": "x"}},
            r"part 2 is of type 'image_url', and only text",
        ),
        ({"type": "input_audio", "input_audio": {}}, "'input_audio'"),
        ({"type": "tool_use", "name": "ask", "input": {}}, "'tool_use'"),
        ({"type": "refusal", "refusal": "No."}, "'refusal'"),
        ({"image": "x.png"}, "part 2 has no type"),
        ({"type": "text", "text": None}, "of type 'text' must hold a text"),
        ({"type": "text"}, "of type 'text' must hold a text"),
        (3, "part 2 must be an object, not a number"),
    ],
)
def test_other_parts_are_named(part, message):
    with pytest.raises(UserError, match=message) as error:
        read_message("a:1: messages, message 4", said([{"type": "text", "text": "a"}, part]))
    assert str(error.value).startswith("a:1: messages, message 4: content, part 2")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "weight",
    [
        {"weight": 0}, {"weight": 0.0}, {"weight": "0"}, {"train": False}, {"masked": True}, {"loss": False},
        {"trainable": False}, {"training": False}, {"loss_weight": 0}, {"loss_mask": 0}, {"train": "False"},
        {"weight": 0, "train": False, "masked": True}, {"weight": None, "train": False},
        {"weight": float("nan"), "train": False},
    ],
)  # fmt: skip
def test_a_message_may_say_that_it_is_not_to_be_trained(weight):
    """OpenAI, Mistral, torchtune, Axolotl, ms-swift: each has a name for it."""
    assert read_message("a:1", said(**weight)) == said(weight=0)
    assert is_silent(read_message("a:1", said(**weight)))


@pytest.mark.parametrize(
    "weight", [{"weight": 1}, {"train": True}, {"masked": False}, {"weight": 1.0, "loss": True}]
)
def test_a_message_that_says_that_it_is_trained_is_as_others(weight):
    assert read_message("a:1", said(**weight)) == said()


def test_another_role_that_is_to_be_trained_keeps_saying_so():
    assert read_message("a:1", said(role="user", train=True)) == said(role="user", weight=1)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (
            {"weight": 0.5},
            "weight must be 0 or 1, or false or true, not 0.5: a message is trained, or it is not",
        ),
        ({"weight": 2}, "weight must be 0 or 1, or false or true, not 2"),
        ({"train": "assistant"}, "train must be 0 or 1"),
        ({"weight": 1, "train": False}, "weight: 1 trains the message, and train: False does not"),
        (
            {"weight": 0, "masked": False},
            "masked: False trains the message, and weight: 0 does not",
        ),
        ({"mask": True}, "mask can be meant either way; write weight: 0"),
        ({"train_detail": [{"begin_offset": 0}]}, "train_detail .* cannot be read"),
    ],
)
def test_a_weight_that_cannot_be_honoured_is_refused(weight, message):
    with pytest.raises(UserError, match=rf"^a:1: {message}") as error:
        read_message("a:1", said(**weight))
    assert "\n" not in str(error.value)


def test_arguments_that_are_json_text_stay_as_they_stand():
    assert arguments_of(read_message("a:1", calling('{"city":"Rome"}'))) == '{"city":"Rome"}'


@pytest.mark.parametrize("nothing", ["", " ", "null", None, {}])
def test_arguments_of_a_call_without_any_are_an_empty_object(nothing):
    assert arguments_of(read_message("a:1", calling(nothing))) == {}


def test_arguments_may_be_encoded_twice_and_have_other_names():
    assert arguments_of(read_message("a:1", calling('"{\\"city\\": \\"Rome\\"}"'))) == {
        "city": "Rome"
    }
    call = {"name": "ask", "parameters": {"city": "Rome"}}
    (read,) = read_message("a:1", {"role": "assistant", "tool_calls": [call]})["tool_calls"]
    assert read == {"name": "ask", "arguments": {"city": "Rome"}}


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        (calling('{"city": Rome}')["tool_calls"], "a tool call's arguments: not JSON: .*column 10"),
        (calling("[1]")["tool_calls"], "arguments must be an object, not a list"),
        (calling('"Rome"')["tool_calls"], "arguments: not JSON"),
        (calling(3)["tool_calls"], "arguments must be an object, not a number"),
        ("[{", "tool_calls: not JSON"),
        ("ask", "tool_calls must be a list of the assistant's calls, not a string"),
        ([{"function": {"arguments": {}}}], "must be an object that names a function"),
        (["ask"], "must be an object that names a function"),
    ],
)
def test_calls_that_cannot_be_read_are_told(calls, message):
    with pytest.raises(UserError, match=message) as error:
        read_message("a:1", {"role": "assistant", "content": "", "tool_calls": calls})
    assert str(error.value).startswith("a:1: ")


def test_calls_may_be_json_text_one_object_or_of_openais_older_form():
    wanted = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    text = '[{"type": "function", "id": "c1", "function": {"name": "ask", "arguments": {"city": "Rome"}}}]'
    for calls in (text, text[1:-1], [text[1:-1]], CALL):
        assert read_message("a:1", wanted | {"tool_calls": calls}) == wanted
    old = {"role": "assistant", "content": None, "function_call": CALL["function"]}
    assert read_message("a:1", old)["tool_calls"] == [
        {"type": "function", "function": CALL["function"]}
    ]
    assert read_message("a:1", said(role="function", name="ask")) == said(role="tool", name="ask")


TOOL = {"type": "function", "function": {"name": "ask", "parameters": {"type": "object"}}}
TOOL_TEXT = '{"type": "function", "function": {"name": "ask", "parameters": {"type": "object"}}}'


@pytest.mark.parametrize(
    "tools",
    [
        [TOOL],
        TOOL,
        TOOL_TEXT,
        f"[{TOOL_TEXT}]",
        [TOOL_TEXT],
        [{"type": "function", "function": {"name": "ask", "parameters": '{"type": "object"}'}}],
    ],
)
def test_tools_may_be_json_text_in_any_place(tools):
    assert read_tools("a:1", tools) == [TOOL]


def test_functions_are_openais_older_form_of_tools():
    function = TOOL["function"]
    for functions in ([function], json.dumps([function])):
        assert read_tools("a:1", None, functions) == [TOOL]
    assert read_tools("a:1", [TOOL], [function | {"name": "other"}]) == [TOOL]


@pytest.mark.parametrize("nothing", [None, [], "", "[]"])
def test_no_tools_are_none(nothing):
    assert read_tools("a:1", nothing) == []


@pytest.mark.parametrize("tools", [3, "ask", ["ask"], [3]])
def test_tools_that_are_none_are_refused(tools):
    with pytest.raises(UserError, match=r"^a:1: tools must be a list of objects, not a"):
        read_tools("a:1", tools)
