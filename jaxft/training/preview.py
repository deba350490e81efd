"""What the model will see: `jaxft data`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence

from ml_collections import ConfigDict

from jaxft.assets import model_folder
from jaxft.data import Rows, Tokenizer, pack
from jaxft.data.preference_report import (
    marked_pair,
    side_lines,
    sides,
    summary_of,
)
from jaxft.data.preferences import Comparison, Comparisons
from jaxft.data.report import Part, tokens_by_source
from jaxft.data.show import (
    BRACKETS,
    COLOURS,
    check_plot,
    histogram_lines,
    marked,
    plot_lengths,
)
from jaxft.errors import counted
from jaxft.formats.config_file import model_config
from jaxft.training.findings import warnings_of
from jaxft.training.prepare import (
    batches_of,
    date_lines,
    epoch_of,
    max_length_of,
    mix_lines,
    parts_of,
    places_of,
    source_lines,
    spread,
    tokenizer_of,
    updates_of,
)


def main(config: ConfigDict, plot: str, shown: int) -> None:
    """Prints the preview, in colour on a terminal."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # the data may hold any letter
    try:
        print("\n".join(preview(config, plot=plot, shown=shown, colour=colour)), flush=True)
    except BrokenPipeError:  # `jaxft data ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def preview(
    config: ConfigDict, *, plot: str = "", shown: int = 3, colour: bool = False
) -> list[str]:
    """What the model would see in a run with this configuration, without reading its weights.

    Args:
        config: as for `train`.
        plot: a new PNG for the histogram of lengths; "" for none.
        shown: examples that are decoded, spread over the training data.
        colour: marks trained tokens in colour, else with brackets.

    Returns:
        Lines: for training and held-out data the counts, the tokens of each source, the lengths and how rows
        are filled; what a careful colleague would say; and the examples.

    Raises:
        UserError: whatever would keep `train` from reading the data, but for token ids that the model lacks,
            which are a warning here; a plot that exists.
    """
    if plot:
        check_plot(plot)
    model = model_config(model_folder(config.model))
    max_length, tokenizer = max_length_of(config, model), tokenizer_of(config)
    places = places_of(config, max_length)
    parts = parts_of(config, tokenizer=tokenizer, max_length=max_length)
    lines = list[str]()
    for part in parts:
        lines += [f"{part.name}: {part.summary}", *_filling(config, part, max_length, tokenizer)]
        if isinstance(part.rows, Rows):
            lines += [f"  {line}" for line in source_lines(part.rows)]
        lines += ["", *_sources(part), "", *_lengths(part, places), ""]
    lines += date_lines(tokenizer)
    warnings = warnings_of(config, parts, tokenizer, model.vocabulary)
    lines += ["warnings:", *(f"  - {line}" for line in warnings or ["none"]), ""]
    lines += _shown(parts[0], tokenizer, shown, colour)
    if plot:
        lengths = [(part.name, part.examples.row_lengths) for part in parts]
        lines.append(str(plot_lengths(plot, lengths, places)))
    return lines


def _filling(
    config: ConfigDict, part: Part, max_length: int, tokenizer: Tokenizer
) -> Iterable[str]:
    """How the examples fill the rows, and how many updates that makes."""
    training, packing = part.name == "training data", config.data.packing
    examples = part.examples
    if training and isinstance(part.rows, Rows):
        examples = epoch_of(config, part.rows, examples, part.summary)
        yield from (f"  {line}" for line in mix_lines(config, part.rows, part.summary))
    batches = batches_of(
        config,
        examples,
        batch_size=config.batch_size,
        max_length=max_length,
        shuffle=False,
        pad_id=tokenizer.pad_id,
    )
    places = places_of(config, max_length)
    if packing:
        yield (
            f"  packed: {counted(len(examples), 'example')} in {counted(batches.rows, 'row')} of {places}, "
            f"{100 * batches.fill:.1f} % filled"
        )
    else:
        rows = len(pack(examples.lengths.tolist(), places))
        filled = 100 * int(examples.lengths.sum()) / (rows * places)
        yield (
            f"  not packed: a row an example; data.packing=True would make {counted(rows, 'row')} of "
            f"{places}, {filled:.1f} % filled"
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


def _lengths(part: Part, places: int) -> list[str]:
    """How long the rows are, and of pairs the prompts and completions."""
    if isinstance(part.examples, Comparisons):
        said = "  tokens of a pair, its prompt once, as it trains:"
        return [*side_lines(part), said, *histogram_lines(part.examples.lengths, places)]
    said = "  lengths, in tokens of a row before it is cut:"
    return [said, *histogram_lines(part.examples.row_lengths, places)]


def _shown(part: Part, tokenizer: Tokenizer, shown: int, colour: bool) -> Sequence[str]:
    marks = COLOURS if colour else BRACKETS
    lines = [f"examples, trained tokens {'in colour' if colour else 'in [[ ]]'}:"] if shown else []
    for example in spread(part.examples, shown):
        trained = int(example.trained.sum())
        if isinstance(example, Comparison):
            judged = summary_of(part).judged
            trained = len(sides(example)[1]) if judged else trained
            text = marked_pair(example, tokenizer, marks, judged=judged)
        else:
            text = [f"    {line}" for line in marked(example, tokenizer, marks).split("\n")]
        counts = f"{counted(len(example.tokens), 'token')}, {trained} trained"
        lines += [f"{example.origin}: {counts}", *text, ""]
    return lines
