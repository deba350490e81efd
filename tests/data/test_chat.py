from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from jaxft.data import chat, encode_chat, encode_chat_with_mask
from jaxft.data.chat import encode_chats_with_masks, render, silent_tokens
from jaxft.errors import UserError

GOLDEN = json.loads((Path(__file__).parent / "golden" / "chat.json").read_text(encoding="utf-8"))
CASES = GOLDEN["cases"]


def named(case):
    return f"{case['title']}, {case['template']}"


def using(tokenizer, template):
    return dataclasses.replace(tokenizer, chat_template=template)


def messages(*turns):
    return [{"role": role, "content": content} for role, content in turns]


@pytest.mark.parametrize("case", CASES, ids=named)
def test_ids_are_those_of_transformers(tokenizer, case):
    """Whole conversation, and first message with the generation prompt."""
    tokenizer = using(tokenizer, GOLDEN["templates"][case["template"]])
    assert encode_chat(tokenizer, case["messages"]) == case["ids"]
    first = case["messages"][:1]
    assert encode_chat(tokenizer, first, add_generation_prompt=True) == case["prompt_ids"]


@pytest.mark.parametrize("case", [c for c in CASES if c["template"] != "plain"], ids=named)
def test_marked_tokens_are_those_of_transformers(tokenizer, case):
    tokenizer = using(tokenizer, GOLDEN["templates"][case["template"]])
    ids, mask = encode_chat_with_mask(tokenizer, case["messages"])
    assert ids == case["ids"]
    assert mask.astype(int).tolist() == case["mask"]


@pytest.mark.parametrize("case", [c for c in CASES if c["template"] == "marked"], ids=named)
def test_without_marks_the_turns_found_by_growth_are_the_marked_ones(tokenizer, case):
    """Also where a user writes the EOS, and the turn ends with its EOS: no newline behind it."""
    tokenizer = using(tokenizer, GOLDEN["templates"]["plain"])
    ids, mask = encode_chat_with_mask(tokenizer, case["messages"])
    assert ids == case["ids"]
    assert mask.astype(int).tolist() == case["mask"]


def test_a_template_that_rewrites_earlier_turns_is_noticed(tokenizer):
    forgetful = (
        "{% for m in messages %}{{ m.role + ':' }}"
        "{% if loop.last %}{{ m.content }}{% endif %}{% endfor %}"
    )
    talk = messages(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    with pytest.raises(UserError, match=r"turn 2 otherwise when more follows.*generation"):
        encode_chat_with_mask(using(tokenizer, forgetful), talk)


def test_a_generation_prompt_that_the_conversation_does_not_hold_is_noticed(tokenizer):
    thinking = (
        "{% for m in messages %}{{ m.role + ':' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:<think>{% endif %}"
    )
    with pytest.raises(
        UserError,
        match=r"asks for an answer by 'assistant:<think>', but writes turn 2 as 'assistant:b'",
    ):
        encode_chat_with_mask(
            using(tokenizer, thinking), messages(("user", "a"), ("assistant", "b"))
        )


def test_no_bos_is_added_to_the_templates_own(tokenizer):
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    ids = encode_chat(using(tokenizer, template), messages(("user", "Aromi")))
    assert ids == tokenizer.encode("Aromi")
    assert ids.count(tokenizer.bos_id) == 1


def test_a_message_without_any_value_for_a_key_lacks_it(tokenizer):
    template = "{% for m in messages %}{{ 'name' in m }}{% endfor %}"
    talk = [{"role": "user", "content": "a", "name": None}]
    assert render(using(tokenizer, template), talk)[0] == "False"


def test_a_failed_rendering_leaves_nothing_for_the_next(tokenizer):
    template = (
        "{% for m in messages %}{% generation %}{{ m.content }}"
        "{% if m.role == 'user' %}{{ raise_exception('no') }}{% endif %}"
        "{% endgeneration %}{% endfor %}"
    )
    marked = using(tokenizer, template)
    with pytest.raises(UserError):
        encode_chat_with_mask(marked, messages(("assistant", "a"), ("user", "b")))
    assert render(marked, messages(("assistant", "ab")))[1] == [(0, 2)]


def test_the_mask_is_boolean_and_as_long_as_the_ids(tokenizer):
    ids, mask = encode_chat_with_mask(tokenizer, messages(("user", "a"), ("assistant", "b")))
    assert mask.dtype == np.bool_
    assert mask.shape == (len(ids),)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{% for %}", "chat template fails: line 1: "),
        ("{{ raise_exception('roles must alternate') }}", "fails: roles must alternate"),
        ("{{ messages.nothing.at_all }}", "fails: .*no attribute"),
        ("{{ messages[0].__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "'append' of 'list' object is unsafe"),
        ("{% set n = namespace(__class__=1) %}", "__class__"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_a_template_that_fails_is_one_clear_line(tokenizer, template, message):
    with pytest.raises(UserError, match=message) as error:
        render(using(tokenizer, template), messages(("user", "a")))
    assert "\n" not in str(error.value)


def test_many_conversations_at_once_are_each_as_alone(tokenizer):
    """With and without marks in the template, with and without tools, of one turn or more."""
    for template in ("plain", "marked"):
        tokens = using(tokenizer, GOLDEN["templates"][template])
        talks = [(c["messages"], None) for c in CASES if c["template"] == template]
        talks += [(messages(("user", "a")), [{"name": "look"}])]
        together = encode_chats_with_masks(tokens, talks)
        for (talk, tools), (ids, mask, text) in zip(talks, together, strict=True):
            alone_ids, alone_mask = encode_chat_with_mask(tokens, talk, tools=tools)
            assert ids == alone_ids
            assert mask.tolist() == alone_mask.tolist()
            assert text == render(tokens, talk, tools=tools)[0]


OPEN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def said(tokenizer, talk, **settings):
    ids, mask = encode_chat_with_mask(tokenizer, talk, **settings)
    return tokenizer.decode(np.array(ids)[mask], skip_special_tokens=False)


@pytest.mark.parametrize(
    "opening",
    [
        "",
        "{% if not messages %}{{ raise_exception('no messages') }}{% endif %}",
        "{% if messages[0]['role'] != 'system' %}<|system|>You help.{{ eos_token }}{% endif %}",
    ],
    ids=["an empty one is written", "an empty one is refused", "with a system message of its own"],
)
def test_a_conversation_may_begin_with_the_assistant(tokenizer, opening):
    """Its first turn begins behind the prompt for an answer, whatever the template makes of no messages."""
    talk = messages(("assistant", "Welcome!"), ("user", "hi"), ("assistant", "hello"))
    assert said(using(tokenizer, opening + OPEN), talk) == "Welcome!<|im_end|>hello<|im_end|>"


def test_a_template_that_refuses_an_assistant_at_first_says_why_itself(tokenizer):
    strict = (
        "{% if messages[0].role == 'assistant' %}{{ raise_exception('the user first') }}{% endif %}"
    )
    with pytest.raises(
        UserError,
        match=r"chat template fails: the user first \(the conversation begins with the assistant: put",
    ):
        said(using(tokenizer, strict + OPEN), messages(("assistant", "Welcome!")))


def test_an_assistant_at_first_without_a_prompt_for_it_is_said(tokenizer):
    silent = "{{ messages[0]['role'][:3] }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(
        UserError, match=r"begins with the assistant, .* no prompt for an answer before"
    ):
        said(using(tokenizer, silent), messages(("assistant", "Welcome!")))


def test_an_assistant_at_first_whose_prompt_differs_is_told_by_that_cause(tokenizer):
    """And not by where its turn stands."""
    thinking = OPEN.replace("<|assistant|>{% endif %}", "<|assistant|><think>{% endif %}")
    with pytest.raises(
        UserError, match=r"asks for an answer by '<\|assistant\|><think>', but writes"
    ):
        said(using(tokenizer, thinking), messages(("assistant", "Welcome!"), ("user", "hi")))


def test_a_beginning_that_the_template_refuses_is_told_with_its_reason(tokenizer):
    paired = (
        OPEN + "{% if messages | length % 2 %}{{ raise_exception('pairs, please') }}{% endif %}"
    )
    with pytest.raises(UserError, match=r"not its beginning .* turn 2 alone \(pairs, please\)"):
        said(using(tokenizer, paired), messages(("user", "a"), ("assistant", "b")))


def test_what_is_rewritten_is_shown(tokenizer):
    forgetful = "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else '-' }}{% endfor %}"
    talk = messages(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    with pytest.raises(UserError, match=r"up to turn 2 otherwise .*\('b' becomes '-cd'\)"):
        said(using(tokenizer, forgetful), talk)


def test_turns_behind_the_longest_row_need_not_be_found(tokenizer):
    """A row that is cut there loses them; those before it are as ever."""
    late = OPEN.replace(
        "{{ m.content }}", "{{ m.content if loop.length < 4 or m.role == 'user' else '' }}"
    )
    talk = messages(("user", "a " * 9), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    with pytest.raises(UserError, match="turn 2 otherwise"):
        said(using(tokenizer, late), talk)
    assert said(using(tokenizer, late), talk, max_length=4) == ""
    ids, mask = encode_chat_with_mask(using(tokenizer, OPEN), talk)
    for most in (1, len(ids) // 2, len(ids) - 1, len(ids)):
        _, cut = encode_chat_with_mask(using(tokenizer, OPEN), talk, max_length=most)
        assert cut[:most].tolist() == mask[:most].tolist()


def test_silent_messages_are_found_as_far_as_they_are_wanted(tokenizer, monkeypatch):
    """Each costs a rendering of all: of a long conversation no more are made than its first tokens need."""
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    talk = messages(*[("user", "Where?"), ("assistant", "At the riverside.")] * 40)
    talk = [m | {"weight": 0} if m["role"] == "assistant" else m for m in talk]
    asked = []

    def counting(tokenizer, conversations):
        asked.extend(conversations)
        return render_all(tokenizer, conversations)

    render_all = chat._render_all
    monkeypatch.setattr(chat, "_render_all", counting)
    whole = silent_tokens(using(tokenizer, template), talk)
    assert len(asked) == 41
    asked.clear()
    some = silent_tokens(using(tokenizer, template), talk, max_length=50)
    assert len(asked) < 20
    assert some[:50].any()
    assert np.array_equal(some[:50], whole[:50])
