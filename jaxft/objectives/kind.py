"""A kind of examples: what an objective makes of rows of data, how they stand in a batch, and what is said of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import jax
from ml_collections import ConfigDict

from jaxft.data import Batches, Examples, Row, Tokenizer
from jaxft.data.report import Part, overlap
from jaxft.data.store import Example


class Read(Protocol):
    """Rows of files, the examples that they become, and their counts."""

    def __call__(
        self,
        config: ConfigDict,
        paths: Any,
        tokenizer: Tokenizer,
        max_length: int,
        vocabulary_size: int | None = None,
        held_out: bool = False,
        strict: bool = False,
    ) -> tuple[Any, Examples, Any]:
        """Reads.

        Args:
            config: the run's configuration.
            paths: as `config.data.train` has them.
            tokenizer: the model's.
            max_length: tokens of a text.
            vocabulary_size: ids at or above it are refused; None: none is.
            held_out: which split to take where a source has several and names none.
            strict: refuse rows with text that is not used.

        Returns:
            The rows as they are asked for samples; the examples; their counts, whose `str` the log shows.
        """


@dataclasses.dataclass(frozen=True)
class Kind:
    """What objectives of one kind have in common: their examples.

    Attributes:
        rows: (config, paths, held_out, as_messages, strict) -> the rows of files, to be asked for samples.
        read: see `Read`.
        batches: (config, examples, **settings) -> `Batches`; the settings are its other arguments.
        row_length: (config, max_length) -> the tokens of the longest row of a batch.
        shapes: (config, max_length) -> a training batch of the longest rows as shapes, before data are read.
        findings: (config, part, tokenizer, vocabulary) -> a line for each thing that the data's owner should know.
        lengths: (part, row_length) -> lines of how long the rows are.
        shown: (part, example, tokenizer, marks) -> how many of its tokens train, and its text in lines.
        packs: whether a row of a batch may hold several examples (`config.data.packing`).
        counts: what `config.batch_size` counts, in words.
    """

    rows: Callable[..., Iterable[Row]]
    read: Read
    batches: Callable[..., Batches]
    row_length: Callable[[ConfigDict, int], int]
    shapes: Callable[[ConfigDict, int], dict[str, jax.ShapeDtypeStruct]]
    findings: Callable[[ConfigDict, Part, Tokenizer, int], list[str]]
    lengths: Callable[[Part, int], list[str]]
    shown: Callable[[Part, Example, Tokenizer, tuple[str, str]], tuple[int, list[str]]]
    packs: bool = True
    counts: str = "sequence"


def warnings_of(
    config: ConfigDict, kind: Kind, parts: Sequence[Part], tokenizer: Tokenizer, vocabulary: int
) -> list[str]:
    """A line for each thing about the data that its owner should know, with where it stands and its remedy.

    Args:
        config: of the run.
        kind: what the examples are.
        parts: the training data, then the held-out sets.
        tokenizer: the one that made the examples.
        vocabulary: how many ids the model has.
    """
    lines = [
        f"{part.name}: {line}"
        for part in parts
        for line in kind.findings(config, part, tokenizer, vocabulary)
    ]
    for part in parts[1:]:
        lines += [f"{part.name}: {line}" for line in overlap(parts[0].examples, part.examples)]
    return lines
