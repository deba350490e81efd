"""Messages to token ids through a model's chat template, and which tokens the assistant says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxft.confined import render_conversations
from jaxft.data.tokenizer import Tokenizer, refusing_panics
from jaxft.errors import UserError

Messages = Sequence[dict[str, Any]]
Spans = list[tuple[int, int]]
Tools = Sequence[dict[str, Any]] | None
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of the same thing
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


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
    return _render_all(tokenizer, [(messages, add_generation_prompt)], tools)[0]


def _render_all(
    tokenizer: Tokenizer, conversations: Sequence[tuple[Messages, bool]], tools: Tools
) -> list[tuple[str, Spans]]:
    """`render` of several (messages, add_generation_prompt) at once."""
    if tokenizer.chat_template is None:
        raise UserError(
            f"{tokenizer.name}: the tokenizer has no chat template, which messages need; "
            "give one as config.data.chat_template"
        )
    own = [
        {
            "messages": [_as_written(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
        }
        for messages, add_generation_prompt in conversations
    ]
    shared = {"tools": tools or None, "documents": None} | tokenizer.special_tokens
    try:
        return render_conversations(template_for(tokenizer, tools), own, shared)
    except UserError as error:
        raise UserError(f"{tokenizer.name}: chat template fails: {error}") from error


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
    with refusing_panics(tokenizer.name):
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
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    beginnings = [(messages[:index], True) for index in turns]
    beginnings += [(messages[: index + 1], False) for index in turns]
    texts = [text for text, _ in _render_all(tokenizer, beginnings, tools)]
    eos, spans = tokenizer.special_tokens.get("eos_token", ""), []
    for index, before, through in zip(turns, texts[: len(turns)], texts[len(turns) :], strict=True):
        # Some templates close the whole conversation with an EOS.
        stem = through if text.startswith(through) else through.removesuffix(eos)
        if not (text.startswith(stem) and stem.startswith(before)):
            raise UserError(
                f"{tokenizer.name}: the chat template writes the messages before turn {index + 1} "
                "otherwise when more follows, so the assistant's tokens cannot be found; put its "
                "words between {% generation %} and {% endgeneration %}, take a template of jaxft "
                "(config.data.chat_template=chatml), or train on config.data.loss_on=all"
            )
        spans.append((len(before), len(stem)))
    return spans
