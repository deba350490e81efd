"""Batches of preferences for the one loop: what `prepare_data` does otherwise where rows are compared."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from jaxft.data import Batches, Row, Tokenizer, pack
from jaxft.data.preference_rows import read_preferences
from jaxft.data.preferences import Comparison, collate_comparisons, prepare_preferences


def compares(config: ConfigDict) -> bool:
    """Whether the objective compares completions."""
    return config.objective.name != "sft"


def preference_examples(
    config: ConfigDict, tokenizer: Tokenizer, paths: Any, *, max_length: int, vocabulary: int
) -> tuple[list[Row], list[Comparison], str]:
    """Rows to ask for samples (prompt and chosen completion), the examples, and what became of the rows.

    Args:
        config: the run's configuration.
        tokenizer: the model's.
        paths: of the files.
        max_length: tokens of a prompt with a completion.
        vocabulary: of the model.
    """
    skip = config.data.bad_rows == "skip"
    rows, skipped = read_preferences(paths, judged=config.objective.name == "kto", skip=skip)
    examples, summary = prepare_preferences(
        rows,
        tokenizer,
        max_length=max_length,
        share=config.data.share_prompt,
        skip=skip,
        skipped=skipped,
        group=config.batch_size // config.grad_accum,
        vocabulary_size=vocabulary,
    )
    asked = [
        Row(row.origin, "prompt_completion", {"prompt": row.values["prompt"], "completion": answer})
        for row in rows
        if (answer := row.values["completion" if row.format == "judged" else "chosen"])
    ]
    return asked, examples, str(summary)


def preference_batches(
    examples: Sequence[Comparison], *, packing: bool, max_length: int, **settings: Any
) -> Batches:
    """`Batches` of pairs: a row has room for two completions and their prompt, or when packed for many.

    Args:
        examples: the pairs.
        packing: several pairs in a row.
        max_length: tokens of a prompt with a completion; a row has twice as many places.
        settings: the other arguments of `Batches`.
    """
    lengths = [len(example.tokens) for example in examples]
    slots = max(map(len, pack(lengths, 2 * max_length))) if packing else 1
    collate = functools.partial(collate_comparisons, slots=slots)
    return Batches(
        examples, packing=packing, max_length=2 * max_length, collate=collate, **settings
    )
