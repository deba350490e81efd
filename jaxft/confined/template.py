"""Chat templates in Jinja's sandbox, with the names that transformers defines for them."""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Spans = list[tuple[int, int]]


class GenerationMarks(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: notes which characters the assistant says.

    The places are those of transformers: a block begins where the text rendered before it ends.
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


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


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
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationMarks, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = TemplateNamespace
    return environment.from_string(source)


def render(
    source: str, variables: Mapping[str, Any], each: Sequence[Mapping[str, Any]]
) -> list[tuple[str, Spans]]:
    """Renders the template for each set of variables beside the common ones: (text, spans).

    >>> render("{% generation %}{{ x }}{% endgeneration %}", {}, [{"x": "ab"}])
    [('ab', [(0, 2)])]
    """
    template = compile_template(source)
    done = []
    for own in each:
        with template.environment.recording() as (blocks, spans):  # type: ignore[attr-defined]
            for block in template.generate(**variables, **own):
                blocks.append(block)
        done.append(("".join(blocks), spans))
    return done
