"""Programs of a model's folder: templates and patterns that would never end, or fill the memory."""

from __future__ import annotations

import os
import resource
import threading
import time

import pytest

from jaxft.errors import UserError
from jaxft.runtime.sandbox import (
    TooMuch,
    assistant_turns,
    client,
    first_matches,
    render_conversations,
)

GROW = "{% set ns = namespace(x=['a']) %}{% for i in range(60) %}{% set ns.x = VALUE %}{% endfor %}"
HOSTILE = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "product": "{{ 'a' * 10**10 }}",
    "power": "{{ (10**9999) ** 9999 ** 9 }}",
    "list": "{{ ([1] * 10**9) | length }}",
    "concatenation": GROW.replace("VALUE", "ns.x ~ ns.x") + "{{ ns.x }}",
    "nested": GROW.replace("VALUE", "[ns.x, ns.x]") + "{{ ns.x }}",
    "nested namespaces": GROW.replace("VALUE", "namespace(a=ns.x, b=ns.x)") + "{{ ns.x }}",
    "joined": "{{ range(99999) | list | map('string') | map('center', 100000) | join }}",
    "percent": "{{ '%9999999999d' % 1 }}",
    "format": "{{ '{:>9999999999}'.format(1) }}",
    "filter": "{{ 'a' | center(10**10) }}",
    "indent": "{{ ('a\n' * 100000) | indent(10**6) }}",
    "range": "{{ range(10**12) | list }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "depth": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "text": "{{ 'a' * 40000000 }}",
    "class": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "map": "{{ [messages] | map(attribute='__class__.__base__') | list | first | upper | attr('x') }}{{ 1/0 }}",
    "format reaches": "{{ '{0.__class__.__base__}'.format(1) }}",
    "mutation": "{{ messages.append(1) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "source": "{{ 1 }}" * 200_000,
}


def seconds() -> float:
    """Processor time of this process and its ended children: a busy machine does not lengthen it."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_template_is_refused_within_a_second_and_256_mb(source):
    client._child.stop()  # what it did for others is not counted
    before = seconds()
    with pytest.raises(UserError) as error:
        render_conversations(source, [{"messages": [{"role": "user"}]}], {})
    assert seconds() - before < 1.0
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.skipif(not os.path.exists("/proc/self/limits"), reason="reads /proc")
def test_the_kernel_keeps_the_child_within_256_mb():
    render_conversations("", [{}], {})
    with open(f"/proc/{client._child._process.pid}/limits") as file:
        limits = {line[:26].strip(): line[26:].split()[0] for line in file}
    assert int(limits["Max address space"]) < 256_000_000
    assert limits["Max file size"] == "0"


def test_the_next_template_is_rendered_after_one_that_was_ended():
    with pytest.raises(UserError, match="processor time: does it loop for ever"):
        render_conversations(HOSTILE["loops"], [{}], {})
    assert render_conversations("{{ x }}", [{"x": "ß\ud800"}], {}) == [("ß\ud800", [])]


def test_each_thread_gets_its_own_answer():
    texts: dict[int, str] = {}

    def work(number: int) -> None:
        for _ in range(20):
            [(texts[number], _)] = render_conversations("{{ n }}", [{"n": number}], {})
            assert texts[number] == str(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {number: str(number) for number in range(8)}


def test_the_child_knows_no_credentials_and_ends_with_its_parent(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    client._child.stop()
    render_conversations("", [{}], {})
    process = client._child._process
    if os.path.exists("/proc/self/environ"):
        with open(f"/proc/{process.pid}/environ", "rb") as file:
            assert b"secret" not in file.read()
    process.stdin.close()
    assert process.wait(5) == 0
    assert render_conversations("a", [{}], {}) == [("a", [])]


def test_the_child_opens_nothing():
    """The audit hook holds even for code that is no template."""
    from jaxft.runtime.sandbox.worker import refuse

    refused = [("open", ("/etc/passwd", "r", 0)), ("os.system", ("id",)), ("socket.connect", ())]
    for event, arguments in refused:
        with pytest.raises(PermissionError):
            refuse(event, arguments)
    refuse("open", ("/usr/lib/python3/json/decoder.py", "r", 0))


@pytest.mark.parametrize("pattern", ["(a+)+$", "([a-z._0-9]+)+X", "(", "(?P<x>", "a{99999999999}"])
def test_a_pattern_that_never_ends_or_is_none_is_refused(pattern):
    client._child.stop()  # what it did for others is not counted
    before = seconds()
    with pytest.raises(UserError):
        first_matches([pattern], ["a" * 40 + "!"] * 20, "(?:{})$")
    assert seconds() - before < 1.0


def test_a_conversation_costs_tenths_of_a_millisecond():
    talk = {"messages": [{"role": "user", "content": "words " * 100}] * 4}
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    render_conversations(source, [talk], {})
    start = time.perf_counter()
    for _ in range(200):
        render_conversations(source, [talk] * 3, {})
    assert time.perf_counter() - start < 200 * 0.005  # 0.15 ms on an idle machine


def test_what_is_too_much_is_told_apart_from_what_fails():
    """So that a long row can be left out, where a wrong one is an error."""
    with pytest.raises(TooMuch, match="more than 128 MB"):
        render_conversations("{{ 'a' * 10**10 }}", [{}], {})
    with pytest.raises(TooMuch, match="does it loop for ever"):
        render_conversations(HOSTILE["loops"], [{}], {})
    with pytest.raises(UserError, match="division") as error:
        render_conversations("{{ 1 / 0 }}", [{}], {})
    assert not isinstance(error.value, TooMuch)


def test_many_long_texts_are_no_more_at_once_than_the_child_can_hold():
    """Portions are sized by their characters: 40 texts of 1 MB would not fit together."""
    talks = [{"text": str(n) * 1_000_000} for n in range(10)] * 4
    texts = [text for text, _ in render_conversations("{{ text }}", talks, {})]
    assert texts == [talk["text"] for talk in talks]


def test_the_turns_of_a_long_conversation_are_found_in_bounded_memory():
    """300 exchanges of 500 characters: their beginnings have 90 MB together."""
    talk = [
        {"role": role, "content": "words " * 83}
        for _ in range(300)
        for role in ("user", "assistant")
    ]
    source = "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}"
    [found] = assistant_turns(source, [{"messages": talk}], {})
    starts = [start for start, _ in found["spans"]]
    assert starts == [n * (4 + 9 + 2 * 498) + 4 + 498 for n in range(300)]


def test_lots_that_a_template_draws_are_the_same_each_time():
    source = "{{ range(1000) | random }} {{ lipsum(n=1) }}"
    first, second = (render_conversations(source, [{}], {}) for _ in range(2))
    assert first == second
