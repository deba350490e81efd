"""Batches of preferences for the one loop: what `prepare_data` does otherwise where rows are compared."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxft.data import Batches, Examples, Row, Tokenizer, pack
from jaxft.data.preference_rows import read_preferences
from jaxft.data.preferences import Comparisons, collate_comparisons, prepare_preferences

PACKED = 8  # pairs in a row of a plan: what a slot holds is a few numbers


def compares(config: ConfigDict) -> bool:
    """Whether the objective compares completions."""
    return config.objective.name != "sft"


class Asked(list[Row]):
    """Rows to ask for samples: prompt, and the chosen completion."""

    sources = ()


def preference_examples(
    config: ConfigDict,
    paths: Any,
    tokenizer: Tokenizer,
    max_length: int,
    vocabulary_size: int | None = None,
    held_out: bool = False,
    strict: bool = False,
) -> tuple[Any, Examples, Any]:
    """`read_examples` where completions are compared: rows to ask for samples, the pairs, and their counts.

    `strict` refuses rows with text that is not used.
    """
    skip, judged = config.data.bad_rows == "skip", config.objective.name == "kto"
    rows, skipped = read_preferences(
        paths,
        judged=judged,
        skip=skip,
        held_out=held_out,
        as_messages=tokenizer.chat_template is not None,
        fields=config.data.fields,
        ignore=config.data.ignore,
        strict=strict,
    )
    examples, summary = prepare_preferences(
        rows,
        tokenizer,
        max_length=max_length,
        share=config.data.share_prompt,
        skip=skip,
        skipped=skipped,
        group=config.batch_size // config.grad_accum,
        on_unwritten=config.data.on_unwritten,
        vocabulary_size=vocabulary_size,
    )
    answer = "completion" if judged else "chosen"
    return Asked(_as_example(row, answer) for row in rows), examples, summary


def _as_example(row: Row, answer: str) -> Row:
    """The row with one of its completions."""
    kept = {"prompt": row.values["prompt"], "completion": row.values[answer]}
    if "tools" in row.values:
        kept["tools"] = row.values["tools"]
    return dataclasses.replace(row, format="prompt_completion", values=kept, written="")


def preference_batches(
    examples: Examples, *, packing: bool, max_length: int, **settings: Any
) -> Batches:
    """`Batches` of pairs: a row has room for two completions and their prompt, or when packed for many.

    Args:
        examples: the pairs.
        packing: several pairs in a row.
        max_length: tokens of a prompt with a completion; a row has twice as many places.
        settings: the other arguments of `Batches`.
    """
    lengths = examples.lengths.tolist()
    slots = max(map(len, pack(lengths, 2 * max_length))) if packing else 1
    known = isinstance(examples, Comparisons) and examples.known
    collate = functools.partial(collate_comparisons, slots=slots, known=known)
    return Batches(
        examples, packing=packing, max_length=2 * max_length, collate=collate, **settings
    )


def preference_shapes(
    rows: int, max_length: int, *, packing: bool, known: bool
) -> dict[str, jax.ShapeDtypeStruct]:
    """The longest batch of `preference_batches` before data are read.

    Args:
        rows: of a batch.
        max_length: tokens of a prompt with a completion.
        packing: several pairs in a row: how many, the data decide, and `PACKED` is taken.
        known: with the reference's log-probabilities.
    """
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {}
    places, slots = (rows, 2 * max_length), (rows, PACKED if packing else 1)
    for name in ("tokens", "segments", "positions", "branches", "pairs", "weights"):
        shapes[name] = (places, jnp.float32 if name == "weights" else jnp.int32)
    for name in ("present", "labels", "index"):
        shapes[name] = (slots, jnp.int32 if name == "index" else jnp.float32)
    if known:
        shapes["reference"] = ((*slots, 2), jnp.float32)
    return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
