"""Alpaca, ShareGPT and one's own keys, turned into what is tokenized."""

from __future__ import annotations

import pytest

from jaxft.data import read_rows
from jaxft.errors import UserError

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
ADD = {"type": "function", "function": {"name": "add"}}


def one(path, *arguments, **settings):
    (row,) = read_rows(path, *arguments, **settings)
    return row


def said(role, content):
    return {"role": role, "content": content}


def test_alpaca_is_a_chat_where_the_model_has_a_template(write):
    path = write({"instruction": "Add.", "input": "2, 3", "output": "5", "id": 1})
    row = one(path, as_messages=True)
    assert row.values == {
        "prompt": [said("user", "Add.\n\n2, 3")],
        "completion": [said("assistant", "5")],
    }
    assert (row.format, row.written, row.unused) == ("prompt_completion", "alpaca", ("id",))


@pytest.mark.parametrize("empty", [{}, {"input": ""}, {"input": None}])
def test_alpaca_is_stanfords_text_where_it_has_none(write, empty):
    row = one(write({"instruction": "Greet.", "output": "Hi.", **empty}))
    assert row.values["completion"] == "Hi."
    assert row.values["prompt"].endswith("request.\n\n### Instruction:\nGreet.\n\n### Response:\n")
    row = one(write({"instruction": "Add.", "input": "2, 3", "output": "5"}))
    assert "further context. Write" in row.values["prompt"]
    assert row.values["prompt"].endswith("\n\n### Input:\n2, 3\n\n### Response:\n")


def test_sharegpt_is_messages(write):
    turns = [
        {"from": "human", "value": "2 + 2?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "4."},
    ]
    row = one(
        write({"conversations": turns, "system": "Be brief.", "tools": '[{"type": "function"}]'})
    )
    assert row.values == {
        "messages": [
            said("system", "Be brief."),
            said("user", "2 + 2?"),
            {"role": "assistant", "tool_calls": [CALL]},
            said("tool", "4"),
            said("assistant", "4."),
        ],
        "tools": [{"type": "function"}],
    }
    assert (row.format, row.written) == ("messages", "sharegpt")


def test_turns_of_sharegpt_have_weights_and_text_parts(write):
    turns = [
        {"from": "human", "value": [{"type": "text", "text": "2 + 2?"}]},
        {
            "from": "function_call",
            "value": '{"name": "add", "arguments": {"a": 2}}',
            "train": False,
        },
        {"from": "gpt", "value": "4.", "weight": 0},
        {"role": "assistant", "content": "Four.", "masked": True},
    ]
    silent = {"weight": 0}
    assert one(write({"conversations": turns})).values["messages"] == [
        said("user", "2 + 2?"),
        {"role": "assistant", "tool_calls": [CALL]} | silent,
        said("assistant", "4.") | silent,
        said("assistant", "Four.") | silent,
    ]


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "question", "completion": "answer.text"},
        {"question": "prompt", "answer.text": "completion"},
    ],
)
def test_ones_own_keys_either_way_round(write, fields):
    row = one(write({"question": "Why?", "answer": {"text": "So."}, "id": 3}), fields=fields)
    assert row.values == {"prompt": "Why?", "completion": "So."}
    assert row.unused == ("id",)


def test_the_direction_of_the_keys_is_that_which_the_row_has(write):
    path = write({"instruction": "Why?", "output": "So."})
    for fields in (
        {"prompt": "instruction", "completion": "output"},
        {"instruction": "prompt", "output": "completion"},
    ):
        assert one(path, fields=fields).values == {"prompt": "Why?", "completion": "So."}


def test_keys_that_are_called_so_already_need_no_name(write):
    path = write({"prompt": "Why?", "answer": "So.", "text": "a"})
    for fields in ({"completion": "answer"}, {"answer": "completion"}):
        row = one(path, fields=fields)  # which also says that no `text` is meant
        assert (row.format, row.values) == (
            "prompt_completion",
            {"prompt": "Why?", "completion": "So."},
        )


def test_what_stands_beside_a_text_in_an_object_is_not_lost(write):
    path = write(
        {"prompt": {"text": "Why?", "id": 3}, "answer": {"text": "So.", "context": "Here."}}
    )
    fields = {"prompt": "prompt.text", "completion": "answer.text"}
    row = one(path, fields=fields)
    assert row.values == {"prompt": "Why?", "completion": "So."}
    assert (row.unused, row.unread) == (("prompt.id", "answer.context"), ("answer.context",))
    assert one(path, fields=fields, ignore=("answer.context",), strict=True).unread == ()


def test_a_name_that_is_taken_is_refused_unless_its_key_is_left_out(write):
    path = write({"prompt": "no", "question": "Why?", "completion": "So."})
    with pytest.raises(UserError, match=r":1: .*--config\.data\.ignore=prompt$"):
        one(path, fields={"prompt": "question"})
    row = one(path, fields={"prompt": "question"}, ignore=("prompt",))
    assert row.values["prompt"] == "Why?"


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_what_the_system_says_stands_before_the_conversation(write, key):
    """Of every format that is a chat, once."""
    talk = [said("user", "a"), said("assistant", "b")]
    rows = [
        {"messages": talk},
        {"messages": [SYSTEM, *talk]},
        {"prompt": talk[:1], "completion": talk[1:]},
        {"prompt": "a", "completion": "b"},
        {"instruction": "a", "output": "b"},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    ]
    for row in rows:
        values = one(write({key: "Be brief.", **row}), as_messages=True, strict=True).values
        whole = values.get("messages") or [*values["prompt"], *values["completion"]]
        assert whole == [SYSTEM, *talk]


def test_two_systems_are_refused(write):
    row = {"system": "Be long.", "messages": [SYSTEM, said("user", "a")]}
    with pytest.raises(UserError, match=r":1: system says otherwise .*ignore=system"):
        one(write(row))


def test_alpacas_history(write):
    """Turns of a chat, which a text has no place for."""
    row = {"instruction": "c", "output": "d", "history": [["a", "b"]]}
    talk = [said("user", "a"), said("assistant", "b"), said("user", "c")]
    assert one(write(row), as_messages=True).values["prompt"] == talk
    with pytest.raises(UserError, match=r":1: history .*chat_template"):
        one(write(row))


def test_tools_and_calls_are_kept_and_no_tools_are_none(write):
    talk = [said("user", "a"), {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    assert one(write({"messages": talk, "functions": [ADD["function"]]})).values["tools"] == [ADD]
    assert one(write({"messages": talk, "tools": [ADD]})).values == {
        "messages": talk,
        "tools": [ADD],
    }
    for nothing in ([], None):
        assert "tools" not in one(write({"messages": talk, "tools": nothing})).values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"instruction": "a", "output": 3}, "output must be a string, not a number"),
        ({"instruction": "a", "input": [], "output": "b"}, "input must be a string, not a list"),
        ({"instruction": "a", "output": "b", "text": "c"}, r"several formats \(text, alpaca\)"),
        ({"conversations": "a"}, "conversations must be a list of turns, not a string"),
        ({"conversations": []}, "not an empty list"),
        ({"conversations": [3]}, "turn 1 must be an object, not a number"),
        (
            {"conversations": [{"from": "human", "valeu": "a"}]},
            r"turn 1 has no 'value' \(nearest: 'valeu'",
        ),
        (
            {"conversations": [{"from": "humn", "value": "a"}]},
            "unknown speaker 'humn'; .*nearest: 'human'",
        ),
        (
            {"conversations": [{"from": "gpt", "value": None}]},
            "turn 1: value must be a string, not null",
        ),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, "turn 1: value: not JSON"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "needs name and arguments"),
        ({"conversations": [said("user", 3)]}, "message 1: content must be a string, not a number"),
        (
            {"messages": [said("user", "a")], "tools": "a"},
            "tools must be a list of objects, not a string",
        ),
        (
            {"messages": [said("user", "a")], "tools": [3]},
            "tools must be a list of objects, not a number",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": "a"}]},
            "message 1: tool_calls must be a list of the assistant's calls, not a string",
        ),
        (
            {"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}]},
            "and not the user's",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{}]}]},
            "an object that names a function",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "a", "arguments": 3}]}]},
            "arguments must be an object, not a number",
        ),
    ],
)
def test_a_faulty_row_is_told_with_its_field(write, values, message):
    path = write(values)
    with pytest.raises(UserError, match=message) as error:
        one(path)
    assert str(error.value).startswith(f"{path}:1: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"promt": "q", "completion": "a"}, r"conversations \(nearest: 'prompt'\)$"),
        ({"promt": "question"}, r"config.data.fields .*the formats' keys are .*nearest: 'prompt'"),
        (
            {"prompt": "question"},
            "keys found: .*; name them: --config.data.fields.completion=answer",
        ),
        (
            {"prompt": "qestion", "completion": "answer"},
            r":1: no key 'qestion', .*\(nearest: 'question'",
        ),
    ],
)
def test_fields_that_make_no_format_are_refused(write, fields, message):
    with pytest.raises(UserError, match=message):
        one(write({"question": "a", "answer": "b"}), fields=fields)
