"""What the model will see: `jaxft data`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ml_collections import ConfigDict

from jaxft.assets import model_folder
from jaxft.data import Tokenizer, pack
from jaxft.data.questions import spread
from jaxft.data.report import Part, tokens_by_source
from jaxft.data.show import BRACKETS, COLOURS, check_plot, plot_lengths
from jaxft.errors import counted
from jaxft.formats.config_file import model_config
from jaxft.objectives.kind import Kind, warnings_of
from jaxft.objectives.objective import objective_of
from jaxft.objectives.reading import (
    TRAINING,
    added_tokens,
    date_lines,
    epoch_of,
    max_length_of,
    mix_lines,
    parts_of,
    source_lines,
    tokenizer_of,
    updates_of,
)

Reading = Callable[[ConfigDict, Tokenizer, int], dict[str, Any]]


def main(config: ConfigDict, plot: str, shown: int, reading: Reading | None = None) -> None:
    """Prints the preview, in colour on a terminal; arguments as of `preview`."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # the data may hold any letter
    try:
        print(
            "\n".join(preview(config, plot=plot, shown=shown, colour=colour, reading=reading)),
            flush=True,
        )
    except BrokenPipeError:  # `jaxft data ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def preview(
    config: ConfigDict,
    *,
    plot: str = "",
    shown: int = 3,
    colour: bool = False,
    reading: Reading | None = None,
) -> list[str]:
    """What the model would see in a run with this configuration, without reading its weights.

    Args:
        config: as for `train`.
        plot: a new PNG for the histogram of lengths; "" for none.
        shown: examples that are decoded, spread over the training data.
        colour: marks trained tokens in colour, else with brackets.
        reading: (config, tokenizer, max_length) -> further arguments of `jaxft.objectives.kind.Read`; None for none.

    Returns:
        Lines: for training and held-out data the counts, the tokens of each source, the lengths and how rows
        are filled; what a careful colleague would say; and the examples.

    Raises:
        UserError: whatever would keep `train` from reading the data, but for token ids that the model lacks,
            which are a warning here; a plot that exists.
    """
    if plot:
        check_plot(plot)
    model = model_config(model_folder(config.model, weights=False))
    max_length, tokenizer = max_length_of(config, model), tokenizer_of(config)
    kind = objective_of(config).examples
    row_length = kind.row_length(config, max_length)
    more = {} if reading is None else reading(config, tokenizer, max_length)
    parts = parts_of(config, tokenizer=tokenizer, max_length=max_length, **more)
    lines = list[str]()
    for part in parts:
        lines += [f"{part.name}: {part.summary}", *_filling(config, part, max_length, tokenizer)]
        lines += [f"  {line}" for line in source_lines(part.rows)]
        lines += ["", *_sources(part), "", *kind.lengths(part, row_length), ""]
    lines += date_lines(tokenizer)
    vocabulary = max(model.vocabulary, 1 + max(added_tokens(config), default=0))
    warnings = warnings_of(config, kind, parts, tokenizer, vocabulary)
    lines += ["warnings:", *(f"  - {line}" for line in warnings or ["none"]), ""]
    lines += _shown(kind, parts[0], tokenizer, shown, colour)
    if plot:
        lengths = [(part.name, part.examples.row_lengths) for part in parts]
        lines.append(str(plot_lengths(plot, lengths, row_length)))
    return lines


def _filling(
    config: ConfigDict, part: Part, max_length: int, tokenizer: Tokenizer
) -> Iterable[str]:
    """How the examples fill the rows, and how many updates that makes."""
    training, packing = part.name == TRAINING, config.data.packing
    kind, examples = objective_of(config).examples, part.examples
    if training:
        examples = epoch_of(config, part.rows, examples, part.summary)
        yield from (f"  {line}" for line in mix_lines(config, part.rows, part.summary))
    batches = kind.batches(
        config,
        examples,
        batch_size=config.batch_size,
        max_length=max_length,
        shuffle=False,
        pad_id=tokenizer.pad_id,
    )
    row_length = kind.row_length(config, max_length)
    if packing:
        yield (
            f"  packed: {counted(len(examples), 'example')} in {counted(batches.rows, 'row')} of {row_length}, "
            f"{100 * batches.fill:.1f} % filled"
        )
    elif kind.packs:
        rows = len(pack(examples.lengths.tolist(), row_length))
        filled = 100 * int(examples.lengths.sum()) / (rows * row_length)
        yield (
            f"  not packed: a row an example; data.packing=True would make {counted(rows, 'row')} of "
            f"{row_length}, {filled:.1f} % filled"
        )
    if training:
        yield (
            f"  {counted(batches.steps_per_epoch, 'update')} of {counted(config.batch_size, 'row')} an epoch, "
            f"{updates_of(config, batches.steps_per_epoch)} in all"
        )


def _sources(part: Part) -> list[str]:
    rows = [("source", "examples", "tokens", "trained")]
    rows += [tuple(map(str, row)) for row in tokens_by_source(part.examples)]  # type: ignore[misc]
    wide = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        f"  {row[0]:{wide[0]}}" + "".join(f"  {row[i]:>{wide[i]}}" for i in (1, 2, 3))
        for row in rows
    ]


def _shown(kind: Kind, part: Part, tokenizer: Tokenizer, shown: int, colour: bool) -> Sequence[str]:
    marks = COLOURS if colour else BRACKETS
    lines = [f"examples, trained tokens {'in colour' if colour else 'in [[ ]]'}:"] if shown else []
    for example in spread(part.examples, shown):
        trained, text = kind.shown(part, example, tokenizer, marks)
        counts = f"{counted(len(example.tokens), 'token')}, {trained} trained"
        lines += [f"{example.origin}: {counts}", *text, ""]
    return lines
