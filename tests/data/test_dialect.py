"""Templates get contents, calls and arguments in the form that they take."""

from __future__ import annotations

import dataclasses
import json

import pytest

from jaxft.assets import model_folder
from jaxft.data import load_tokenizer
from jaxft.data.chat import render
from jaxft.data.dialect import takes_calls, takes_parts
from jaxft.data.messages import read_message
from jaxft.errors import UserError

TURNS = "{% for m in messages %}{{ m.role }}:"
END = ";{% endfor %}"
CALLS = "{% for c in m.tool_calls or [] %}{{ c.function.name }} "
# What templates do with arguments: of Qwen 2.5 and Llama, of Qwen 3, of DeepSeek, of Gemma 4, of none.
ARGUMENTS = {
    "dumps": "{{ c.function.arguments | tojson }}",
    "either": "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}",
    "text": "{{ '' + c.function.arguments }}",
    "printed": "{{ c.function.arguments }}",
    "own": "{% if c.function.arguments is string %}({{ c.function.arguments }}){% else %}"
    "({% for k, v in c.function.arguments | items %}{{ k }}={{ v }}{% endfor %}){% endif %}",
    "mapping": "{% if c.function.arguments is string %}{{ raise_exception('no text') }}{% endif %}"
    "{% for k, v in c.function.arguments | items %}{{ k }}={{ v }}{% endfor %}",
}


def using(tokenizer, template):
    return dataclasses.replace(tokenizer, chat_template=template)


def written(tokenizer, template, *messages):
    read = [read_message("a:1", message) for message in messages]
    return render(using(tokenizer, template), read)[0]


def call(arguments, **more):
    function = {"name": "ask", "arguments": arguments}
    return {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": function}],
        **more,
    }


@pytest.mark.parametrize(
    ("kind", "of_object", "of_text"),
    [
        ("dumps", '{"city": "Rome é"}', '{"city": "Rome é"}'),
        ("either", '{"city": "Rome é"}', '{"city":"Rome é"}'),
        ("text", '{"city": "Rome é"}', '{"city":"Rome é"}'),
        ("printed", '{"city": "Rome é"}', '{"city":"Rome é"}'),
        ("own", "(city=Rome é)", "(city=Rome é)"),
        ("mapping", "city=Rome é", "city=Rome é"),
    ],
)
def test_arguments_are_given_as_the_template_takes_them(tokenizer, kind, of_object, of_text):
    """As the row has them where the template writes them so; text is parsed, an object made text, where it does not."""
    template = TURNS + "{{ m.content or '' }}" + CALLS + ARGUMENTS[kind] + "{% endfor %}" + END
    for content in ({}, {"content": None}, {"content": ""}):
        for arguments, wanted in (({"city": "Rome é"}, of_object), ('{"city":"Rome é"}', of_text)):
            text = written(tokenizer, template, call(arguments, **content))
            assert text == f"assistant:ask {wanted};"
    text = written(tokenizer, template, call('{"city":"Rome é"}', content="Wait. "))
    assert text == f"assistant:Wait. ask {of_text};"


@pytest.mark.parametrize(
    "content",
    [
        "{{ m.content }}",  # an absent one would be fine
        "{{ m.content + '' }}",  # it must be a text
        "{% if m.content is defined and m.content is none %}{% else %}{{ fail() }}{% endif %}",  # it must be null
        "{% if 'content' not in m %}{% else %}{{ fail() }}{% endif %}",  # it must be absent
    ],
)
def test_a_message_of_calls_alone_has_the_content_that_the_template_takes(tokenizer, content):
    template = (
        TURNS
        + "{% if m.tool_calls %}"
        + content
        + CALLS
        + ARGUMENTS["dumps"]
        + "{% endfor %}{% endif %}"
        + END
    )
    for given in ({}, {"content": None}, {"content": ""}):
        assert written(tokenizer, template, call({}, **given)) == "assistant:ask {};"


def test_a_template_that_writes_no_calls_and_fails_at_them_says_so(tokenizer):
    template = TURNS + "{{ m.content + '' }}" + END
    with pytest.raises(UserError, match=r"it writes no tool calls.*as chatml does"):
        written(tokenizer, template, call({}))
    assert written(tokenizer, template, call({}, content="a")) == "assistant:a;"


PARTS = [{"type": "text", "text": " One, "}, {"type": "text", "text": " two"}]
LISTED = (
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p['type'] == 'text' %}[{{ p['text'] | trim }}]{% endif %}{% endfor %}{% endif %}"
)
ROLES = ("system", "user", "assistant", "tool")


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (LISTED, "[One,][two]"),
        ("{{ m.content }}", " One,  two"),
        ("{{ m.content + '' }}", " One,  two"),
        ("{{ m.content if m.content is string else m.content | tojson }}", " One,  two"),
        ("{{ m.content if m.content is string else '' }}", " One,  two"),
    ],
)
def test_parts_are_a_list_for_templates_that_go_through_them_and_else_one_text(
    tokenizer, role, content, wanted
):
    text = written(tokenizer, TURNS + content + END, {"role": role, "content": PARTS})
    assert text == f"{role}:{wanted};"


def test_each_role_is_asked_on_its_own():
    """Gemma's older template reads the first part alone of a system's message."""
    template = (
        "{% set first = messages[0].content if messages[0].content is string else messages[0].content[0].text %}"
        "{% if messages[0].role == 'system' %}{{ first }}{% set messages = messages[1:] %}{% endif %}"
        + TURNS + LISTED + END
    )  # fmt: skip
    assert [takes_parts(template, (), role) for role in ROLES] == [False, True, True, True]


def test_one_part_is_written_as_a_text(tokenizer):
    message = {"role": "user", "content": PARTS[:1]}
    assert written(tokenizer, TURNS + LISTED + END, message) == "user: One, ;"


def test_a_template_is_asked_once(tokenizer, monkeypatch):
    from jaxft.data import dialect

    template = "{# asked once #}" + TURNS + CALLS + ARGUMENTS["dumps"] + "{% endfor %}" + END
    written(tokenizer, template, call({}))
    monkeypatch.setattr(dialect, "render_conversations", None)
    assert written(tokenizer, template, *[call('{"a": 1}')] * 3) == 'assistant:ask {"a": 1};' * 3


def test_chatml_of_jaxft_takes_objects_and_a_content_or_none():
    tokenizer = load_tokenizer(model_folder("tiny"), "chatml")
    shared = tuple(sorted(tokenizer.special_tokens.items()))
    taken = takes_calls(str(tokenizer.chat_template), shared)
    assert json.dumps(taken) == json.dumps(dict.fromkeys(("absent", "", "null"), (False, True)))
