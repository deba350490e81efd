"""What a careful colleague says of the examples before anybody trains on them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, UInt64

from jaxft.data import remedies
from jaxft.data.examples import Summary
from jaxft.data.sources import Row
from jaxft.data.store import Examples
from jaxft.data.tokenizer import Tokenizer
from jaxft.data.unread import unread_words
from jaxft.data.unwritten import told_left_out

BLOCK = 2**22  # tokens that are looked at together


@dataclasses.dataclass(frozen=True)
class Part:
    """The training or the held-out data.

    Attributes:
      name: "training data".
      rows: as they stand in the files, to be gone through once more.
      examples: what became of them.
      summary: their counts.
    """

    name: str
    rows: Iterable[Row]
    examples: Examples
    summary: Summary


def tokens_by_source(examples: Examples) -> list[tuple[str, int, int, int]]:
    """(source, examples, tokens, trained tokens) of each source of examples.

    >>> from jaxft.data.store import Example
    >>> tokens_by_source(Examples.of([Example(np.arange(3), np.arange(3) > 1, "a.jsonl:1")]))
    [('a.jsonl', 1, 3, 1)]
    """
    trained = np.add.reduceat(examples.trained, examples.starts, dtype=np.int64)
    columns = [
        np.bincount(examples.source, weights, len(examples.sources)).astype(int).tolist()
        for weights in (None, examples.lengths, trained)
    ]
    return list(zip(examples.sources, *columns, strict=True))


def findings(part: Part, tokenizer: Tokenizer, vocabulary: int) -> list[str]:
    """A line for each thing about one part of the data that its owner should know; none if all is well.

    Each says of how many rows, which is the first, and what to do about it.
    """
    summary, examples = part.summary, part.examples
    lines = []
    if summary.truncated:
        lines.append(
            f"{share_of(summary.truncated, summary.rows)} rows are longer than max_length "
            f"{summary.max_length} and lose their end (the longest has {summary.longest} tokens; "
            f"first: {summary.first['truncated']}): {remedies.LONGER}"
        )
    if summary.dropped:
        lines.append(
            f"{share_of(summary.dropped, summary.rows)} rows are dropped: they have no trained token "
            f"(first: {summary.first['dropped']}): {remedies.UNTRAINED}"
        )
    endless = _without_eos(examples, tokenizer, summary)
    how = remedies.ending(tokenizer, examples[endless[0]]) if endless else ""
    lines += told("train no EOS, so the model does not learn to stop", endless, examples, how)
    doubled = _doubled_bos(examples, tokenizer)
    lines += told("begin with two BOS", doubled, examples, remedies.DOUBLED)
    lines += beyond(examples, vocabulary)
    if summary.empty:
        lines.append(
            f"{share_of(summary.empty, summary.rows)} rows have an empty completion "
            f"(first: {summary.first['empty']}): {remedies.EMPTY}"
        )
    if "unread" in summary.first:
        lines += unread_lines(part.rows, summary.rows)
    lines += duplicates(examples)
    if summary.diverged:
        lines.append(
            f"{share_of(summary.diverged, summary.rows)} prompts have other tokens alone than before their completion "
            f"(first: {summary.first['diverged']}): {remedies.SPACE}"
        )
    if summary.unused_keys:
        lines.append(f"keys of the rows that are not used: {', '.join(summary.unused_keys)}")
    lines += told_left_out(summary.left_out, summary.rows)
    return lines


def unread_lines(rows: Iterable[Row], count: int) -> list[str]:
    """A line about keys that look like text of the example and are not used."""
    with_text = [row for row in rows if row.unread]
    if not with_text:
        return []
    keys = tuple(dict.fromkeys(key for row in with_text for key in row.unread))
    share = share_of(len(with_text), count)
    return [
        f"{share} rows have {unread_words(keys)}; train refuses them (first: {with_text[0].origin})"
    ]


def overlap(train: Examples, held_out: Examples) -> list[str]:
    """Lines about held-out examples, and held-out prompts, that stand in the training data as well."""
    same = np.isin(_digests(held_out), _digests(train))
    starts = [_prompt_ends(examples) for examples in (train, held_out)]
    known, asked = (
        _digests(examples, ends)[
            ends > 1
        ]  # more than the first token stands before the first target
        for examples, ends in zip((train, held_out), starts, strict=True)
    )
    prompts = np.zeros(len(held_out), bool)
    prompts[starts[1] > 1] = np.isin(asked, known)
    lines = told(
        "stand in the training data as well",
        np.flatnonzero(same).tolist(),
        held_out,
        remedies.HELD_OUT,
    )
    what = "have a prompt that the training data has with another completion"
    return lines + told(
        what, np.flatnonzero(prompts & ~same).tolist(), held_out, remedies.ASKED_TWICE
    )


def beyond(examples: Examples, vocabulary: int) -> list[str]:
    """A line about ids that the model has no embedding for."""
    largest = max(int(tokens.max()) for _, tokens, _ in _blocks(examples))
    if largest < vocabulary:
        return []
    what = f"have token ids at or above the model's vocabulary of {vocabulary} (the largest is {largest})"
    found = _any(examples, lambda tokens, trained: tokens >= vocabulary)
    return told(what, np.flatnonzero(found).tolist(), examples, remedies.FOREIGN)


def _without_eos(examples: Examples, tokenizer: Tokenizer, summary: Summary) -> list[int]:
    if not summary.without_eos:
        return []
    ends = _any(examples, lambda tokens, trained: trained & np.isin(tokens, tokenizer.eos_ids))
    # An example as long as the limit was most likely cut there, which has its own line.
    return np.flatnonzero(~ends & (examples.lengths < summary.max_length)).tolist()


def _doubled_bos(examples: Examples, tokenizer: Tokenizer) -> list[int]:
    if tokenizer.bos_id is None:
        return []
    long = np.flatnonzero(examples.lengths > 1)
    starts = examples.starts[long]
    both = [examples.tokens[starts + index] == tokenizer.bos_id for index in (0, 1)]
    return long[both[0] & both[1]].tolist()


def _blocks(examples: Examples) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Some examples after the other, with their tokens and which are trained, so that little is in memory at once."""
    first = 0
    ends = np.cumsum(examples.lengths, dtype=np.int64)
    while first < len(examples):
        begin = int(ends[first] - examples.lengths[first])
        last = max(int(np.searchsorted(ends, begin + BLOCK, "right")), first + 1)
        part = slice(begin, int(ends[last - 1]))
        yield slice(first, last), examples.tokens[part], examples.trained[part]
        first = last


def _any(
    examples: Examples, marks: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> Bool[np.ndarray, " examples"]:
    """Which examples have a token that `marks`, of (tokens, trained), holds of."""
    found = np.zeros(len(examples), bool)
    for some, tokens, trained in _blocks(examples):
        starts = examples.starts[some] - examples.starts[some.start]
        found[some] = np.logical_or.reduceat(marks(tokens, trained), starts)
    return found


def _prompt_ends(examples: Examples) -> np.ndarray:
    """How many tokens stand before each example's first target."""
    ends = np.zeros(len(examples), np.int64)
    for some, _, trained in _blocks(examples):
        starts = examples.starts[some] - examples.starts[some.start]
        targets = np.append(np.flatnonzero(trained), len(trained))
        ends[some] = targets[np.searchsorted(targets, starts)] - starts
    return ends


def _digests(examples: Examples, lengths: np.ndarray | None = None) -> UInt64[np.ndarray, " n"]:
    """A number that stands for each example's tokens, or for its first ones."""
    starts, flat = examples.starts, examples.tokens
    ends = starts + (examples.lengths if lengths is None else lengths)
    digests = b"".join(
        hashlib.blake2b(flat[start:end].data, digest_size=8).digest()
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
    )
    return np.frombuffer(digests, np.uint64)


def duplicates(examples: Examples) -> list[str]:
    """A line about examples that stand there more than once."""
    _, first, which = np.unique(_digests(examples), return_index=True, return_inverse=True)
    before = first[which]
    again = np.flatnonzero(before != np.arange(len(examples)))
    if not again.size:
        return []
    one, other = (examples.origin(int(index)) for index in (again[0], before[again[0]]))
    return [
        f"{share_of(again.size, len(examples))} examples are duplicates (first: {one} of {other}): {remedies.TWICE}"
    ]


def told(what: str, indices: Sequence[int], examples: Examples, remedy: str = "") -> list[str]:
    """A line about the examples with these indices, with what to do; none if there are none."""
    if not indices:
        return []
    first = examples.origin(indices[0])
    line = f"{share_of(len(indices), len(examples))} examples {what} (first: {first})"
    return [f"{line}: {remedy}" if remedy else line]


def share_of(count: int, whole: int) -> str:
    """How many of how many, and the share.

    >>> share_of(3, 400)
    '3 of 400 (0.75 %)'
    """
    return f"{count} of {whole} ({100 * count / max(whole, 1):.3g} %)"
