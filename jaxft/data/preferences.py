"""Rows of preferences to token ids: a prompt once, and its two completions behind it."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from jaxft.data.chat import encode_chat_and_text, template_for
from jaxft.data.examples import (
    _check_ids,
    _encode,
    _told_of,
    _with_eos,
)
from jaxft.data.lost import Lost, lost_lines
from jaxft.data.messages import is_silent
from jaxft.data.packing import Batch, collate
from jaxft.data.sources import Row, unused_keys
from jaxft.data.store import Example, Examples
from jaxft.data.tokenizer import Tokenizer
from jaxft.data.unwritten import LeftOut, Unwritten, conversation
from jaxft.errors import UserError, counted, worded
from jaxft.sequences import common_prefix_length

Ids = list[int]


@dataclasses.dataclass(frozen=True)
class Comparison(Example):
    """A pair as it stands in a row: see `jaxft.objectives.pairs`.

    Attributes:
        segments: 1, or 1 and 2 where the prompt is written twice.
        positions: of each token in its sequence.
        branches: 0 the shared beginning, 1 the chosen completion, 2 the rejected one.
        label: KTO: 1.0 if the chosen completion is desirable, and 0.0; the rejected one is of another prompt.
        index: its index among the examples.
        reference: the reference's log-probabilities of both completions, if they are known.
    """

    segments: Int32[np.ndarray, " length"]
    positions: Int32[np.ndarray, " length"]
    branches: Int32[np.ndarray, " length"]
    label: float = 1.0
    index: int = 0
    reference: tuple[float, float] | None = None


class Comparisons(Examples):
    """Pairs as `Examples`: what `Batches` takes, an object for each pair."""

    def __init__(self, pairs: Sequence[Comparison]) -> None:
        flat = Examples.of(list(pairs))
        index = (flat.lengths, flat.source, flat.lines, flat.sources, flat.row_lengths)
        super().__init__(flat.tokens, flat.trained, *index)
        self._pairs = list(pairs)

    def __getitem__(self, index: Any) -> Any:
        """The pair, or a list of those in a slice."""
        return self._pairs[index]

    def pairs(self) -> list[Comparison]:
        """All of them."""
        return list(self._pairs)

    @property
    def known(self) -> bool:
        """Whether they have the reference's log-probabilities."""
        return all(pair.reference is not None for pair in self._pairs)


@dataclasses.dataclass(frozen=True)
class PreferenceSummary:
    """What became of the rows; `str` is the line that the log shows.

    Attributes:
        judged: whether they are completions with a label, and not pairs.
        layouts: the keys that they were read from, where these are other ones.
        rows: usable ones that were read.
        examples: kept.
        skipped: rows left out because they cannot be used, on request.
        truncated: kept, but with a prompt that lost its beginning; `first_truncated` is the first one's location.
        dropped: rows whose completions leave no room for a prompt; `first_dropped` the same.
        tokens: in the rows; `separate_tokens`: if each completion had its prompt before it.
        longest: tokens of the longest prompt and completion before truncation.
        max_length: the limit.
        unused_keys: keys of the rows that are not used.
        left_out: what the chat template leaves out of the conversations.
        lost: rows left out because the chat template's process has too little time or memory for them;
            `first_lost` is the first one's location.
    """

    judged: bool
    layouts: tuple[str, ...]
    rows: int
    examples: int
    skipped: int
    truncated: int
    first_truncated: str
    dropped: int
    first_dropped: str
    tokens: int
    separate_tokens: int
    longest: int
    max_length: int
    unused_keys: tuple[str, ...]
    left_out: tuple[LeftOut, ...] = ()
    lost: int = 0
    first_lost: str = ""

    def __str__(self) -> str:
        """One line; what did not occur is left out."""
        saved = 100 * (1 - self.tokens / max(self.separate_tokens, 1))
        kind = "judged completion" if self.judged else "pair"
        read = f" ({'; '.join(self.layouts)})" if self.layouts else ""
        parts = [f"{counted(self.examples, kind)}{read}", counted(self.tokens, "token")]
        if self.tokens < self.separate_tokens:
            parts.append(f"shared prompts save {saved:.1f} % of {self.separate_tokens}")
        parts.append(f"longest {self.longest}")
        if self.truncated:
            parts.append(
                f"{counted(self.truncated, 'prompt')} lost {worded(self.truncated, 'its', 'their')} beginning to fit "
                f"max_length={self.max_length}, "
                f"the first at {self.first_truncated}"
            )
        if self.dropped:
            parts.append(
                f"{self.dropped} dropped whose completions alone exceed it, the first at {self.first_dropped}"
            )
        if self.skipped:
            parts.append(f"{counted(self.skipped, 'unusable row')} skipped")
        if self.unused_keys:
            parts.append(f"keys not used: {', '.join(self.unused_keys)}")
        parts += map(str, self.left_out)
        parts += lost_lines(self.lost, self.first_lost)
        return "; ".join(parts)


def prepare_preferences(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    share: bool,
    skip: bool,
    skipped: int,
    group: int,
    on_unwritten: str = "warn",
    vocabulary_size: int | None = None,
) -> tuple[Comparisons, PreferenceSummary]:
    """Tokenizes rows by the rules of TRL's DPOTrainer and KTOTrainer (1.16).

    Prompt and completion are tokenized as one, with an EOS at the end of strings that have none; completions begin
    where the tokens of the prompt alone and of both part, for chosen and rejected the earlier of the two indices.
    KTO's completion is compared with that of the example before it, in groups of `group` rows, in a circle.

    Departures: completions are whole, and what exceeds `max_length` is taken from the prompt's beginning (TRL cuts
    the completion's end); with KTO a mismatched completion that does not fit behind the prompt loses its end.

    Args:
        rows: as `read_preferences` gives them.
        tokenizer: the model's.
        max_length: tokens of a prompt with a completion.
        share: write the prompt of a pair once.
        skip: leave out rows whose prompt alone exceeds `max_length`; else it is cut.
        skipped: rows left out before.
        group: rows among which KTO's completions are exchanged.
        on_unwritten: as of `prepare_examples`.
        vocabulary_size: ids at or above it are an error; None skips the check.

    Raises:
        UserError: no EOS, an id outside of the vocabulary, or no example left.
    """
    examples: list[Comparison] = []
    counts: collections.Counter[str] = collections.Counter(skipped=skipped)
    first: dict[str, str] = {}
    longest = 0
    judged = rows[0].format == "judged"
    unwritten, lost = Unwritten(on_unwritten), Lost()
    make = functools.partial(_tokenized, tokenizer=tokenizer, unwritten=unwritten, group=group)
    for row, prompt, chosen, rejected in lost.without(rows, make):
        _check_ids(row, prompt + chosen + rejected, vocabulary_size)
        must_fit = len(chosen) if judged else max(len(chosen), len(rejected))
        longest = max(longest, len(prompt) + must_fit)
        if skip and len(prompt) >= max_length:
            counts["skipped"] += 1
            continue
        room = max_length - must_fit
        if room < min(len(prompt), 1):
            counts["dropped"] += 1
            first.setdefault("dropped", row.origin)
            continue
        if len(prompt) > room:
            counts["truncated"] += 1
            first.setdefault("truncated", row.origin)
            prompt = prompt[len(prompt) - room :]
        label = float(row.values["label"]) if judged else 1.0
        rejected = rejected[: max_length - len(prompt)]
        example = comparison(prompt, chosen, rejected, origin=row.origin, share=share)
        examples.append(dataclasses.replace(example, label=label, index=len(examples)))
        counts["tokens"] += len(examples[-1].tokens)
        counts["separate_tokens"] += 2 * len(prompt) + len(chosen) + len(rejected)
    if not examples:
        none = f"{rows[0].origin}: none of {counted(len(rows), 'row')} fits max_length={max_length}"
        raise lost.error or UserError(f"{none}: the completions alone exceed it")
    return Comparisons(examples), PreferenceSummary(
        judged=judged,
        layouts=tuple(dict.fromkeys(row.written for row in rows if row.written)),
        rows=len(rows),
        examples=len(examples),
        **{key: counts[key] for key in ("skipped", "truncated", "dropped", "tokens", "separate_tokens")},
        first_truncated=first.get("truncated", ""),
        first_dropped=first.get("dropped", ""),
        longest=longest,
        lost=lost.count,
        first_lost=lost.first,
        max_length=max_length,
        unused_keys=(*unused_keys(rows), *unwritten.keys),
        left_out=unwritten.left_out,
    )  # fmt: skip


def comparison(
    prompt: Ids,
    chosen: Ids,
    rejected: Ids,
    *,
    origin: str,
    share: bool = True,
) -> Comparison:
    """The pair as one run of tokens, so that every trained token stands behind the one that predicts it.

    Shared: prompt[:-1], prompt[-1:] + chosen, prompt[-1:] + rejected. Else prompt + chosen, prompt + rejected, two
    segments.
    """
    split = max(len(prompt) - 1, 0) if share else 0
    start, last = prompt[:split], prompt[split:]
    lengths = [split, len(last) + len(chosen), len(last) + len(rejected)]
    positions = [np.arange(split), *(split + np.arange(length) for length in lengths[1:])]
    trained = [np.arange(length) >= len(last) for length in lengths[1:]]
    segments = np.repeat([1, 1, 1] if share else [1, 1, 2], lengths)
    whole = np.concatenate(positions)
    return Comparison(
        tokens=np.asarray([*start, *last, *chosen, *last, *rejected], np.int32),
        trained=np.concatenate([np.zeros(split, bool), *trained]) & (whole > 0),
        origin=origin,
        segments=segments.astype(np.int32),
        positions=whole.astype(np.int32),
        branches=np.repeat([0, 1, 2], lengths).astype(np.int32),
    )


Tokenized = Iterator[tuple[Row, Ids, Ids, Ids]]  # prompt, chosen, rejected


def _tokenized(
    rows: Sequence[Row], tokenizer: Tokenizer, unwritten: Unwritten, group: int
) -> Tokenized:
    judged = rows[0].format == "judged"
    settings = (rows, tokenizer, unwritten)
    return _judged(*settings, group) if judged else _pairs(*settings)


def _pairs(rows: Sequence[Row], tokenizer: Tokenizer, unwritten: Unwritten) -> Tokenized:
    prompts, chosen = _both(rows, tokenizer, "chosen", unwritten)
    _, rejected = _both(rows, tokenizer, "rejected", unwritten)
    for row, prompt, left, right in zip(rows, prompts, chosen, rejected, strict=True):
        start = min(common_prefix_length(prompt, left), common_prefix_length(prompt, right))
        yield row, prompt[:start], left[start:], right[start:]


def _judged(
    rows: Sequence[Row], tokenizer: Tokenizer, unwritten: Unwritten, group: int
) -> Tokenized:
    prompts, wholes = _both(rows, tokenizer, "completion", unwritten)
    starts = [common_prefix_length(*both) for both in zip(prompts, wholes, strict=True)]
    completions = [whole[start:] for start, whole in zip(starts, wholes, strict=True)]
    for index, row in enumerate(rows):
        first = index - index % group
        last = min(first + group, len(rows)) - 1
        other = completions[index - 1 if index > first else last]
        yield row, prompts[index][: starts[index]], completions[index], other


def _both(
    rows: Sequence[Row], tokenizer: Tokenizer, key: str, unwritten: Unwritten
) -> tuple[list[Ids], list[Ids]]:
    """Ids of the prompts alone, and of prompt and completion; notes what of these is not written."""
    texts = [row.values for row in rows if isinstance(row.values["prompt"], str)]
    encoded = iter(_encode(tokenizer, [text["prompt"] for text in texts]))
    whole = iter(
        _encode(tokenizer, [text["prompt"] + _with_eos(tokenizer, text[key]) for text in texts])
    )
    prompts, wholes = [], []
    for row in rows:
        prompt, completion = row.values["prompt"], row.values[key]
        if isinstance(prompt, str):
            prompts.append(next(encoded))
            wholes.append(next(whole))
            continue
        with _told_of(row):
            if any(map(is_silent, completion)):
                raise UserError(
                    f"{key} has a message of weight 0, and a completion is compared whole: put the "
                    "messages before it into the prompt, or leave the weight out"
                )
            tools = row.values.get("tools")
            asked, before = encode_chat_and_text(
                tokenizer, prompt, add_generation_prompt=True, tools=tools
            )
            prompts.append(asked)
            messages, first = conversation(row.values, key)
            ids, text = encode_chat_and_text(tokenizer, messages, tools=tools)
            wholes.append(ids)
        template = template_for(tokenizer, tools)
        unwritten.note(row.origin, messages, text, template=template, tools=tools, first=first)
        unwritten.note_asked(row.origin, before, text)
    return prompts, wholes


def collate_comparisons(
    rows: Sequence[Sequence[Comparison]],
    *,
    batch_size: int,
    length: int,
    pad_id: int,
    slots: int,
    known: bool = False,
) -> Batch:
    """`collate` with what a preference loss needs; `slots` is how many pairs a row has room for.

    Beside the arrays of `collate` there are branches and pairs (the pair's number in its row, from 1), int32 (batch,
    length), and of (batch, slots): present and labels float32, index int32, and, if they are `known`, the
    reference's log-probabilities float32 (batch, slots, 2).
    """
    batch = collate(rows, batch_size=batch_size, length=length, pad_id=pad_id)
    shape = (batch_size, slots)
    branches, pairs = np.zeros((2, batch_size, length), np.int32)
    present, labels = np.zeros((2, *shape), np.float32)
    index = np.full(shape, -1, np.int32)
    reference = np.zeros((*shape, 2), np.float32)
    for number, row in enumerate(rows):
        start, before = 0, 0
        for slot, example in enumerate(row):
            part = (number, slice(start, start + len(example.tokens)))
            batch["segments"][part] = before + example.segments
            batch["positions"][part] = example.positions
            batch["weights"][part] = example.trained
            branches[part], pairs[part] = example.branches, slot + 1
            present[number, slot], labels[number, slot] = 1.0, example.label
            index[number, slot] = example.index
            reference[number, slot] = example.reference or 0.0
            start, before = start + len(example.tokens), before + int(example.segments[-1])
    batch |= {"branches": branches, "pairs": pairs, "present": present, "labels": labels}
    return batch | {"index": index} | ({"reference": reference} if known else {})
