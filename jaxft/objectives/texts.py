"""Examples of supervised fine-tuning: texts and conversations, one or, packed, several in a row of a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxft.data import Batches, Examples, Row, Rows, Summary, Tokenizer, prepare_examples, read_rows
from jaxft.data.mixing import check_weights
from jaxft.data.report import Part, findings
from jaxft.data.show import histogram_lines, marked
from jaxft.data.store import Example
from jaxft.objectives.kind import Kind

Rewrite = Callable[[bool], Callable[[Iterator[Row]], Iterator[Row]]]


def rows(
    config: ConfigDict,
    paths: Any,
    *,
    held_out: bool = False,
    as_messages: bool = False,
    strict: bool = False,
) -> Rows:
    """The rows of files, as `config.data` reads them."""
    settings = config.data
    return read_rows(
        paths,
        settings.format,
        settings.fields,
        held_out=held_out,
        as_messages=as_messages,
        ignore=settings.ignore,
        strict=strict,
    )


def read(
    config: ConfigDict,
    paths: Any,
    tokenizer: Tokenizer,
    max_length: int,
    vocabulary_size: int | None = None,
    held_out: bool = False,
    strict: bool = False,
    rewrite: Rewrite | None = None,
) -> tuple[Rows, Examples, Summary]:
    """The rows of `paths`, the examples that they become, and their counts: see `jaxft.objectives.kind.Read`.

    `rewrite`: whether the rows are held out -> (rows -> what becomes of them, one for one).
    """
    settings = config.data
    as_messages = tokenizer.chat_template is not None
    found = rows(config, paths, held_out=held_out, as_messages=as_messages, strict=strict)
    if rewrite is not None:
        found = dataclasses.replace(found, rewrite=rewrite(held_out))
    if settings.mix and not held_out:
        check_weights(settings.mix, len(found.sources))
    examples, summary = prepare_examples(
        found,
        tokenizer,
        max_length=max_length,
        loss_on=settings.loss_on,
        on_unwritten=settings.on_unwritten,
        vocabulary_size=vocabulary_size,
        split_texts=settings.packing,
    )
    return found, examples, summary


def batches(config: ConfigDict, examples: Examples, **settings: Any) -> Batches:
    """`Batches` of rows of `max_length`; `settings` are its other arguments."""
    return Batches(examples, packing=config.data.packing, seed=config.seed, **settings)


def shapes(config: ConfigDict, max_length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """tokens, segments, positions int32 and weights float32, (batch, max_length) each."""
    dtypes = dict.fromkeys(("tokens", "segments", "positions"), jnp.int32)
    shape = (config.batch_size, max_length)
    found = {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in dtypes.items()}
    return found | {"weights": jax.ShapeDtypeStruct(shape, jnp.float32)}


def _findings(config: ConfigDict, part: Part, tokenizer: Tokenizer, vocabulary: int) -> list[str]:
    del config
    return findings(part, tokenizer, vocabulary)


def _lengths(part: Part, row_length: int) -> list[str]:
    said = "  lengths, in tokens of a row before it is cut:"
    return [said, *histogram_lines(part.examples.row_lengths, row_length)]


def _shown(
    part: Part, example: Example, tokenizer: Tokenizer, marks: tuple[str, str]
) -> tuple[int, list[str]]:
    del part
    text = [f"    {line}" for line in marked(example, tokenizer, marks).split("\n")]
    return int(example.trained.sum()), text


TEXTS = Kind(
    rows=rows,
    read=read,
    batches=batches,
    row_length=lambda config, max_length: max_length,
    shapes=shapes,
    findings=_findings,
    lengths=_lengths,
    shown=_shown,
)
