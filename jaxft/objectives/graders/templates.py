"""`{{ item.x }}` and `{{ sample.output_text }}`: texts of a grader with placeholders for what it judges."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from jaxft.errors import UserError, nearest, shown

PLACEHOLDER = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
STEP = re.compile(
    r"""\.\s*([^\W\d]\w*)|\[\s*(-?\d+)\s*\]|\[\s*"([^"\]]*)"\s*\]|\[\s*'([^'\]]*)'\s*\]"""
)
SAMPLE = ("output_text", "output_json")
Path = tuple[str | int, ...]


class Missing(Exception):
    """The item has no such field; the message says which."""


@functools.lru_cache(maxsize=1024)
def parts_of(template: str) -> tuple[str | Path, ...]:
    """The texts of a template and, as paths, what stands between them.

    Raises:
        UserError: a placeholder that is no path of the item or the sample.

    >>> parts_of("a {{ item.b[0].c }}")
    ('a ', ('item', 'b', 0, 'c'))
    """
    found: list[str | Path] = []
    end = 0
    for placeholder in PLACEHOLDER.finditer(template):
        found += [template[end : placeholder.start()], _path(placeholder[1])]
        end = placeholder.end()
    found.append(template[end:])
    return tuple(part for part in found if part != "")


def _path(text: str) -> Path:
    root, rest = re.match(r"\s*(\w*)\s*(.*?)\s*$", text, re.DOTALL).groups()  # type: ignore[union-attr]
    steps, end = list[str | int](), 0
    while step := STEP.match(rest, end):
        name, index, *quoted = step.groups()
        steps.append(int(index) if index else name or quoted[0] or quoted[1] or "")
        end = step.end()
    where = f"{{{{{text}}}}}"
    if root not in ("item", "sample") or not steps or end < len(rest):
        raise UserError(
            f"{shown(where)} is no placeholder: {{{{ item.FIELD }}}} or {{{{ sample.output_text }}}} is expected"
        )
    if root == "sample" and steps[0] not in SAMPLE:
        close = nearest(str(steps[0]), SAMPLE) or f": there are {', '.join(SAMPLE)}"
        raise UserError(f"{shown(where)}: a sample has no {shown(steps[0])}{close}")
    return (root, *steps)


def fields_of(value: Any) -> Iterator[str]:
    """The first field of each of the item's placeholders in the templates of a value, lists and objects included."""
    if isinstance(value, str):
        for part in parts_of(value):
            if isinstance(part, tuple) and part[0] == "item":
                yield str(part[1])
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from fields_of(inner)
    elif isinstance(value, Mapping):
        yield from fields_of(list(value.values()))


def filled(template: str, item: Mapping[str, Any], sample: Mapping[str, Any]) -> str:
    """The template's text for an item and a sample.

    What is no text is written as JSON. Where the answer (the sample) lacks something, "" stands: it is the answer's
    fault. Where the item does, nobody can judge.

    Raises:
        Missing: the item lacks something.

    >>> filled("{{ item.a }}: {{ sample.output_json.b }}", {"a": 1}, {"output_json": {"b": "x"}})
    '1: x'
    """
    return "".join(
        part if isinstance(part, str) else _text(part, item, sample) for part in parts_of(template)
    )


def _text(path: Path, item: Mapping[str, Any], sample: Mapping[str, Any]) -> str:
    root, *steps = path
    value: Any = item if root == "item" else sample
    for step in steps:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            if root == "sample":
                return ""
            known = nearest(str(step), map(str, value)) if isinstance(value, Mapping) else ""
            raise Missing(f"the item has no {'.'.join(map(str, steps))}{known}") from None
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
