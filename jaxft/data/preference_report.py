"""What a careful colleague says of preferences, and pairs for the eye."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Int

from jaxft.data import remedies
from jaxft.data.preferences import Comparison, Comparisons, PreferenceSummary
from jaxft.data.report import Part, beyond, duplicates, share_of, told, unread_lines
from jaxft.data.show import harmless
from jaxft.data.store import Example
from jaxft.data.tokenizer import Tokenizer
from jaxft.data.unwritten import told_left_out
from jaxft.errors import counted, worded
from jaxft.sequences import common_prefix_length

Ids = list[int]
LONGER = 0.65  # share of pairs beyond which length alone tells which completion is chosen
BALANCE = (
    1.0,
    4 / 3,
)  # KTO (arXiv 2402.01306, equation 9): desirable to undesirable, weights and counts together


def sides(pair: Comparison) -> tuple[Ids, Ids, Ids]:
    """The tokens of prompt, chosen and rejected completion."""
    whole = [pair.branches != other for other in (2, 1)]
    left, right = (pair.tokens[kept].tolist() for kept in whole)
    starts = [int(np.argmax(pair.trained[kept])) for kept in whole]
    return left[: starts[0]], left[starts[0] :], right[starts[1] :]


def lengths(split: Iterable[tuple[Ids, Ids, Ids]]) -> Int[np.ndarray, "pairs 3"]:
    """Tokens of each prompt, chosen and rejected completion."""
    return np.asarray([[len(ids) for ids in parts] for parts in split])


@dataclasses.dataclass(frozen=True)
class Seen:
    """What is to be known of all pairs together; of none of them the tokens are held.

    Attributes:
        lengths: tokens of each prompt, chosen and rejected completion.
        endless: pairs whose chosen completion has no EOS.
        same: pairs of equal completions.
        reversed: pairs that contradict an earlier one.
    """

    lengths: Int[np.ndarray, "pairs 3"]
    endless: list[int]
    same: list[int]
    reversed: list[int]


def seen(pairs: Iterable[Comparison], eos_ids: Sequence[int]) -> Seen:
    """Goes through the pairs once."""
    ends, sizes = set(eos_ids), list[list[int]]()
    endless, same, reversed_, before = list[int](), list[int](), list[int](), set[bytes]()
    for index, pair in enumerate(pairs):
        parts = sides(pair)
        sizes.append([len(ids) for ids in parts])
        prompt, chosen, rejected = (np.asarray(ids, np.int32).tobytes() for ids in parts)
        if ends.isdisjoint(parts[1]):
            endless.append(index)
        if chosen == rejected:
            same.append(index)
            continue
        if _digest(prompt, rejected, chosen) in before:
            reversed_.append(index)
        before.add(_digest(prompt, chosen, rejected))
    return Seen(np.asarray(sizes), endless, same, reversed_)


def _digest(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def side_lines(part: Part) -> list[str]:
    """A line each for prompts and completions: the median and the longest."""
    judged = summary_of(part).judged
    names = ["prompts", "completions", ""] if judged else ["prompts", "chosen", "rejected"]
    columns = lengths(map(sides, pairs_of(part).pairs())).T
    return [
        f"  {name:12} {int(np.median(column)):>6} tokens in the middle, {column.max()} at most"
        for name, column in zip(names, columns, strict=True)
        if name
    ]


def pair_findings(
    part: Part, tokenizer: Tokenizer, vocabulary: int, weight: float = 1.0
) -> list[str]:
    """A line for each thing about pairs, or judged completions, that their owner should know, and what to do.

    `weight` is that of KTO's desirable completions over that of its undesirable ones.
    """
    examples, summary = pairs_of(part), summary_of(part)
    lines = []
    if summary.truncated:
        lines.append(
            f"{share_of(summary.truncated, summary.rows)} prompts lose their beginning: with a completion they are "
            f"longer than max_length {summary.max_length} (the longest has {summary.longest} tokens; first: "
            f"{summary.first_truncated}): {remedies.LONGER}"
        )
    if summary.dropped:
        lines.append(
            f"{share_of(summary.dropped, summary.rows)} rows are dropped: a completion alone exceeds max_length "
            f"(first: {summary.first_dropped}): {remedies.LONGER}"
        )
    if summary.skipped:
        are = worded(summary.skipped, "is", "are")
        rows = counted(summary.skipped, "row")
        lines.append(f"{rows} cannot be used and {are} left out (data.bad_rows=skip)")
    found = seen(examples.pairs(), tokenizer.eos_ids)
    how = chosen_ending(tokenizer, examples[found.endless[0]]) if found.endless else ""
    lines += told("train no EOS, so the model does not learn to stop", found.endless, examples, how)
    lines += beyond(examples, vocabulary)
    empty = np.flatnonzero(found.lengths[:, 0] == 0).tolist()
    lines += told("have an empty prompt", empty, examples, remedies.UNASKED)
    if not summary.judged:
        what = "have completions of the same tokens, which teach nothing"
        lines += told(what, found.same, examples, remedies.SAME)
        what = "stand the other way round elsewhere: what is chosen there is rejected here"
        lines += told(what, found.reversed, examples, remedies.REVERSED)
    lines += _balance(examples, weight) if summary.judged else _length_bias(found.lengths)
    lines += unread_lines(part.rows, summary.rows)
    lines += duplicates(examples)
    if summary.unused_keys:
        lines.append(f"keys of the rows that are not used: {', '.join(summary.unused_keys)}")
    lines += told_left_out(summary.left_out, summary.rows)
    return lines


def marked_pair(
    pair: Comparison, tokenizer: Tokenizer, marks: tuple[str, str], *, judged: bool
) -> list[str]:
    """Lines: the prompt once, then each completion with `marks` around what is trained.

    Of a judged completion that is it alone: the other one is not trained.
    """
    prompt, *completions = sides(pair)
    names = ["chosen", "rejected"]
    if judged:
        names = ["desirable" if pair.label else "undesirable", "of another prompt, for the KL"]
    start = tokenizer.decode(prompt, skip_special_tokens=False)
    texts = [("prompt", harmless(start))]
    for name, ids in zip(names, completions, strict=True):
        whole = tokenizer.decode(prompt + ids, skip_special_tokens=False)
        text = harmless(whole[common_prefix_length(start, whole) :])
        plain = judged and len(texts) == 2
        texts.append((name, text if plain else f"{marks[0]}{text}{marks[1]}"))
    return [
        line
        for name, text in texts
        for line in (f"  {name}:", *(f"    {part}" for part in text.split("\n")))
    ]


def pairs_of(part: Part) -> Comparisons:
    """The part's examples."""
    assert isinstance(part.examples, Comparisons)
    return part.examples


def summary_of(part: Part) -> PreferenceSummary:
    """The part's counts."""
    assert isinstance(part.summary, PreferenceSummary)
    return part.summary


def chosen_ending(tokenizer: Tokenizer, pair: Comparison) -> str:
    """How to make answers end, by the pair's chosen completion."""
    kept = pair.branches != 2
    return remedies.ending(tokenizer, Example(pair.tokens[kept], pair.trained[kept], pair.origin))


def _length_bias(sizes: Int[np.ndarray, "pairs 3"]) -> Iterator[str]:
    """A line where the longer completion is nearly always chosen, or nearly never."""
    _, chosen, rejected = sizes.T
    apart = max(int((chosen != rejected).sum()), 1)
    most = max(LONGER, 0.5 + apart**-0.5)  # and beyond two standard deviations of a coin's throws
    for name, longer in (("chosen", chosen > rejected), ("rejected", rejected > chosen)):
        if longer.sum() / apart > most:
            yield (
                f"the {name} completion is the longer one in {share_of(int(longer.sum()), len(sizes))} pairs: "
                "length alone tells them apart, and the model may learn that (objective.length_normalize, or simpo)"
            )


def _balance(examples: Comparisons, weight: float) -> Iterator[str]:
    """A line where KTO's labels, as they are weighed, are far from balance."""
    good = sum(pair.label > 0 for pair in examples.pairs())
    bad = len(examples) - good
    low, high = BALANCE
    if bad and not low <= weight * good / bad <= high:
        key, value = ("undesirable", good / bad) if good > bad else ("desirable", bad / good)
        yield (
            f"{good} desirable and {bad} undesirable, weighed {weight:.3g} to 1: KTO wants them in balance, as with "
            f"objective.{key}_weight={value:.3g} and 1 for the other"
        )
