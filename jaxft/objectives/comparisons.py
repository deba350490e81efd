"""Examples of preferences: pairs of completions, or completions with a label, each behind its prompt."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxft.data import Batches, Examples, Row, Tokenizer, pack
from jaxft.data.preference_report import marked_pair, pair_findings, side_lines, sides
from jaxft.data.preference_rows import read_preferences
from jaxft.data.preferences import (
    Comparison,
    Comparisons,
    PreferenceSummary,
    collate_comparisons,
    prepare_preferences,
)
from jaxft.data.report import Part
from jaxft.data.show import histogram_lines
from jaxft.objectives.kind import Kind

PACKED = 8  # pairs in a row of a plan: what a slot holds is a few numbers


class Asked(list[Row]):
    """Rows to ask for samples: prompt, and the chosen completion."""

    sources = ()


def _rows(
    config: ConfigDict,
    paths: Any,
    *,
    judged: bool,
    held_out: bool = False,
    as_messages: bool = False,
    strict: bool = False,
) -> tuple[list[Row], int]:
    """The rows of files as `config.data` reads them, and how many were left out."""
    return read_preferences(
        paths,
        judged=judged,
        skip=config.data.bad_rows == "skip",
        held_out=held_out,
        as_messages=as_messages,
        fields=config.data.fields,
        ignore=config.data.ignore,
        strict=strict,
    )


def _asked(rows: list[Row], *, judged: bool) -> Asked:
    """Each row with one of its completions: the judged one, or the chosen one."""
    answer = "completion" if judged else "chosen"
    return Asked(_as_example(row, answer) for row in rows)


def _as_example(row: Row, answer: str) -> Row:
    kept = {"prompt": row.values["prompt"], "completion": row.values[answer]}
    if "tools" in row.values:
        kept["tools"] = row.values["tools"]
    return dataclasses.replace(row, format="prompt_completion", values=kept, written="")


def read(
    config: ConfigDict,
    paths: Any,
    tokenizer: Tokenizer,
    max_length: int,
    vocabulary_size: int | None = None,
    held_out: bool = False,
    strict: bool = False,
    *,
    judged: bool,
) -> tuple[Asked, Comparisons, PreferenceSummary]:
    """Rows to ask for samples, the pairs, and their counts: see `jaxft.objectives.kind.Read`.

    `judged`: the rows are completions with a label, and not pairs.
    """
    as_messages = tokenizer.chat_template is not None
    rows, skipped = _rows(
        config, paths, judged=judged, held_out=held_out, as_messages=as_messages, strict=strict
    )
    examples, summary = prepare_preferences(
        rows,
        tokenizer,
        max_length=max_length,
        share=config.data.share_prompt,
        skip=config.data.bad_rows == "skip",
        skipped=skipped,
        group=config.batch_size // config.grad_accum,
        on_unwritten=config.data.on_unwritten,
        vocabulary_size=vocabulary_size,
    )
    return _asked(rows, judged=judged), examples, summary


def batches(config: ConfigDict, examples: Examples, *, max_length: int, **settings: Any) -> Batches:
    """`Batches` of pairs: a row has room for two completions and their prompt, or when packed for many.

    Args:
        config: of the run.
        examples: the pairs.
        max_length: tokens of a prompt with a completion; a row has twice as many tokens.
        settings: the other arguments of `Batches`.
    """
    packing = config.data.packing
    lengths = examples.lengths.tolist()
    slots = max(map(len, pack(lengths, 2 * max_length))) if packing else 1
    known = isinstance(examples, Comparisons) and examples.known
    collate = functools.partial(collate_comparisons, slots=slots, known=known)
    return Batches(
        examples,
        packing=packing,
        seed=config.seed,
        max_length=2 * max_length,
        collate=collate,
        **settings,
    )


def shapes(config: ConfigDict, max_length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The longest batch of `batches`.

    How many pairs a packed row holds, the data decide, and `PACKED` is taken. With `config.objective.precompute` the
    reference's log-probabilities are there.
    """
    found: dict[str, tuple[tuple[int, ...], Any]] = {}
    rows = config.batch_size
    row_length, slots = (rows, 2 * max_length), (rows, PACKED if config.data.packing else 1)
    for name in ("tokens", "segments", "positions", "branches", "pairs", "weights"):
        found[name] = (row_length, jnp.float32 if name == "weights" else jnp.int32)
    for name in ("present", "labels", "index"):
        found[name] = (slots, jnp.int32 if name == "index" else jnp.float32)
    if config.objective.precompute:
        found["reference"] = ((*slots, 2), jnp.float32)
    return {name: jax.ShapeDtypeStruct(*shape) for name, shape in found.items()}


def _findings(config: ConfigDict, part: Part, tokenizer: Tokenizer, vocabulary: int) -> list[str]:
    weight = config.objective.desirable_weight / config.objective.undesirable_weight
    return pair_findings(part, tokenizer, vocabulary, weight)


def _lengths(part: Part, row_length: int) -> list[str]:
    """Of prompts and completions, and of the pairs."""
    said = "  tokens of a pair, its prompt once, as it trains:"
    return [*side_lines(part), said, *histogram_lines(part.examples.lengths, row_length)]


def _shown(
    part: Part, pair: Comparison, tokenizer: Tokenizer, marks: tuple[str, str], *, judged: bool
) -> tuple[int, list[str]]:
    del part
    trained = len(sides(pair)[1]) if judged else int(pair.trained.sum())
    return trained, marked_pair(pair, tokenizer, marks, judged=judged)


def _kind(*, judged: bool) -> Kind:
    def rows(config: ConfigDict, paths: Any, **settings: Any) -> Asked:
        return _asked(_rows(config, paths, judged=judged, **settings)[0], judged=judged)

    return Kind(
        rows=rows,
        read=functools.partial(read, judged=judged),
        batches=batches,
        row_length=lambda config, max_length: 2 * max_length,
        shapes=shapes,
        findings=_findings,
        lengths=_lengths,
        shown=functools.partial(_shown, judged=judged),
    )


PAIRS = _kind(judged=False)  # prompt, chosen, rejected
JUDGED = _kind(judged=True)  # prompt, completion, label
