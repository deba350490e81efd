"""What the chat template leaves out of rows is counted with its first place and a remedy, or refused."""

from __future__ import annotations

import dataclasses

import pytest

from jaxft.data import prepare_examples, read_rows
from jaxft.data.preference_report import pair_findings
from jaxft.data.preference_rows import read_preferences
from jaxft.data.preferences import prepare_preferences
from jaxft.data.report import Part, findings
from jaxft.errors import UserError

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
END = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN = TURNS + "{{ m.content or '' }}" + END
CUTS = TURNS + "{{ (m.content or '').split('</think>')[-1] }}" + END
KEEPS_LAST = TURNS + (
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}{{ m.reasoning_content if loop.last }}"
) + END  # fmt: skip
USER = {"role": "user", "content": "2+2?"}
THOUGHT = "<think>\nTwo and two.\n</think>\n\n"


def said(content="4", **more):
    return {"role": "assistant", "content": content, **more}


def using(tokenizer, template):
    return dataclasses.replace(tokenizer, chat_template=template)


def prepare(path, tokenizer, **settings):
    settings = {"max_length": 512, "loss_on": "completion"} | settings
    rows = list(read_rows(path))
    return rows, *prepare_examples(rows, tokenizer, **settings)


def lines_of(path, tokenizer, **settings):
    """What `jaxft data` says of what is left out."""
    part = Part("training data", *prepare(path, tokenizer, **settings))
    return [line for line in findings(part, tokenizer, 10**6) if "leaves out" in line]


def talk(*messages):
    return {"messages": list(messages)}


def test_nothing_is_said_where_all_is_written(tokenizer, write):
    path = write(talk(USER, said()), talk(USER, said(THOUGHT + "4")))
    assert lines_of(path, using(tokenizer, PLAIN)) == []


@pytest.mark.parametrize("loss_on", ["completion", "all"])
@pytest.mark.parametrize("turned", ["messages", "completion"])
def test_thoughts_that_are_cut_off_are_counted_with_the_first_row(
    tokenizer, write, loss_on, turned
):
    rows = [talk(USER, said()), *[talk(USER, said(THOUGHT + "4"))] * 2]
    if turned == "completion":
        rows = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in rows]
    path = write(*rows)
    _, examples, summary = prepare(path, using(tokenizer, CUTS), loss_on=loss_on)
    assert len(examples) == 3
    line = (
        f"the chat template leaves out the assistant's reasoning of 2 rows, the first at {path}:2"
    )
    assert line in str(summary)
    (line,) = lines_of(path, using(tokenizer, CUTS), loss_on=loss_on)
    assert line == (
        "the chat template leaves out the assistant's reasoning of 2 of 3 (66.7 %) rows "
        f"(first: {path}:2, 'Two and two.'): take a template that writes it (config.data.chat_template)"
    )


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_a_key_that_the_template_does_not_know_is_told_with_what_to_write(tokenizer, write, key):
    path = write(talk(USER, said(**{key: "Two and two."})))
    (line,) = lines_of(path, using(tokenizer, PLAIN))
    assert "does not know the key; write <think>...</think> at the beginning of the content" in line


@pytest.mark.parametrize(
    "written", [{"content": THOUGHT + "4"}, {"reasoning_content": "Two and two."}]
)
def test_thoughts_of_earlier_turns_are_told_apart(tokenizer, write, written):
    """Under loss_on=all; where turns are told apart, such a template is refused for another reason."""
    earlier = said() | written
    path = write(talk(USER, earlier, {"role": "user", "content": "Sure?"}, said("Yes.")))
    (line,) = lines_of(path, using(tokenizer, KEEPS_LAST), loss_on="all")
    assert "it may keep that of the last turn alone; make a row of each turn" in line


def test_calls_tools_and_a_systems_message_are_counted_too(tokenizer, write):
    call = {"function": {"name": "add", "arguments": {"a": 2}}}
    row = talk({"role": "system", "content": "Be brief."}, USER, said(tool_calls=[call]))
    row["tools"] = [{"name": "add", "parameters": {}}]
    forgetful = PLAIN.replace("messages", "messages[1:]")
    found = lines_of(write(row), using(tokenizer, forgetful))
    names = ["the tools", "what the system says", "tool calls"]
    assert [f"leaves out {name} of" in line for name, line in zip(names, found, strict=True)] == [
        True
    ] * 3
    assert all("(config.data.chat_template)" in line for line in found)


@pytest.mark.parametrize(
    "assistant",
    [
        said(""),  # its thoughts are all that it says
        said(THOUGHT + " "),
        said("", reasoning_content="Two and two."),
        said(None, tool_calls=[{"function": {"name": "add", "arguments": "{}"}}]),
    ],
)
def test_a_row_of_which_nothing_that_is_trained_is_written_is_an_error(tokenizer, write, assistant):
    """Whatever `on_unwritten` says; an empty answer is no such row."""
    path = write(talk(USER, said()), talk(USER, assistant))
    if assistant == said(""):
        assert lines_of(path, using(tokenizer, CUTS)) == []
        return
    match = rf"^{path}:2: nothing that the assistant says in this row is written by the chat template \("
    for loss_on in ("completion", "all"):
        with pytest.raises(UserError, match=match) as error:
            prepare(path, using(tokenizer, CUTS), loss_on=loss_on)
        assert "\n" not in str(error.value)
        assert "config.data.chat_template" in str(error.value)


def test_what_stands_in_the_prompt_does_not_make_up_for_it(tokenizer, write):
    row = {"prompt": [USER, said("Yes."), USER], "completion": [said(THOUGHT)]}
    with pytest.raises(UserError, match="nothing that the assistant says"):
        prepare(write(row), using(tokenizer, CUTS))


def test_a_message_that_is_not_trained_does_not_make_up_for_it(tokenizer, write):
    row = talk(USER, said("Yes.", weight=0), USER, said(THOUGHT))
    with pytest.raises(UserError, match="nothing that the assistant says"):
        prepare(write(row), using(tokenizer, CUTS))


def test_it_is_an_error_on_request(tokenizer, write):
    path = write(talk(USER, said()), talk(USER, said(THOUGHT + "4")))
    match = (
        rf"^{path}:2: message 2: the chat template leaves out the assistant's reasoning \('Two and two.'\): "
        r"take a template .*; config.data.on_unwritten=warn goes on without$"
    )
    with pytest.raises(UserError, match=match):
        prepare(path, using(tokenizer, CUTS), on_unwritten="error")
    prepare(path, using(tokenizer, PLAIN), on_unwritten="error")


def test_keys_of_messages_that_nobody_knows_are_named(tokenizer, write):
    """But not those that the template asks for, that are null, or that are names."""
    path = write(
        talk(USER | {"name": "Ann", "id": 3, "mood": "glad"}, said(analysis="Hm.", refusal=None))
    )
    _, _, summary = prepare(path, using(tokenizer, PLAIN + "{{ mood }}"))
    assert summary.unused_keys == ("analysis (of messages)",)
    assert "keys not used: analysis (of messages)" in str(summary)


def test_another_role_that_wants_to_be_trained_is_named(tokenizer, write):
    path = write(talk(USER | {"train": True}, said()))
    _, _, summary = prepare(path, using(tokenizer, PLAIN))
    assert summary.unused_keys == ("weight 1 of another than the assistant",)
    _, _, summary = prepare(path, using(tokenizer, PLAIN), loss_on="all")
    assert summary.unused_keys == ()


def prefer(path, tokenizer, judged=False, **settings):
    rows, _ = read_preferences(path, judged=judged, skip=False)
    settings = {
        "max_length": 512,
        "share": True,
        "skip": False,
        "skipped": 0,
        "group": 4,
    } | settings
    return rows, *prepare_preferences(rows, tokenizer, **settings)


@pytest.mark.parametrize("judged", [False, True])
def test_preferences_are_compared_as_well(tokenizer, write, judged):
    """A row of which both completions lose something is one row."""
    one, two = [said(THOUGHT + "4")], [said(THOUGHT + "5", mood="glad")]
    if judged:
        path = write(*({"prompt": [USER], "completion": c, "label": c is one} for c in (one, two)))
    else:
        path = write(*[{"prompt": [USER], "chosen": one, "rejected": two}] * 2)
    rows, pairs, summary = prefer(path, using(tokenizer, CUTS), judged)
    line = f"leaves out the assistant's reasoning of 2 rows, the first at {path}:1"
    assert line in str(summary)
    assert summary.unused_keys == ("mood (of messages)",)
    found = pair_findings(Part("training data", rows, pairs, summary), tokenizer, 10**6)
    assert any(
        f"of 2 of 2 (100 %) rows (first: {path}:1, 'Two and two.')" in line for line in found
    )
    with pytest.raises(UserError, match=rf"^{path}:1: message 2: .*on_unwritten=warn"):
        prefer(path, using(tokenizer, CUTS), judged, on_unwritten="error")


def test_a_completion_of_which_nothing_is_written_is_an_error(tokenizer, write):
    path = write({"prompt": [USER], "chosen": [said()], "rejected": [said(THOUGHT)]})
    with pytest.raises(UserError, match=rf"^{path}:1: nothing that the assistant says"):
        prefer(path, using(tokenizer, CUTS))


def test_a_completion_that_is_compared_has_no_weights(tokenizer, write):
    """In a prompt, which is not trained, they say nothing new."""
    path = write(
        {"prompt": [USER, said(weight=0), USER], "chosen": [said()], "rejected": [said("5")]}
    )
    assert len(prefer(path, using(tokenizer, PLAIN))[1]) == 1
    path = write(
        {"prompt": [USER], "chosen": [said("a", weight=0), said()], "rejected": [said("5")]}
    )
    with pytest.raises(
        UserError, match=rf"^{path}:1: chosen has a message of weight 0.*into the prompt"
    ):
        prefer(path, using(tokenizer, PLAIN))


THINKS = PLAIN.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
OTHERWISE = "the chat template begins the answer otherwise than it asks for one, of 1 of 1 (100 %) rows (first: "


def test_a_completion_that_does_not_follow_its_prompt_is_told_by_its_reason(tokenizer, write):
    """And not as a space at the prompt's end, which is what it would be of a text."""
    row = {"prompt": [USER], "completion": [said()]}
    part = Part("training data", *prepare(write(row), using(tokenizer, THINKS)))
    [line] = [line for line in findings(part, tokenizer, 10**6) if "asks" in line]
    assert line.startswith(OTHERWISE)
    assert "<think>" in line
    assert "let its add_generation_prompt write what it writes" in line
    assert part.summary.diverged == 0
    assert prepare(write(row), using(tokenizer, PLAIN))[2].left_out == ()


@pytest.mark.parametrize("judged", [False, True])
def test_so_is_a_preference(tokenizer, write, judged):
    row = {"prompt": [USER], "chosen": [said()], "rejected": [said("5")]}
    rows = [row]
    if judged:
        rows = [{"prompt": [USER], "completion": [said(str(i))], "label": bool(i)} for i in (0, 1)]
    read, _ = read_preferences(write(*rows), judged=judged, skip=False)
    settings = {"max_length": 512, "share": True, "skip": False, "skipped": 0, "group": 2}
    for template, count in ((PLAIN, 0), (THINKS, 1)):
        _, summary = prepare_preferences(read, using(tokenizer, template), **settings)
        assert ["begins the answer otherwise" in str(part) for part in summary.left_out] == [
            True
        ] * count
    assert summary.left_out[0].rows == len(rows)
