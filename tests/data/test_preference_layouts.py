"""Layouts that people have of preferences: each is read as the same pair, or refused in a line that says why."""

from __future__ import annotations

import dataclasses
import json

import pytest

from jaxft.data.conversions import ALPACA
from jaxft.data.preference_rows import read_preferences
from jaxft.data.preferences import prepare_preferences
from jaxft.errors import UserError


def say(role, content):
    return {"role": role, "content": content}


def turn(speaker, text):
    return {"from": speaker, "value": text}


SYSTEM, USER = say("system", "Be brief."), say("user", "What sells a baker?")
YES, NO = say("assistant", "Bread."), say("assistant", "Wool.")
ASK = USER["content"]
SIDES = {"chosen": "Bread.", "rejected": "Wool."}
LISTS = {"chosen": [YES], "rejected": [NO]}
TOOL = {"type": "function", "function": {"name": "sell"}}
CALL = {"type": "function", "function": {"name": "sell", "arguments": {"what": "bread"}}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}


def read(path, *, judged=False, **settings):
    settings = {"skip": False, "as_messages": True, "strict": True} | settings
    return read_preferences(path, judged=judged, **settings)[0]


# Of one pair with what the system says, and of the same without.
WITH_SYSTEM = {
    "Orca": {"system": "Be brief.", "question": ASK, **SIDES},
    "argilla": {"system_prompt": "Be brief.", "instruction": ASK, "input": "", **SIDES},
    "icr": {"system": "Be brief.", "input": ASK, **SIDES},
    "prompt pairs": {"system": "Be brief.", "prompt": ASK, **SIDES},
    "LLaMA-Factory": {
        "conversations": [turn("human", ASK)],
        "system": "Be brief.",
        "chosen": turn("gpt", "Bread."),
        "rejected": turn("gpt", "Wool."),
    },
    "Axolotl": {"messages": [SYSTEM, USER], "chosen": YES, "rejected": NO},
    "messages and strings": {"messages": [SYSTEM, USER], **SIDES},
    "OpenAI": {
        "input": {"messages": [SYSTEM, USER], "parallel_tool_calls": True},
        "preferred_output": [YES],
        "non_preferred_output": [NO],
    },
    "TRL": {"prompt": [SYSTEM, USER], **LISTS},
    "distilabel": {
        "prompt": [SYSTEM, USER],
        "chosen": [SYSTEM, USER, YES],
        "rejected": [SYSTEM, USER, NO],
    },
    "the system beside": {
        "prompt": [SYSTEM, USER],
        "chosen": [USER, YES],
        "rejected": [USER, NO],
    },
    "UltraFeedback and a system": {
        "system": "Be brief.",
        "prompt": ASK,
        "chosen": [USER, YES],
        "rejected": [USER, NO],
    },
    "system in the answers": {"prompt": ASK, "chosen": [SYSTEM, YES], "rejected": [SYSTEM, NO]},
    "implicit": {"chosen": [SYSTEM, USER, YES], "rejected": [SYSTEM, USER, NO]},
    "as a table holds it": {
        "prompt": json.dumps([SYSTEM, USER]),
        "chosen": json.dumps([YES]),
        "rejected": {"role": ["assistant"], "content": ["Wool."]},
    },
}
WITHOUT = {
    "instruction": {"instruction": ASK, **SIDES},
    "question": {"question": ASK, "system": "", **SIDES},
    "query": {"query": ASK, "id": "a b c d e", **SIDES},
    "ShareGPT": {
        "chosen": [turn("human", ASK), turn("gpt", "Bread.")],
        "rejected": [turn("human", ASK), turn("gpt", "Wool.")],
    },
    "prompt and one message": {"prompt": USER, "chosen": YES, "rejected": NO},
    "UltraFeedback": {
        "prompt": ASK,
        "prompt_id": "9",
        "chosen": [USER, YES],
        "rejected": [USER, NO],
        "messages": [USER, YES],
    },
    "with the chosen answer": {"messages": [USER, YES], "chosen": YES, "rejected": NO},
    "rated": {"instruction": ASK, "generations": ["Wool.", "Bread."], "ratings": [1, 5]},
    "SHP": {"history": ASK, "human_ref_A": "Wool.", "human_ref_B": "Bread.", "labels": 0},
    "the pool beside": {"instruction": ASK, **SIDES, "generations": ["Wool.", "Rope.", "Bread."]},
}


@pytest.mark.parametrize("name", WITH_SYSTEM)
def test_one_pair_with_a_system_message(name, write):
    (row,) = read(write(WITH_SYSTEM[name]))
    assert row.values == {"prompt": [SYSTEM, USER], **LISTS}


@pytest.mark.parametrize("name", WITHOUT)
def test_one_pair(name, write):
    (row,) = read(write(WITHOUT[name]))
    assert row.values == {"prompt": [USER], **LISTS}
    assert row.unread == ()


def test_without_a_chat_template_a_question_is_put_as_alpacas(write):
    """Stanford's text, whose first sentences are what the system says where it says something."""
    (plain,) = read(write({"question": ASK, **SIDES}), as_messages=False)
    assert plain.values == {"prompt": ALPACA.format("", ASK, ""), **SIDES}
    (spoken,) = read(write(WITH_SYSTEM["Orca"]), as_messages=False)
    asked = f"### Instruction:\n{ASK}\n\n### Response:\n"
    assert spoken.values["prompt"] == f"Be brief.\n\n{asked}"
    (given,) = read(write({"instruction": "Add.", "input": "2, 3", **SIDES}), as_messages=False)
    assert "### Input:\n2, 3\n\n### Response:" in given.values["prompt"]


def test_what_was_said_before_stands_before(write):
    (row,) = read(write({"instruction": ASK, "history": [["Hi.", "Yes?"]], **SIDES}))
    assert row.values["prompt"] == [say("user", "Hi."), say("assistant", "Yes?"), USER]


def test_answers_of_several_turns_keep_the_prompt(write):
    """What both answers begin with is theirs where a prompt is given, and not the prompt."""
    more = [say("assistant", "Which?"), say("user", "Any.")]
    (row,) = read(write({"prompt": ASK, "chosen": [*more, YES], "rejected": [*more, NO]}))
    assert row.values == {"prompt": [USER], "chosen": [*more, YES], "rejected": [*more, NO]}


def test_texts_that_a_chat_template_wrote_are_parted_by_their_turns(write):
    start = "<|im_start|>user\nthe sky<|im_end|>\n<|im_start|>assistant\n"
    (row,) = read(write({"chosen": f"{start}is blue<|im_end|>", "rejected": f"{start}is black"}))
    assert row.values == {"prompt": start, "chosen": "is blue<|im_end|>", "rejected": "is black"}


def test_completions_that_look_like_json_stay_texts(write):
    (row,) = read(write({"prompt": "As JSON:", "chosen": '{"a": 1}', "rejected": "[1, 2"}))
    assert row.values["chosen"] == '{"a": 1}'


REFUSED = [
    ({"chosen": "the sky is blue", "rejected": "the sky is black"}, "texts without turns"),
    ({"prompt": None, **SIDES}, "prompt is null"),
    ({"prompt": "Another thing?", "chosen": [USER, YES], "rejected": [USER, NO]},
     "whole conversations, in which prompt does not stand; leave it out: --config.data.ignore=prompt"),
    ({"prompt": [USER], "chosen": [USER, YES], "rejected": [NO]}, "one alone repeats the prompt"),
    ({"messages": [USER, say("assistant", "Rope.")], **SIDES}, "none of those compared"),
    ({"messages": [SYSTEM, USER], "system": "Be long.", **SIDES}, "system says otherwise"),
    ({"prompt": ASK, "context": "A market.", **SIDES}, "--config.data.ignore=context"),
    ({"instruction": ASK, "output": "Rope.", **SIDES}, "--config.data.ignore=output"),
    ({"chosen": [say("user", "a"), YES], "rejected": [say("user", "b"), NO]}, "no prompt in common"),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"},
     "no prompt in common"),
    ({"prompt": ASK, "chosen": ["Bread."], "rejected": ["Wool."]}, "message 1 must be an object"),
    ({"prompt": [USER], "chosen": [{"role": "assistant", "content": None}], "rejected": [NO]},
     "content must be a string, not null"),
    ({"prompt": [USER], "chosen": [say("assistant", " ")], "rejected": [NO]}, "chosen is empty"),
    ({"instruction": ASK, "generations": ["a", "b"], "ratings": [1]}, "2 answers with 1 score"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "says"), REFUSED)
def test_what_is_not_one_pair_is_refused(row, says, write):
    path = write(row)
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:1: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_history_needs_a_chat_template(write):
    path = write({"instruction": ASK, "history": [["Hi.", "Yes?"]], **SIDES})
    with pytest.raises(UserError, match=r"history .* config\.data\.chat_template"):
        read(path, as_messages=False)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, YES], "label": True},
        {"conversations": [turn("human", ASK), turn("gpt", "Bread.")], "kto_tag": True},
        {"instruction": ASK, "input": "", "output": "Bread.", "kto_tag": 1},
        {"question": ASK, "completion": "Bread.", "label": "True"},
        {"prompt": [USER], "completion": YES, "label": 1.0},
        {"prompt": [USER], "completion": [USER, YES], "label": "1"},
        {"prompt": [USER], "completion": "Bread.", "label": "desirable"},
    ],
)
def test_judged_layouts(row, write):
    """KTO's likewise; a label is true or false, however a table holds it."""
    other = {"prompt": [USER], "completion": [NO], "label": False}
    first, _ = read(write(row, other), judged=True)
    assert first.values == {"prompt": [USER], "completion": [YES], "label": True}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": [USER], "label": True}, "does not end with the assistant's turn"),
        ({"messages": [YES], "label": True}, "nothing is asked"),
        ({"prompt": "a", "completion": "b", "label": 2}, "label must be true or false, not 2"),
        ({"prompt": "a", "completion": "b", "label": None}, "label is null"),
        ({"prompt": "a", "completion": "b", "context": "c", "label": True}, "ignore=context"),
        ({"completion": "b", "label": True}, "a row needs prompt + completion + label"),
    ],
)
def test_what_is_not_judged_is_refused(row, says, write):
    path = write(row)
    with pytest.raises(UserError) as caught:
        read(path, judged=True)
    assert str(caught.value).startswith(f"{path}:1: ")
    assert says in str(caught.value)


TEMPLATE = (
    "{% for m in messages %}{{ m.role + ':' + (m.content or '') }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if tools %}{{ tools | length }}{% endif %}"
)


@pytest.mark.parametrize(
    "answer",
    [CALLS, {k: part for k, part in CALLS.items() if k != "content"}, CALLS | {"content": ""}],
    ids=["null", "absent", "empty"],
)
@pytest.mark.parametrize("judged", [False, True])
def test_a_completion_may_be_a_call(answer, judged, write, tokenizer):
    """Whether its content is null, absent or empty; the tools reach the chat template."""
    row = {"prompt": [USER], "tools": [TOOL]}
    rows = [row | {"chosen": [answer], "rejected": [NO]}]
    if judged:
        rows = [row | {"completion": c, "label": c != NO} for c in ([answer], NO)]
    read_rows = read(write(*rows), judged=judged)
    assert read_rows[0].values["tools"] == [TOOL]
    tokenizer = dataclasses.replace(tokenizer, chat_template=TEMPLATE)
    examples, _ = prepare_preferences(
        read_rows, tokenizer, max_length=512, share=True, skip=False, skipped=0, group=2
    )
    chosen = examples[0].tokens[examples[0].branches == 1].tolist()
    assert '{"name": "sell", "arguments": {"what": "bread"}}' in tokenizer.decode(chosen)


def test_the_log_says_which_keys_were_read(write, tokenizer):
    """Where they are not those of the plain layout."""
    settings = {"max_length": 512, "share": True, "skip": False, "skipped": 0, "group": 2}
    rows = read(write({"question": ASK, **SIDES}), as_messages=False)
    _, summary = prepare_preferences(rows, tokenizer, **settings)
    assert str(summary).startswith("1 pair (question + chosen + rejected); ")
    rows = read(write({"prompt": "a", **SIDES}))
    assert str(prepare_preferences(rows, tokenizer, **settings)[1]).startswith("1 pair; ")
