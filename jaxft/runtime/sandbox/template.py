"""Chat templates in Jinja's sandbox, with the names that transformers defines for them."""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxft.runtime.sandbox.moment import moment_of

Spans = list[tuple[int, int]]


class GenerationMarks(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: notes which characters the assistant says.

    The spans are those of transformers: a block begins where the text rendered before it ends.
    """

    tags = {"generation"}  # noqa: RUF012 (Jinja's own way)

    def __init__(self, environment: jinja2.Environment) -> None:
        """Called by Jinja; `recording` becomes a method of the environment."""
        super().__init__(environment)
        environment.extend(recording=self.recording)
        self._blocks: list[str] | None = None
        self._spans: Spans = []

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Reads the tag's body up to `endgeneration`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        text = caller()
        if self._blocks is not None:
            start = sum(map(len, self._blocks))
            self._spans.append((start, start + len(text)))
        return text

    @contextlib.contextmanager
    def recording(self) -> Iterator[tuple[list[str], Spans]]:
        """Yields (blocks to be filled while rendering, spans noted meanwhile)."""
        self._blocks, self._spans = [], []
        try:
            yield self._blocks, self._spans
        finally:
            self._blocks = None


class TemplateNamespace(jinja2.utils.Namespace):
    """Jinja's namespace without underscored names, which reach into the interpreter."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as Jinja's: a name may be called self
        """The same arguments as `dict`."""
        self, *rest = args
        names = dict(*rest, **kwargs)
        for name in names:
            _refuse_underscore(name)
        jinja2.utils.Namespace.__init__(self, names)

    def __setitem__(self, name: str, value: Any) -> None:
        """`{% set namespace.name = value %}`."""
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no name {name!r}")


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime(moment: datetime.datetime | None, pattern: str) -> str:
    return (moment or datetime.datetime.now()).strftime(pattern)


def clock(now: str) -> dict[str, Callable[[str], str]]:
    """What a template calls to write the date: that of `now`, an ISO date or date and time; "": the present one.

    >>> clock("2024-02-29")["strftime_now"]("%d %b %Y, %H:%M")
    '29 Feb 2024, 00:00'
    """
    return {"strftime_now": functools.partial(_strftime, moment_of(now))}


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes the characters of HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.lru_cache(maxsize=16)
def compile_template(source: str) -> jinja2.Template:
    """Compiles a chat template in a sandbox, with the names that transformers defines for it.

    >>> compile_template("{% for m in messages %}{{ m.content }};{% endfor %}").render(
    ...     messages=[{"role": "user", "content": "hi"}])
    'hi;'
    """
    return sandbox().from_string(source)


def sandbox() -> jinja2.Environment:
    """The environment of a chat template."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationMarks, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals |= clock("")
    environment.globals["namespace"] = TemplateNamespace
    return environment


def render(
    source: str, variables: Mapping[str, Any], each: Sequence[Mapping[str, Any]], now: str = ""
) -> list[tuple[str, Spans]]:
    """Renders the template for each set of variables, added to the common ones: (text, spans).

    Args:
        source: Jinja.
        variables: those that all have.
        each: those of each rendering.
        now: the moment that the template takes for the present one, as of `clock`.

    >>> render("{% generation %}{{ x }}{% endgeneration %}", {}, [{"x": "ab"}])
    [('ab', [(0, 2)])]
    """
    template, common = compile_template(source), {**clock(now), **variables}
    return [rendered(template, {**common, **own}) for own in each]


def rendered(
    template: jinja2.Template,
    variables: Mapping[str, Any],
    watch: Callable[[list[str]], None] | None = None,
) -> tuple[str, Spans]:
    """(text, spans); the same for the same variables, also where the template draws lots.

    `watch` is given the list into which the parts of the text will be written.
    """
    random.seed(0)
    with template.environment.recording() as (blocks, spans):  # type: ignore[attr-defined]
        if watch is not None:
            watch(blocks)
        for block in template.generate(**variables):
            blocks.append(block)
    return "".join(blocks), spans
