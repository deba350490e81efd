"""What one rendering tells of a conversation's beginnings is what rendering each of them gives."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from jaxft.runtime.sandbox import assistant_turns, client
from jaxft.runtime.sandbox.streaming import stream
from jaxft.runtime.sandbox.template import clock, compile_template, rendered

GOLDEN = json.loads(
    (Path(__file__).parents[1] / "data" / "golden" / "styles.json").read_text(encoding="utf-8")
)
TURN = "<{{ m.role }}>{{ m.content }}{{ eos_token }}"
LOOP = "{% for m in messages %}" + TURN + "{% endfor %}"
ASK = "{% if add_generation_prompt %}<assistant>{% endif %}"
BEFORE = "{{ bos_token }}{% if messages[0].role == 'system' %}[{{ messages[0].content }}]"
REST = BEFORE + "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
# Templates of which every beginning of some messages is known: by the number of the first such.
LINEAR = {
    "a loop": (LOOP + ASK, 1),
    "a closing token": (LOOP + "{% if add_generation_prompt %}<assistant>{% else %}.{% endif %}", 1),
    "a prompt by name": ("{% set ask = '<assistant>' %}" + LOOP + ASK.replace("<assistant>", "{{ ask }}"), 1),
    "the rest behind a system message": (REST + LOOP.replace("messages", "rest") + ASK, 2),
    "a slice": ("{{ messages[0].content }}" + LOOP.replace("messages", "messages[1:]") + ASK, 2),
    "roles that take turns": (
        LOOP.replace(TURN, "{% if loop.index0 and m.role == messages[loop.index0 - 1].role %}!{% endif %}" + TURN), 1,
    ),
    "a macro": ("{% macro t(m) %}" + TURN + "{% endmacro %}" + LOOP.replace(TURN, "{{ t(m) }}") + ASK, 1),
    "a state of the messages": (
        "{% set s = namespace(n=0) %}" + LOOP.replace(TURN, "{% set s.n = s.n + 1 %}{{ s.n }}" + TURN) + ASK, 1,
    ),
    "an inner loop": (
        LOOP.replace(TURN, "{% for c in m.content %}{{ c }}{% if loop.last %}.{% endif %}{% endfor %}"), 1,
    ),
    "a mark on the last": (LOOP.replace(TURN, TURN + "{% if not loop.last %},{% else %}.{% endif %}") + ASK, 1),
    "a prompt within the loop": (
        LOOP.replace(TURN, TURN + "{% if loop.last and add_generation_prompt %}<assistant>{% endif %}"), 1,
    ),
    "a part": ("{% if messages %}" + LOOP + "{% endif %}" + ASK, 1),
    "a prompt at the start": ("{{ 'asks' if add_generation_prompt else 'tells' }}" + LOOP, 1),
}  # fmt: skip
# Templates that ask what depends on how many messages there are.
OTHERS = {
    "the last message": "{{ messages[-1].role }}" + LOOP + ASK,
    "the number": "{{ messages | length }}" + LOOP + ASK,
    "the number in a macro": "{% macro n() %}{{ messages | length }}{% endmacro %}" + LOOP + "{{ n() }}",
    "the last of the loop, and a state": (
        "{% set s = namespace(n=0) %}"
        + LOOP.replace(TURN, "{% if loop.last %}{% set s.n = s.n + 1 %}{{ s.n }}{% endif %}" + TURN)
    ),
    "the last of the loop, and what changes": LOOP.replace(
        TURN, "{% if loop.last and loop.changed(1) %}.{% endif %}" + TURN
    ),
    "the last of the loop, and the next": LOOP.replace(
        TURN, TURN + "{% if loop.last or loop.nextitem.role == 'user' %},{% endif %}"
    ),
    "the last of the loop is refused": LOOP.replace(
        TURN, TURN + "{% if loop.last and m.role == 'user' %}{{ raise_exception('no') }}{% endif %}"
    ),
    "the last of the loop, in a macro's call": (
        "{% macro b() %}{{ caller() }}{% endmacro %}"
        + LOOP.replace(TURN, "{% call b() %}{{ loop.last }}{% endcall %}" + TURN)
    ),
    "the loop by another name": LOOP.replace(TURN, "{% set l = loop %}{{ l.last }}" + TURN),
    "the loop's length": LOOP.replace(TURN, "{{ loop.revindex }}" + TURN),
    "the next message": LOOP.replace(TURN, "{{ loop.nextitem.role }}" + TURN),
    "the next message by its index": LOOP.replace(TURN, "{{ messages[loop.index0 + 1].role }}" + TURN),
    "a message ahead": LOOP.replace(TURN, "{{ messages[3].role }}" + TURN),
    "a message behind the first": LOOP.replace(TURN, "{{ messages[loop.index0 - 1].role }}" + TURN),
    "a state behind the loop": (
        "{% set s = namespace(n=0) %}" + LOOP.replace(TURN, "{% set s.n = s.n + 1 %}" + TURN) + "{{ s.n }}"
    ),
    "a state kept by another": (
        "{% set s = namespace(m=messages) %}" + LOOP.replace(TURN, "{{ s.m | length }}" + TURN)
    ),
    "messages kept in a state": (
        "{% set s = namespace() %}{% set s.m = messages[1:] %}" + LOOP.replace(TURN, "{{ s.m | length }}" + TURN)
    ),
    "two loops": LOOP + LOOP + ASK,
    "a loop backwards": LOOP.replace("messages", "messages[::-1]") + ASK,
    "a loop over some": LOOP.replace("messages", "messages if m.role != 'system'") + ASK,
    "a loop with an end": LOOP.replace("{% endfor %}", "{% else %}none{% endfor %}") + ASK,
    "a loop that is left": LOOP.replace(TURN, TURN + "{% if m.role == 'user' %}{% break %}{% endif %}"),
    "a captured loop": "{% set text %}" + LOOP + "{% endset %}{{ text | upper }}" + ASK,
    "a filtered loop": "{% filter upper %}" + LOOP + "{% endfilter %}" + ASK,
    "what remembers": "{% set j = joiner(',') %}" + LOOP.replace(TURN, "{{ j() }}" + TURN) + "{{ j() }}",
    "what is drawn": LOOP.replace(TURN, "{{ 'abc' | random }}" + TURN) + "{{ 'abc' | random }}",
    "other messages": "{% set messages = messages + messages %}" + LOOP + ASK,
    "a captured name": (
        "{% set a = '' %}{% set a %}{{ messages | length }}{% endset %}" + LOOP + "{{ a }}"
    ),
    "a refused prompt": LOOP + "{% if add_generation_prompt %}{{ raise_exception('no') }}{% endif %}",
    "a name that is none": LOOP.replace("messages", "nothing") + LOOP,
}  # fmt: skip
TALKS = {
    "with a system message": "suauauaua",
    "without": "uauauaua",
    "the assistant first": "auaua",
    "one": "u",
    "alike": "uuuaa",
}
ROLES = {"s": "system", "u": "user", "a": "assistant"}
VARIABLES = {**clock("2024-02-29"), "bos_token": "<s>", "eos_token": "</s>", "documents": None}


def talk(name):
    return [
        {"role": ROLES[letter], "content": f"{letter}{n}"} for n, letter in enumerate(TALKS[name])
    ]


def known(source, messages, prompt, **variables):
    """The numbers of messages whose beginnings are known, each compared with its rendering."""
    variables = {**VARIABLES, **variables, "add_generation_prompt": prompt}
    found = stream(source, {**variables, "messages": messages})
    if found is None:
        return set()
    for count, (common, rest) in found.beginnings.items():
        alone = rendered(compile_template(source), {**variables, "messages": messages[:count]})[0]
        assert found.text[:common] + rest == alone, count
    return set(found.beginnings)


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize(("source", "first"), LINEAR.values(), ids=LINEAR)
def test_all_beginnings_are_known_where_nothing_depends_on_the_end(source, first, prompt):
    messages = talk("with a system message")
    assert known(source, messages, prompt) == set(range(first, len(messages) + 1))


@pytest.mark.parametrize("name", TALKS)
@pytest.mark.parametrize("source", [*OTHERS.values(), *(s for s, _ in LINEAR.values())])
def test_what_is_known_is_right(source, name):
    for prompt in (False, True):
        assert known(source, talk(name), prompt) <= set(range(len(talk(name)) + 1))


@pytest.mark.parametrize("style", GOLDEN["templates"])
def test_what_is_known_of_the_families_templates_is_right(style):
    for row in GOLDEN["rows"].values():
        for prompt in (False, True):
            messages = row["messages"]
            found = known(GOLDEN["templates"][style], messages, prompt, tools=row.get("tools"))
            assert found <= set(range(len(messages) + 1))


def test_the_common_families_are_linear():
    """But for a system message that one of them writes before its loop."""
    for style in ("llama3", "llama3_1", "phi3", "qwen2_5"):
        for prompt in (False, True):
            messages = talk("with a system message")
            found = known(GOLDEN["templates"][style], messages, prompt, tools=None)
            assert found >= set(range(2, len(messages) + 1)), style


@pytest.mark.parametrize("source", [*OTHERS.values(), *(s for s, _ in LINEAR.values())])
@pytest.mark.parametrize("name", ["with a system message", "without"])
def test_turns_are_the_same_with_and_without_the_shorter_way(source, name, monkeypatch):
    from jaxft.runtime.sandbox import turns

    def found():
        each = [{"messages": talk(name), "add_generation_prompt": False}]
        try:
            return turns.turns(source, VARIABLES, each, eos="</s>")
        except Exception as error:
            return str(error)

    shorter = found()
    monkeypatch.setattr(turns, "MANY", 99)
    assert found() == shorter


def test_a_conversation_of_thousands_of_turns_takes_as_long_as_its_length():
    """Each beginning rendered would take minutes: 3000 exchanges are 6000 renderings of 3000 messages."""
    turns = [
        {"role": role, "content": "words"} for _ in range(3000) for role in ("user", "assistant")
    ]
    client._child.stop()
    start = time.perf_counter()
    [found] = assistant_turns(LOOP + ASK, [{"messages": turns}], {"eos_token": "."})
    assert time.perf_counter() - start < 10  # 0.3 s on an idle machine
    assert len(found["spans"]) == 3000
