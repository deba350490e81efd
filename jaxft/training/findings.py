"""What `jaxft data` and `jaxft train` say of the examples: one function for both."""

from __future__ import annotations

from collections.abc import Sequence

from ml_collections import ConfigDict

from jaxft.data import Tokenizer
from jaxft.data.preference_report import pair_findings
from jaxft.data.report import Part, findings, overlap
from jaxft.runtime.processes import first
from jaxft.training.preference_data import compares
from jaxft.training.prepare import Data


def warnings_of(
    config: ConfigDict, parts: Sequence[Part], tokenizer: Tokenizer, vocabulary: int
) -> list[str]:
    """A line for each thing about the data that its owner should know, with its place and its remedy.

    Args:
        config: of the run.
        parts: the training data, then the held-out sets.
        tokenizer: the one that made the examples.
        vocabulary: how many ids the model has.
    """
    lines = []
    for part in parts:
        if compares(config):
            weight = config.objective.desirable_weight / config.objective.undesirable_weight
            found = pair_findings(part, tokenizer, vocabulary, weight)
        else:
            found = findings(part, tokenizer, vocabulary)
        lines += [f"{part.name}: {line}" for line in found]
    for part in parts[1:]:
        lines += [f"{part.name}: {line}" for line in overlap(parts[0].examples, part.examples)]
    return lines


def warning_lines(config: ConfigDict, data: Data, vocabulary: int) -> list[str]:
    """The same for a run's log, of the process that writes it."""
    if not first():
        return []
    found = warnings_of(config, data.parts, data.tokenizer, vocabulary)
    return [f"warning: {line}" for line in found]
