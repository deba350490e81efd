"""A grammar of chat templates that mean no good, for fuzz.py."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable

LEAVES = [
    "x",
    "messages",
    "m",
    "loop",
    "bos_token",
    "'a'",
    "10**9",
    "1",
    "[1,2]",
    "{'a':1}",
    "namespace(x=1)",
    "messages[0].role",
    "range(99999)",
    "ns",
    "ns.x",
    "''.join",
    "cycler",
    "lipsum",
    "self",
    "joiner",
]
OPERATORS = ["*", "+", "-", "/", "//", "%", "**", "~", "==", "<", "in", "and"]
FILTERS = [
    "join",
    "list",
    "length",
    "string",
    "tojson",
    "trim",
    "upper",
    "sort",
    "reverse",
    "first",
    "int",
    "sum",
    "unique",
    "pprint",
    "urlize",
    "dictsort",
    "map",
    "striptags",
    "xmlattr",
    "center(9)",
    "center(10**10)",
    "indent(10**5)",
    "wordwrap(9)",
    "batch(10**5,1)",
    "truncate(9)",
    "replace('','aaaa')",
    "round(10**9)",
    "attr('__class__')",
    "groupby(0)",
    "slice(10**9)",
]
ATTRIBUTES = [
    "__class__",
    "__init__.__globals__",
    "format",
    "x",
    "content",
    "_x",
    "append",
    "ljust(10**10)",
    "mro()",
]
FORMATS = ["%s", "%9999999999d", "{0.__class__}", "{:>99999999}", "%(a)s"]
LOOPS = ("messages", "range(99999)", "range(10**9)", "x", "messages[0].content", "ns")
GROWTH = (
    "ns.x ~ ns.x",
    "[ns.x, ns.x]",
    "ns.x * 9",
    "(ns.x, ns.x)",
    "{'a': ns.x, 'b': ns.x}",
    "namespace(a=ns.x, b=ns.x)",
)
USES = ("{{ ns.x }}", "{{ ns.x|tojson }}", "{{ ns.x == ns.x }}", "{{ {ns.x: 1} }}", "")
TAGS = (
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
    "{% break %}",
    "{% raw %}",
    "{% do 1 %}",
    "{% call",
    "{#",
)


def expression(draw: random.Random, depth: int) -> str:
    """A Jinja expression: most fail, some are large, some reach for what they must not."""
    if depth == 0:
        return draw.choice(LEAVES)

    def part() -> str:
        return expression(draw, depth - 1)

    forms: list[Callable[[], str]] = [
        lambda: f"({part()} {draw.choice(OPERATORS)} {part()})",
        lambda: f"({part()})|{draw.choice(FILTERS)}",
        lambda: f"({part()})|{draw.choice(FILTERS)}|{draw.choice(FILTERS)}",
        lambda: f"{part()}.{draw.choice(ATTRIBUTES)}",
        lambda: f"'{draw.choice(FORMATS)}'{draw.choice(['%', '.format'])}({part()})",
        lambda: f"[{part()}, {part()}]",
        lambda: f"({part()}, ({part()}, {part()}))",
        lambda: f"{part()}[{part()}]",
        lambda: f"({part()} if {part()} else {part()})",
    ]
    return draw.choice(forms)()


def statement(draw: random.Random, depth: int) -> str:
    """A piece of a template."""

    def inner() -> str:
        return statement(draw, depth - 1) if depth else "{{ " + expression(draw, 2) + " }}"

    def grown() -> str:
        doubled = "{% set ns.x = " + draw.choice(GROWTH) + " %}"
        loop = "{% for i in range(60) %}" + doubled + "{% endfor %}"
        return "{% set ns = namespace(x='ab') %}" + loop + draw.choice(USES)

    forms: list[Callable[[], str]] = [
        grown,
        lambda: "{{ " + expression(draw, draw.randint(0, 3)) + " }}",
        lambda: "{% for m in " + draw.choice(LOOPS) + " %}" + inner() + inner() + "{% endfor %}",
        lambda: "{% macro f(n) %}" + inner() + "{{ f(n) }}{% endmacro %}{{ f(1) }}",
        lambda: (
            "{% if "
            + expression(draw, 1)
            + " %}"
            + inner()
            + "{% else %}"
            + inner()
            + "{% endif %}"
        ),
        lambda: "{% generation %}" + inner() + "{% endgeneration %}",
        lambda: "{% set x = " + expression(draw, 2) + " %}" + inner(),
        lambda: draw.choice(TAGS),
    ]
    return draw.choice(forms)()


if __name__ == "__main__":  # the scripts beside it are run; this one is read
    argparse.ArgumentParser(description="Templates for fuzz.py: run that.").parse_args()
