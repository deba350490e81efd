"""Messages to token ids through a model's chat template, and which tokens the assistant says."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from jaxft.data.dialect import as_taken
from jaxft.data.messages import REASONING, altered, is_silent
from jaxft.data.tokenizer import Tokenizer, refusing_panics
from jaxft.errors import UserError, counted
from jaxft.runtime.sandbox import assistant_turns, render_conversations
from jaxft.sequences import common_prefix_length

Messages = Sequence[dict[str, Any]]
Spans = list[tuple[int, int]]
Tools = Sequence[dict[str, Any]] | None
MARK = re.compile(r"\s*(<[^<>\s]+>|\[/?[A-Z_]+\])")
TOGETHER = 8  # conversations rendered at once where each is long
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# What keeps an assistant's turn from being told apart, in the words of `jaxft.runtime.sandbox.turns`, and the way out.
PROBLEMS = {
    "rewritten": "the chat template writes the messages up to turn {turn} otherwise when more follows ({alone!r} "
    "becomes {text!r}), so the assistant's tokens cannot be found; {mark}, {chatml}, or train on "
    "config.data.loss_on=all",
    "prompt": "the chat template asks for an answer by {prompt!r}, but writes turn {turn} as {text!r}: what is "
    "trained would not follow what is asked, and where the assistant's words begin cannot be found; let the "
    "template ask as it writes, {mark}, or {chatml}",
    "refused": "the chat template writes the conversation, but not its beginning before or up to turn {turn} alone "
    "({reason}), so the assistant's tokens cannot be found; {mark}, {chatml}, or train on config.data.loss_on=all",
    "first": "the conversation begins with the assistant, and the chat template writes no prompt for an answer "
    "before it ({text!r} begins the conversation, {prompt!r} asks for an answer), so the assistant's tokens cannot "
    "be found; put a user's turn first, {mark}, or {chatml}",
}
WAYS_OUT = {
    "mark": "put the assistant's words in it between {% generation %} and {% endgeneration %}",
    "chatml": "take a template of jaxft (config.data.chat_template=chatml)",
}


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
    return _render_all(tokenizer, [(messages, add_generation_prompt, tools)])[0]


Conversation = tuple[Messages, bool, Tools]  # messages, add_generation_prompt, tools


def _render_all(
    tokenizer: Tokenizer, conversations: Sequence[Conversation]
) -> list[tuple[str, Spans]]:
    """`render` of several conversations at once; one that fails makes all fail."""
    return _asked(tokenizer, conversations, render_conversations)


def _asked(
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    ask: Callable[..., list[Any]],
    **each: Sequence[Any],
) -> list[Any]:
    """What the sandbox makes of the conversations, of those by one template at once."""
    if tokenizer.chat_template is None:
        raise UserError(
            f"{tokenizer.name}: the tokenizer has no chat template, which messages need; "
            "give one as config.data.chat_template"
        )
    by_template: dict[str, list[int]] = {}
    for index, (_, _, tools) in enumerate(conversations):
        by_template.setdefault(template_for(tokenizer, tools), []).append(index)
    answers: dict[int, Any] = {}
    shared = {"documents": None} | tokenizer.special_tokens
    for template, indices in by_template.items():
        own = [_variables(*conversations[index]) for index in indices]
        further = {name: [values[i] for i in indices] for name, values in each.items()}
        try:
            for variables in own:
                variables["messages"] = as_taken(variables["messages"], template, shared)
            found = ask(template, own, shared, now=tokenizer.date, **further)
        except UserError as error:
            line = f"{tokenizer.name}: chat template fails: {error}{_spoken_first(own)}"
            raise type(error)(line) from error
        answers |= dict(zip(indices, found, strict=True))
    return [answers[index] for index in range(len(conversations))]


def _spoken_first(conversations: Sequence[Mapping[str, Any]]) -> str:
    """What may be the reason why a template refuses a conversation: many want the user to begin."""
    turns = [m for m in conversations[0]["messages"] if m["role"] not in ("system", "developer")]
    if len(conversations) > 1 or not turns or turns[0]["role"] != "assistant":
        return ""
    return f" (the conversation begins with the assistant: put a user's turn first, or {WAYS_OUT['chatml']})"


def _variables(messages: Messages, add_generation_prompt: bool, tools: Tools) -> dict[str, Any]:
    return {
        "messages": [_as_written(message) for message in messages],
        "add_generation_prompt": add_generation_prompt,
        "tools": tools or None,
    }


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
    return encode_chat_and_text(
        tokenizer, messages, add_generation_prompt=add_generation_prompt, tools=tools
    )[0]


def encode_chat_and_text(
    tokenizer: Tokenizer,
    messages: Messages,
    *,
    add_generation_prompt: bool = False,
    tools: Tools = None,
) -> tuple[list[int], str]:
    """`encode_chat`, and the text."""
    text, _ = render(tokenizer, messages, add_generation_prompt=add_generation_prompt, tools=tools)
    return tokenizer.encode(text, add_special_tokens=False), text


def encode_chat_with_mask(
    tokenizer: Tokenizer, messages: Messages, *, tools: Tools = None, max_length: int | None = None
) -> tuple[list[int], np.ndarray]:
    """Ids of a conversation and which of them the assistant says, bool (length,).

    Exact where the template has `{% generation %}` blocks (then equal to transformers'
    `apply_chat_template(..., return_assistant_tokens_mask=True)`). Otherwise an assistant's turn is
    what the text grows by when its message is added to the conversation before it; such a turn ends
    with its last EOS, if it has one, because a model says nothing after that.

    Args:
      tokenizer: with the template.
      messages: the conversation.
      tools: the functions that the assistant may call.
      max_length: turns that begin behind so many tokens need not be found; None: all are.

    Raises:
      UserError: the turns of a template without blocks cannot be told apart, as `PROBLEMS` says.
    """
    return encode_chats_with_masks(tokenizer, [(messages, tools)], max_length)[0][:2]


def encode_chats_with_masks(
    tokenizer: Tokenizer,
    conversations: Sequence[tuple[Messages, Tools]],
    max_length: int | None = None,
) -> list[tuple[list[int], np.ndarray, str]]:
    """`encode_chat_with_mask` of several (messages, tools), and their texts; one that fails makes all fail."""
    wholes = [(messages, False, tools) for messages, tools in conversations]
    texts, spans = zip(*_render_all(tokenizer, wholes), strict=True)
    with refusing_panics(tokenizer.name):
        encodings = tokenizer.backend.encode_batch(list(texts), add_special_tokens=False)
    templates = [template_for(tokenizer, tools) for _, tools in conversations]
    marked = [GENERATION.search(template) is not None for template in templates]
    grown = [index for index, has_marks in enumerate(marked) if not has_marks]
    limits = [_reach(encodings[index], max_length) for index in grown]
    found = _spans_by_growth(tokenizer, [wholes[index] for index in grown], limits)
    spans_of = dict(enumerate(spans)) | dict(zip(grown, found, strict=True))
    for index, (messages, tools) in enumerate(conversations):
        if any(map(is_silent, messages)):
            spans_of[index] = _heard(
                tokenizer, messages, spans_of[index], marked=marked[index], tools=tools
            )
    return [
        (
            *_ids_and_mask(encoding, spans_of[index], () if marked[index] else tokenizer.eos_ids),
            texts[index],
        )
        for index, encoding in enumerate(encodings)
    ]


def _reach(encoding: tokenizers.Encoding, max_length: int | None) -> int | None:
    """The character behind the first `max_length` tokens; None if there are no more tokens."""
    if max_length is None or len(encoding) <= max_length:
        return None
    return max(end for _, end in encoding.offsets[:max_length])


def _heard(
    tokenizer: Tokenizer, messages: Messages, spans: Spans, *, marked: bool, tools: Tools
) -> Spans:
    """The assistant's spans without those of messages that are not to be trained (`weight: 0`).

    A template may mark several parts of a message, or none: the marks of each beginning of the conversation tell.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not marked or len(spans) == len(turns):
        return [
            span for turn, span in zip(turns, spans, strict=False) if not is_silent(messages[turn])
        ]
    beginnings = [(messages[: turn + 1], False, tools) for turn in turns]
    counts = [len(marks) for _, marks in _render_all(tokenizer, beginnings)]
    edges = list(itertools.pairwise([0, *counts]))
    if counts[-1:] != [len(spans)] or any(end < start for start, end in edges):
        raise UserError(
            f"{tokenizer.name}: the chat template marks {counted(len(spans), 'part')} of "
            f"{counted(len(turns), 'turn')}, so a "
            "message's own weight cannot be honoured; leave the weight out, or take a template of jaxft "
            "(config.data.chat_template=chatml)"
        )
    return [
        span
        for turn, edge in zip(turns, edges, strict=True)
        if not is_silent(messages[turn])
        for span in spans[slice(*edge)]
    ]


def silent_tokens(
    tokenizer: Tokenizer, messages: Messages, *, tools: Tools = None, max_length: int | None = None
) -> np.ndarray:
    """Which of a conversation's ids are of messages that are not to be trained (`weight: 0`), bool (length,).

    A message stands where the text changes when it says something else; an EOS behind it is its own. Those that begin
    behind `max_length` tokens need not be found: each costs a rendering of the whole conversation.
    """
    text, _ = render(tokenizer, messages, tools=tools)
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    reach = _reach(encoding, max_length)
    silent = [index for index, message in enumerate(messages) if is_silent(message)]
    spans = Spans()
    for start in range(0, len(silent), TOGETHER):
        some = silent[start : start + TOGETHER]
        others = [[*messages[:i], altered(messages[i]), *messages[i + 1 :]] for i in some]
        changed = _render_all(tokenizer, [(talk, False, tools) for talk in others])
        spans += [_difference(text, other) for other, _ in changed]
        if reach is not None and spans[-1][0] > reach:
            break
    ids, mask = _ids_and_mask(encoding, spans, ())
    ends = np.flatnonzero(mask[:-1] & ~mask[1:]) + 1
    mask[[end for end in ends if ids[end] in tokenizer.eos_ids]] = True
    return mask


def _difference(text: str, other: str) -> tuple[int, int]:
    """The characters of the text that another does not have at their index.

    >>> _difference("a long way", "a short way")
    (2, 6)
    """
    start = common_prefix_length(text, other)
    return start, len(text) - common_prefix_length(text[start:][::-1], other[start:][::-1])


def _ids_and_mask(
    encoding: tokenizers.Encoding, spans: Spans, eos_ids: tuple[int, ...]
) -> tuple[list[int], np.ndarray]:
    """The ids, and which lie in the spans; a span ends with the last of `eos_ids` in it, if there is one."""
    ids = encoding.ids
    mask = np.zeros(len(ids), dtype=bool)
    for start, end in spans:
        tokens_at = (
            [encoding.char_to_token(at) for at in (start, end - 1)] if end > start else [None]
        )
        if None in tokens_at:
            tokens_at = [encoding.char_to_token(at) for at in range(start, end)]
        inside = [index for index in tokens_at if index is not None]
        if inside:
            first, last = min(inside), max(inside)
            mask[first : _last_eos(ids, first, last, eos_ids) + 1] = True
    return ids, mask


def _last_eos(ids: list[int], first: int, last: int, eos_ids: tuple[int, ...]) -> int:
    """Index of the last EOS in ids[first : last + 1]; `last` if there is none."""
    return next((i for i in range(last, first - 1, -1) if ids[i] in eos_ids), last)


def _spans_by_growth(
    tokenizer: Tokenizer, wholes: Sequence[Conversation], limits: Sequence[int | None]
) -> list[Spans]:
    """Characters of each assistant's turn, by rendering the conversations' beginnings; see `PROBLEMS`."""
    eos = tokenizer.special_tokens.get("eos_token", "")
    ask = functools.partial(assistant_turns, eos=eos)
    spans = list[Spans]()
    for found in _asked(tokenizer, wholes, ask, limits=limits):
        if "problem" in found:
            told = PROBLEMS[found["problem"]].format(**found, **WAYS_OUT)
            raise UserError(f"{tokenizer.name}: {told}")
        spans.append([(start, end) for start, end in found["spans"]])
    return spans


class Ending(NamedTuple):
    """How an assistant's turn ends: by one of these tokens, or by this text where it is no token."""

    ids: tuple[int, ...] = ()
    text: str = ""


def end_of_turn(tokenizer: Tokenizer) -> Ending:
    """What the template writes behind the assistant's last words, where that is no EOS of the tokenizer.

    A model that was trained on such turns says it, and then whatever comes. Only a mark counts, such as <|im_end|>
    or [/INST]: other text may stand inside of an answer.
    """
    said = "jaxft"  # a word that no template writes
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": said}]
    try:
        text, _ = render(tokenizer, turns)
    except UserError:  # it wants other turns than these
        return Ending()
    mark = MARK.match(text.rpartition(said)[2])
    if mark is None:
        return Ending()
    number = tokenizer.backend.token_to_id(mark[1])
    if number is None:
        return Ending(text=mark[1])
    return Ending() if number in tokenizer.eos_ids else Ending(ids=(number,))
