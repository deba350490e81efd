"""Messages to token ids through a model's chat template, and which tokens the assistant says."""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxft.data.tokenizer import Tokenizer
from jaxft.errors import UserError

Messages = Sequence[dict[str, Any]]
Spans = list[tuple[int, int]]
Tools = Sequence[dict[str, Any]] | None
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of the same thing
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


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
    tokenizer: Tokenizer,
    messages: Messages,
    *,
    add_generation_prompt: bool = False,
    tools: Tools = None,
) -> tuple[str, Spans]:
    """The text of a conversation, and the (start, end) characters inside `{% generation %}`.

    Args:
      tokenizer: with the template; that for tools is taken where there are tools.
      messages: the conversation.
      add_generation_prompt: end with the beginning of an assistant's turn.
      tools: the functions that the assistant may call, as JSON schemas.

    Raises:
      UserError: the tokenizer has no template, or the template fails.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            f"{tokenizer.name}: the tokenizer has no chat template, which messages need; "
            "give one as config.data.chat_template"
        )
    try:
        template = compile_template(template_for(tokenizer, tools))
        with template.environment.recording() as (blocks, spans):  # type: ignore[attr-defined]
            for block in template.generate(
                messages=[_as_written(message) for message in messages],
                tools=tools or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **tokenizer.special_tokens,
            ):
                blocks.append(block)
        return "".join(blocks), spans
    except Exception as error:  # a template can raise anything: it is the user's file, not code
        place = f" line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{tokenizer.name}: chat template{place} fails: {reason}") from error


def template_for(tokenizer: Tokenizer, tools: Tools) -> str:
    """The source of the template that a conversation with these tools is written by."""
    return str((tools and tokenizer.tool_template) or tokenizer.chat_template)


def _as_written(message: dict[str, Any]) -> dict[str, Any]:
    """The message as transformers hands it on: without nulls, and reasoning under each of its names."""
    present = {key: value for key, value in message.items() if value is not None}
    reasoning = next((present[key] for key in REASONING if key in present), None)
    if reasoning is None:
        return present
    return {"thinking": reasoning, **present, "reasoning_content": reasoning}


def encode_chat(
    tokenizer: Tokenizer,
    messages: Messages,
    *,
    add_generation_prompt: bool = False,
    tools: Tools = None,
) -> list[int]:
    """Ids of a conversation. No BOS is added to the one that the template writes."""
    text, _ = render(tokenizer, messages, add_generation_prompt=add_generation_prompt, tools=tools)
    return tokenizer.encode(text, add_special_tokens=False)


def encode_chat_with_mask(
    tokenizer: Tokenizer, messages: Messages, *, tools: Tools = None
) -> tuple[list[int], np.ndarray]:
    """Ids of a conversation and which of them the assistant says, bool (length,).

    Exact where the template has `{% generation %}` blocks (then equal to transformers'
    `apply_chat_template(..., return_assistant_tokens_mask=True)`). Otherwise an assistant's turn is
    what the text grows by when its message is added to the conversation before it; such a turn ends
    with its last EOS, if it has one, because a model says nothing after that.

    Raises:
      UserError: a template without blocks renders the beginning of a conversation otherwise when
        more follows, so that its turns cannot be told apart.
    """
    text, spans = render(tokenizer, messages, tools=tools)
    marked = GENERATION.search(template_for(tokenizer, tools)) is not None
    if not marked:
        spans = _spans_by_growth(tokenizer, messages, text, tools)
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    mask = np.zeros(len(encoding.ids), dtype=bool)
    for start, end in spans:
        places = [encoding.char_to_token(at) for at in (start, end - 1)] if end > start else [None]
        if None in places:
            places = [encoding.char_to_token(at) for at in range(start, end)]
        inside = [place for place in places if place is not None]
        if not inside:
            continue
        first, last = min(inside), max(inside)
        if not marked:
            last = _last_eos(encoding.ids, first, last, tokenizer.eos_ids)
        mask[first : last + 1] = True
    return encoding.ids, mask


def _last_eos(ids: list[int], first: int, last: int, eos_ids: tuple[int, ...]) -> int:
    """Index of the last EOS in ids[first : last + 1]; `last` if there is none."""
    return next((i for i in range(last, first - 1, -1) if ids[i] in eos_ids), last)


def _spans_by_growth(tokenizer: Tokenizer, messages: Messages, text: str, tools: Tools) -> Spans:
    """Characters of each assistant's turn in `text`, by rendering the conversation's beginnings."""
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, _ = render(tokenizer, messages[:index], add_generation_prompt=True, tools=tools)
        through, _ = render(tokenizer, messages[: index + 1], tools=tools)
        if not (text.startswith(through) and through.startswith(before)):
            raise UserError(
                f"{tokenizer.name}: the chat template writes the messages before turn {index + 1} "
                "otherwise when more follows, so the assistant's tokens cannot be found; put its "
                "words between {% generation %} and {% endgeneration %}, or train on "
                "config.data.loss_on=all"
            )
        spans.append((len(before), len(through)))
    return spans
