"""Examples and their lengths for the eye: marked text, bars of letters, a PNG."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from jaxft.data.store import Example
from jaxft.data.tokenizer import Tokenizer
from jaxft.errors import UserError, counted
from jaxft.sequences import common_prefix_length

BRACKETS = ("[[", "]]")
COLOURS = ("\x1b[32m", "\x1b[0m")
BAR = 40  # letters of the longest bar
# Of the data, nothing may steer the terminal that it is shown on.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def marked(example: Example, tokenizer: Tokenizer, marks: tuple[str, str] = BRACKETS) -> str:
    """The text of an example, special tokens included, with `marks` around what is trained.

    A character of which only some tokens are trained stands outside of the marks.
    """
    ids = example.tokens.tolist()
    edges = (np.flatnonzero(np.diff(example.trained)) + 1).tolist()
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    bounds = [0, *(_place(tokenizer, ids[:edge], whole) for edge in edges), len(whole)]
    pieces, inside = [], bool(example.trained[0])
    for start, end in itertools.pairwise(bounds):
        text = harmless(whole[start:end])
        pieces.append(f"{marks[0]}{text}{marks[1]}" if inside else text)
        inside = not inside
    return "".join(pieces)


def harmless(text: str) -> str:
    """The text with whatever could steer a terminal written out."""
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def _place(tokenizer: Tokenizer, ids: list[int], whole: str) -> int:
    """The character of the whole text at which the text of its first tokens ends."""
    text = tokenizer.decode(ids, skip_special_tokens=False)
    return common_prefix_length(text, whole)


def histogram(
    lengths: Int[np.ndarray, " rows"], bins: int = 12
) -> tuple[Int[np.ndarray, " edges"], Int[np.ndarray, " bins"]]:
    """(edges, counts): bin i counts the lengths from edges[i] to edges[i + 1] - 1.

    >>> histogram(np.array([1, 2, 2, 7]), bins=4)
    (array([1, 3, 5, 7, 9]), array([3, 0, 0, 1]))
    """
    low, high = int(lengths.min()), int(lengths.max())
    width = -(-(high + 1 - low) // bins)
    edges = np.arange(low, high + 1 + width, width)
    return edges, np.histogram(lengths, edges)[0]


def histogram_lines(lengths: Int[np.ndarray, " rows"], max_length: int) -> list[str]:
    r"""A bar for each bin, and a mark where `max_length` cuts.

    >>> print(*histogram_lines(np.array([1, 2, 3, 3, 4]), max_length=9), sep="\n")
       1    1  ####################
       2    1  ####################
       3    2  ########################################
       4    1  ####################
    """
    edges, counts = histogram(lengths)
    digits, wide = len(str(edges[-1])), len(str(counts.max()))
    lines = []
    for first, last, count in zip(edges[:-1], edges[1:] - 1, counts, strict=True):
        name = f"{first:{digits}}" if first == last else f"{first:{digits}} - {last:{digits}}"
        bar = "#" * int(np.ceil(BAR * count / counts.max()))
        cut = "  < max_length" if first <= max_length <= last and max_length < lengths.max() else ""
        lines.append(f"   {name}  {count:{wide + 2}}  {bar}{cut}")
    return lines


def plot_lengths(
    path: str | Path, parts: Sequence[tuple[str, np.ndarray]], max_length: int
) -> Path:
    """Draws the lengths of the parts, each (name, lengths), as a new PNG; returns its path.

    Raises:
      UserError: something stands there already, or it cannot be written.
    """
    path = Path(path)
    check_plot(path)
    from matplotlib.figure import Figure  # its import takes a second

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    longest = max(int(lengths.max()) for _, lengths in parts)
    bins = np.linspace(0, longest + 1, 60).tolist()
    for name, lengths in parts:
        weights = np.full(len(lengths), 100 / len(lengths))
        label = f"{name}: {counted(len(lengths), 'row')}, median {int(np.median(lengths))}"
        axes.hist(lengths, bins, weights=weights, alpha=0.6, label=label)
    if max_length <= longest:
        axes.axvline(max_length, color="tab:red", label=f"max_length {max_length}")
    axes.set_xlabel("tokens in a row, before it is cut or split")
    axes.set_ylabel("% of rows")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise UserError(f"--plot {path}: cannot be written: {error.strerror}") from error
    return path


def check_plot(path: str | Path) -> None:
    """Raises UserError where a plot cannot stand: nothing that exists is written over."""
    path = Path(path)
    if path.exists():
        raise UserError(f"--plot {path}: exists already; name a file that is new")
    if not path.parent.is_dir():
        raise UserError(f"--plot {path}: there is no folder {path.parent}")
