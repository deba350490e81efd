"""Rows to token ids and which of them are trained."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxft.data.chat import (
    encode_chat_and_text,
    encode_chats_with_masks,
    silent_tokens,
    template_for,
)
from jaxft.data.defects import count_found, defects_of, nothing_left
from jaxft.data.lost import Lost, lost_lines
from jaxft.data.messages import is_silent
from jaxft.data.sources import Row, kind_of
from jaxft.data.store import Example as Example
from jaxft.data.store import Examples, Writer
from jaxft.data.tokenizer import Tokenizer
from jaxft.data.unwritten import LeftOut, Unwritten, conversation
from jaxft.errors import UserError, counted, nearest, worded
from jaxft.sequences import common_prefix_length

LOSS_ON = ("completion", "all")
COUNTS = (
    "rows", "dropped", "truncated", "tokens", "trained_tokens", "without_eos", "split", "pieces", "diverged",
    "empty",
)  # fmt: skip
CONVERSATIONS = 64  # rendered at once: the limits of time and memory hold for them together
CHUNK = 1024  # rows tokenized at once: enough for the tokenizer's threads


@dataclasses.dataclass(frozen=True)
class Summary:
    """What became of the rows; `str` is the line that the log shows.

    Attributes:
      format: the rows' format, or formats, as the sources have them.
      rows: read from the files.
      examples: kept.
      dropped: rows without any trained token, most because truncation cut it off.
      truncated: rows that were longer than `max_length` and lost their end, dropped ones included.
      tokens, trained_tokens: in the examples kept.
      longest: tokens in the longest row before truncation.
      without_eos: examples kept, not truncated, in which no EOS is trained.
      split: texts that were longer and stand in several pieces; their number is in `pieces`.
      diverged: rows whose prompt alone has other tokens than at the beginning of prompt and
        completion; the completion begins where they part.
      empty: rows whose completion, or a turn of the assistant's, is empty.
      first: the location of the first row that is truncated, dropped, diverged, empty, or has text unread.
      unused_keys: keys of the rows that the format does not use.
      kept: examples kept of each source, in their order.
      max_length: the limit.
      left_out: what the chat template leaves out of the conversations.
      lost: rows left out because the chat template's process has too little time or memory for them;
        `first_lost` is the first one's location.
    """

    format: str
    rows: int
    examples: int
    dropped: int
    truncated: int
    tokens: int
    trained_tokens: int
    longest: int
    without_eos: int
    split: int
    pieces: int
    diverged: int
    empty: int
    first: dict[str, str]
    unused_keys: tuple[str, ...]
    kept: tuple[int, ...]
    max_length: int
    left_out: tuple[LeftOut, ...] = ()
    lost: int = 0
    first_lost: str = ""

    def __str__(self) -> str:
        """One line; what did not occur is left out."""
        share = 100 * self.trained_tokens / max(self.tokens, 1)
        parts = [
            f"{counted(self.examples, 'example')} ({self.format})",
            f"{counted(self.tokens, 'token')}, {share:.1f} % trained",
            f"longest {self.longest}",
        ]
        if self.truncated:
            parts.append(f"{self.truncated} truncated to {self.max_length}")
        if self.split:
            parts.append(
                f"{counted(self.split, 'long text')} split into {counted(self.pieces, 'piece')} of up to "
                f"{self.max_length}"
            )
        if self.dropped:
            parts.append(f"{self.dropped} of {self.rows} dropped without a trained token")
        if self.without_eos:
            parts.append(f"{self.without_eos} {worded(self.without_eos, 'trains', 'train')} no EOS")
        if self.diverged:
            parts.append(f"{self.diverged} whose prompt's last tokens merge with the completion")
        if self.unused_keys:
            parts.append(f"keys not used: {', '.join(self.unused_keys)}")
        parts += map(str, self.left_out)
        parts += lost_lines(self.lost, self.first_lost)
        return "; ".join(parts)


def prepare_examples(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    loss_on: str,
    vocabulary_size: int | None = None,
    split_texts: bool = False,
    on_unwritten: str = "warn",
) -> tuple[Examples, Summary]:
    """Tokenizes rows by the rules of TRL's SFTTrainer (1.16).

    prompt_completion: prompt and completion are tokenized as one text, with an EOS at the end of
    strings that have none; the completion begins where the tokens of the prompt alone and of both
    part. messages: the assistant's tokens (see `encode_chat_with_mask`). text: everything, and EOS.
    Longer sequences keep their start.

    Departures: a BOS or EOS is never doubled, by the text and the tokenizer's post-processor; rows
    without a trained token are dropped under packing too.

    Args:
      rows: read once, from the first to the last.
      tokenizer: the model's.
      max_length: tokens kept of a row.
      loss_on: "completion" (completions, assistant's turns) or "all" (every token).
      split_texts: longer rows of the format text are split into pieces, and no token is lost.
      vocabulary_size: ids at or above it are an error; None skips the check.
      on_unwritten: "warn" counts what the chat template leaves out of conversations, "error" refuses it; all
        that the assistant says in a row is refused by both.

    Raises:
      UserError: an unknown `loss_on`, no EOS, an id outside of the vocabulary, a conversation that the chat
        template does not write, or no example left.
    """
    _check_arguments(max_length, loss_on)
    examples = Writer()
    counts: collections.Counter[str] = collections.Counter(dict.fromkeys(COUNTS, 0))
    sources = 0
    formats: dict[str, str] = {}  # each with the location of its first row
    unused: dict[str, None] = {}
    first: dict[str, str] = {}
    kept: collections.Counter[int] = collections.Counter()
    unwritten = Unwritten(on_unwritten, assistants_alone=loss_on == "completion")
    lost, asked = Lost(), (tokenizer, loss_on, max_length)
    for row, ids, trained, diverged, text in _tokenize(rows, lost, *asked):
        formats.setdefault(kind_of(row), row.origin)
        unused.update(dict.fromkeys(row.unused))
        parted = _compare(row, text, tokenizer, unwritten)
        sources = row.source + 1
        counts["rows"] += 1
        _check_ids(row, ids, vocabulary_size)
        split = split_texts and row.format == "text" and len(ids) > max_length
        examples.row_lengths.append(len(ids))
        truncated = len(ids) > max_length and not split
        count_found(counts, first, row, defects_of(row, diverged and not parted, truncated))
        pieces = _pieces(len(ids), max_length) if split else [slice(max_length)]
        counts["split"] += split
        counts["pieces"] += len(pieces) if split else 0
        for piece in pieces:
            example = _cut(row, ids[piece], trained[piece])
            targets = int(np.count_nonzero(example.trained))
            if not targets:
                count_found(counts, first, row, {"dropped": True})
                continue
            examples.append(example)
            kept[row.source] += 1
            counts.update(tokens=len(example.tokens), trained_tokens=targets)
            whole = len(ids) <= max_length or (split and piece == pieces[-1])
            counts["without_eos"] += whole and not _trains_any(example, tokenizer.eos_ids)
    counts.update(rows=lost.count, lost=lost.count)
    if not examples:
        raise lost.error or UserError(nothing_left(formats, counts, max_length, loss_on))
    return examples.examples(), Summary(
        format=" + ".join(formats),
        examples=len(examples),
        longest=max(examples.row_lengths),
        first=first,
        unused_keys=(*unused, *unwritten.keys),
        kept=tuple(kept[index] for index in range(sources)),
        max_length=max_length,
        left_out=unwritten.left_out,
        first_lost=lost.first,
        **counts,
    )


def _check_arguments(max_length: int, loss_on: str) -> None:
    if loss_on not in LOSS_ON:
        known = ", ".join(LOSS_ON)
        raise UserError(
            f"loss_on {loss_on!r} is unknown; known: {known}{nearest(loss_on, LOSS_ON)}"
        )
    if max_length < 2:
        raise UserError(f"max_length is {max_length}: a sequence needs 2 tokens to predict one")


def _compare(row: Row, texts: Texts | None, tokenizer: Tokenizer, unwritten: Unwritten) -> bool:
    """Notes what of the row's conversation, if it is one, does not stand in its text.

    Returns:
        Whether it goes on otherwise than its prompt alone.
    """
    if texts is None:
        return False
    text, asked = texts
    messages, first = conversation(row.values)
    tools = row.values.get("tools")
    template = template_for(tokenizer, tools)
    unwritten.note(row.origin, messages, text, template=template, tools=tools, first=first)
    return unwritten.note_asked(row.origin, asked, text)


def _cut(row: Row, ids: list[int], trained: np.ndarray) -> Example:
    """The example; its first token is no target."""
    marks = np.array(trained)
    marks[:1] = False
    return Example(np.asarray(ids, dtype=np.int32), marks, row.origin)


def _trains_any(example: Example, ids: tuple[int, ...]) -> bool:
    """Whether one of the ids is a target; most often the last token is."""
    if example.trained[-1] and int(example.tokens[-1]) in ids:
        return True
    return not set(ids).isdisjoint(example.tokens[example.trained].tolist())


def _pieces(length: int, max_length: int) -> list[slice]:
    """Where a long text is split: full pieces, and a last one of two tokens or more.

    >>> _pieces(9, 4)
    [slice(0, 4, None), slice(4, 7, None), slice(7, 9, None)]
    """
    edges = [*range(0, length, max_length), length]
    if length % max_length == 1:
        edges[-2] -= 1  # a token alone would be no target
    return [slice(*edge) for edge in itertools.pairwise(edges)]


Texts = tuple[str, str]  # what the chat template made of a conversation, and of its prompt alone
# ids, trained, whether the prompt parted, what the chat template made of it
Tokenized = tuple[Row, list[int], np.ndarray, bool, Texts | None]


def _tokenize(
    rows: Iterable[Row], lost: Lost, tokenizer: Tokenizer, loss_on: str, max_length: int
) -> Iterator[Tokenized]:
    """Tokenizes some rows at a time, so that no more of them are ever in memory."""
    rest = iter(rows)
    asked: dict[str, Any] = {"tokenizer": tokenizer, "loss_on": loss_on, "max_length": max_length}
    while chunk := list(itertools.islice(rest, CHUNK)):
        for _, alike in itertools.groupby(chunk, kind_of):
            group = list(alike)
            make = functools.partial(_TOKENIZERS[group[0].format], **asked)
            yield from lost.without(group, make)


def _prompt_completion(
    rows: Sequence[Row], tokenizer: Tokenizer, loss_on: str, max_length: int
) -> Iterator[Tokenized]:
    pairs = [(row.values["prompt"], row.values["completion"]) for row in rows]
    texts: list[Texts | None] = [None] * len(rows)
    if isinstance(pairs[0][0], list):
        prompts, wholes = [], []
        for index, row in enumerate(rows):
            with _told_of(row):
                tools, (messages, _) = row.values.get("tools"), conversation(row.values)
                whole, text = encode_chat_and_text(tokenizer, messages, tools=tools)
                wholes.append(whole)
                ids, asked = encode_chat_and_text(
                    tokenizer, row.values["prompt"], add_generation_prompt=True, tools=tools
                )
                prompts.append(ids)
                texts[index] = text, asked
    else:
        different = list(dict.fromkeys(prompt for prompt, _ in pairs))  # many share a prompt
        encoded = dict(zip(different, _encode(tokenizer, different), strict=True))
        prompts = [encoded[prompt] for prompt, _ in pairs]
        wholes = _encode(tokenizer, [p + _with_eos(tokenizer, c) for p, c in pairs])
    for row, prompt, whole, made in zip(rows, prompts, wholes, texts, strict=True):
        start = common_prefix_length(prompt, whole)
        trained = np.arange(len(whole)) >= (start if loss_on == "completion" else 0)
        with _told_of(row):
            trained = _heard(row, trained, tokenizer, loss_on, max_length)
        yield row, whole, trained, start < len(prompt), made


def _messages(
    rows: Sequence[Row], tokenizer: Tokenizer, loss_on: str, max_length: int
) -> Iterator[Tokenized]:
    for start in range(0, len(rows), CONVERSATIONS):
        some = rows[start : start + CONVERSATIONS]
        made = _conversations(some, tokenizer, loss_on, max_length)
        for row, (ids, said, text) in zip(some, made, strict=True):
            yield row, ids, said, False, (text, "")


def _conversations(
    rows: Sequence[Row], tokenizer: Tokenizer, loss_on: str, max_length: int
) -> Iterable[tuple[list[int], np.ndarray, str]]:
    """(ids, what is trained, text), of all at once; if one fails, one by one, to name it."""
    talks = [(row.values["messages"], row.values.get("tools")) for row in rows]
    if loss_on == "completion" and len(rows) > 1:
        try:
            yield from encode_chats_with_masks(tokenizer, talks, max_length)
            return
        except UserError:
            pass
    for row, (messages, tools) in zip(rows, talks, strict=True):
        with _told_of(row):
            if loss_on == "completion":
                yield encode_chats_with_masks(tokenizer, [(messages, tools)], max_length)[0]
            else:
                ids, text = encode_chat_and_text(tokenizer, messages, tools=tools)
                every = np.ones(len(ids), bool)
                yield ids, _heard(row, every, tokenizer, loss_on, max_length), text


def _heard(
    row: Row, trained: np.ndarray, tokenizer: Tokenizer, loss_on: str, max_length: int
) -> np.ndarray:
    """What is trained without the messages that weigh nothing."""
    if not isinstance(row.values.get("messages", row.values.get("prompt")), list):
        return trained
    messages, first = conversation(row.values)
    if not any(map(is_silent, messages[first if loss_on == "completion" else 0 :])):
        return trained
    tools = row.values.get("tools")
    return trained & ~silent_tokens(tokenizer, messages, tools=tools, max_length=max_length)


def _text(
    rows: Sequence[Row], tokenizer: Tokenizer, loss_on: str, max_length: int
) -> Iterator[Tokenized]:
    del loss_on, max_length  # a text is all completion
    texts = [_with_eos(tokenizer, row.values["text"]) for row in rows]
    for row, ids in zip(rows, _encode(tokenizer, texts), strict=True):
        yield row, ids, np.ones(len(ids), dtype=bool), False, None


_TOKENIZERS = {"prompt_completion": _prompt_completion, "messages": _messages, "text": _text}


def _with_eos(tokenizer: Tokenizer, text: str) -> str:
    eos = tokenizer.eos_text
    if eos is None:
        raise UserError(
            f"{tokenizer.name}: the tokenizer has no EOS token, so no example could end; "
            "name it as eos_token in tokenizer_config.json"
        )
    return text if text.endswith(eos) else text + eos


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids with what the post-processor puts before a text, without an EOS that it puts behind."""
    encoded = tokenizer.encode_all(texts)
    adds_eos = tokenizer.encode("a")[-1] == tokenizer.eos_id
    return [ids[:-1] for ids in encoded] if adds_eos else encoded


@contextlib.contextmanager
def _told_of(row: Row) -> Iterator[None]:
    """Puts the row's location before an error."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{row.origin}: {error}") from error


def _check_ids(row: Row, ids: list[int], vocabulary_size: int | None) -> None:
    if vocabulary_size is not None and ids and max(ids) >= vocabulary_size:
        raise UserError(
            f"{row.origin}: token id {max(ids)} is outside of the model's vocabulary of "
            f"{vocabulary_size}: the tokenizer is another model's"
        )
