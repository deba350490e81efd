"""What a careful colleague says of the examples before anybody trains on them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from jaxft.data.examples import Summary
from jaxft.data.sources import Row
from jaxft.data.store import Example, Examples
from jaxft.data.tokenizer import Tokenizer
from jaxft.data.unread import unread_words
from jaxft.data.unwritten import told_left_out


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
    """(source, examples, tokens, trained tokens) of each place that examples come from.

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
    """A line for each thing about one part of the data that its owner should know; none if all is well."""
    summary, examples = part.summary, part.examples
    lines = []
    if summary.truncated:
        lines.append(
            f"{share_of(summary.truncated, summary.rows)} rows are longer than max_length "
            f"{summary.max_length} and lose their end (the longest has {summary.longest} tokens)"
        )
    if summary.dropped:
        lines.append(f"{summary.dropped} rows are dropped: they have no trained token")
    checks: tuple[tuple[str, Callable[[Example], bool]], ...] = (
        ("train no EOS, so the model does not learn to stop", _without_eos(tokenizer, summary)),
        ("begin with two BOS", _doubled_bos(tokenizer)),
    )
    for what, holds in checks:
        lines += told(what, [i for i, example in enumerate(examples) if holds(example)], examples)
    lines += told(
        f"have token ids at or above the model's vocabulary of {vocabulary} (the largest is "
        f"{int(examples.tokens.max())}); train refuses them",
        np.flatnonzero(_any_in_each(examples, examples.tokens >= vocabulary)).tolist(),
        examples,
    )
    empty = [row.origin for row in part.rows if has_empty_completion(row)]
    if empty:
        lines.append(
            f"{share_of(len(empty), summary.rows)} rows have an empty completion{_first(empty)}"
        )
    lines += unread_lines(part.rows, summary.rows)
    lines += duplicates(examples)
    if summary.diverged:
        lines.append(
            f"{summary.diverged} prompts have other tokens alone than before their completion: "
            "a space at the prompt's end belongs at the completion's beginning"
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
        f"{share} rows have {unread_words(keys)}; train refuses them{_first([with_text[0].origin])}"
    ]


def overlap(train: Examples, held_out: Examples) -> list[str]:
    """Lines about held-out examples, and held-out prompts, that stand in the training data as well."""
    lines = []
    seen = {_digest(example) for example in train}
    same = [i for i, example in enumerate(held_out) if _digest(example) in seen]
    lines += told("stand in the training data as well", same, held_out)
    prompts = {_digest(example, prompt=True) for example in train if has_prompt(example)}
    known = [
        i
        for i, example in enumerate(held_out)
        if has_prompt(example) and _digest(example, prompt=True) in prompts
    ]
    further = sorted(set(known) - set(same))
    what = "have a prompt that the training data has with another completion"
    return lines + told(what, further, held_out)


def has_prompt(example: Example) -> bool:
    """Whether more than the first token is left untrained before the first target."""
    return int(np.argmax(example.trained)) > 1


def has_empty_completion(row: Row) -> bool:
    """Whether the completion, or a turn of the assistant's, holds nothing but white space.

    >>> has_empty_completion(Row("a:1", "prompt_completion", {"prompt": "Why?", "completion": " "}))
    True
    """
    if row.format == "text":
        return not row.values["text"].strip()
    turns = row.values.get("messages", row.values.get("completion"))
    if isinstance(turns, str):
        return not turns.strip()
    return any(_is_empty_turn(turn) for turn in turns or ())


def _is_empty_turn(message: Mapping[str, Any]) -> bool:
    said = message["role"] == "assistant" and not message.get("tool_calls")
    content = message.get("content")
    return said and not (content.strip() if isinstance(content, str) else content)


def _without_eos(tokenizer: Tokenizer, summary: Summary) -> Callable[[Example], bool]:
    def holds(example: Example) -> bool:
        # An example as long as the limit was most likely cut there, which has its own line.
        if len(example.tokens) >= summary.max_length:
            return False
        return not np.isin(example.tokens[example.trained], tokenizer.eos_ids).any()

    return holds if summary.without_eos else lambda example: False


def _doubled_bos(tokenizer: Tokenizer) -> Callable[[Example], bool]:
    both = [tokenizer.bos_id] * 2
    if tokenizer.bos_id is None:
        return lambda example: False
    return lambda example: example.tokens[:2].tolist() == both


def _any_in_each(
    examples: Examples, marks: Bool[np.ndarray, " tokens"]
) -> Bool[np.ndarray, " examples"]:
    return np.logical_or.reduceat(marks, examples.starts)


def _digest(example: Example, prompt: bool = False) -> bytes:
    """Stands for an example's tokens, or for those before its first target."""
    tokens = example.tokens[: int(np.argmax(example.trained))] if prompt else example.tokens
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()


def duplicates(examples: Examples) -> list[str]:
    """A line about examples that stand there more than once."""
    first: dict[bytes, int] = {}
    pairs = []
    for index, example in enumerate(examples):
        before = first.setdefault(_digest(example), index)
        if before != index:
            pairs.append((index, before))
    if not pairs:
        return []
    one, other = (examples.origin(index) for index in pairs[0])
    return [
        f"{share_of(len(pairs), len(examples))} examples are duplicates (first: {one} of {other})"
    ]


def told(what: str, indices: Sequence[int], examples: Examples) -> list[str]:
    """A line about the examples with these indices; none if there are none."""
    if not indices:
        return []
    origins = [examples.origin(index) for index in indices[:1]]
    return [f"{share_of(len(indices), len(examples))} examples {what}{_first(origins)}"]


def share_of(count: int, whole: int) -> str:
    """How many of how many, and the share.

    >>> share_of(3, 400)
    '3 of 400 (0.75 %)'
    """
    return f"{count} of {whole} ({100 * count / max(whole, 1):.3g} %)"


def _first(origins: Sequence[str]) -> str:
    return f" (first: {origins[0]})"
