"""The threshold below which a question counts as not answered by any passage, set on questions of which one knows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxft.data.sources import read_objects
from jaxft.errors import UserError, counted, shown
from jaxft.formats.manifest import note, read_manifest
from jaxft.retrieval.index import WHAT, Index, open_index
from jaxft.retrieval.measures import measures
from jaxft.retrieval.prompts import question_of
from jaxft.runtime.storage import local

LOOKED_AT = 100  # chunks of a ranking that is measured


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What was found.

    Attributes:
      threshold: halfway between two confidences.
      answerable, unanswerable: how many questions of each.
      answered: the share of the answerable whose confidence reaches the threshold.
      refused: the share of the unanswerable whose does not.
      measures: as of `measures`, over the questions that name their source; {} where none does.
    """

    threshold: float
    answerable: int
    unanswerable: int
    answered: float
    refused: float
    measures: dict[str, float]

    def __str__(self) -> str:
        """One line."""
        found = "".join(f", {name} {value:.3f}" for name, value in self.measures.items())
        return (
            f"threshold {self.threshold:.4f}: {100 * self.answered:.1f} % of "
            f"{counted(self.answerable, 'answerable question')} kept, {100 * self.refused:.1f} % of "
            f"{self.unanswerable:,} others refused{found}"
        )


def calibrate(output: str | Path, questions: str) -> Calibration:
    """Sets the threshold of the index in a folder, in its manifest, by questions in a file.

    A row has "prompt" (or "question") and tells whether the documents answer it: by "answerable" (true or false) or by
    "source" (the document that does, or null). The threshold is where the share of answerable questions kept plus the
    share of others refused is highest (Youden's index), halfway between the two nearest confidences.

    Raises:
      UserError: a row that tells neither, or questions of one kind alone.
    """
    folder = local(output, WHAT)
    index = open_index(folder)
    asked, sources, known = _read(questions, index)
    confidences = np.array([index.confidence(question) for question in asked])
    kinds = [counted(sum(known), "answerable question"), f"{len(known) - sum(known):,} others"]
    if all(known) or not any(known):
        raise UserError(
            f"{questions}: {' and '.join(kinds)}: a threshold needs questions of both kinds"
        )
    answerable = np.array(known)
    threshold = best_threshold(confidences[answerable], confidences[~answerable])
    about = read_manifest(folder)["index"] | {"threshold": threshold}
    note(folder, index=about)
    named = [number for number, source in enumerate(sources) if source]
    return Calibration(
        threshold,
        int(answerable.sum()),
        int((~answerable).sum()),
        float(np.mean(confidences[answerable] >= threshold)),
        float(np.mean(confidences[~answerable] < threshold)),
        _measured(
            index, [asked[number] for number in named], [sources[number] for number in named]
        ),
    )


def best_threshold(answerable: np.ndarray, others: np.ndarray) -> float:
    """Where the share of the first at or above it plus the share of the others below it is highest.

    Of several such thresholds the middle of the lowest gap: a refusal is the dearer mistake.

    >>> best_threshold(np.array([0.6, 0.9]), np.array([0.1, 0.2]))
    0.4
    """
    values = np.unique(np.concatenate([answerable, others]))
    edges = np.concatenate([values[:1], (values[:-1] + values[1:]) / 2])
    gained = [np.mean(answerable >= edge) + np.mean(others < edge) for edge in edges]
    return float(edges[int(np.argmax(gained))])


def _read(questions: str, index: Index) -> tuple[list[str], list[str], list[bool]]:
    """The questions, the source that each names ("" for none), and whether the documents answer it."""
    there = set(index.documents["source"].to_pylist())
    asked, sources, known = list[str](), list[str](), list[bool]()
    for origin, row in read_objects(questions):
        if not ({"prompt", "question"} & row.keys()):
            raise UserError(f"{origin}: a row needs prompt or question")
        if not ({"answerable", "source"} & row.keys()):
            raise UserError(
                f"{origin}: a row tells by answerable (true or false) or source whether the documents answer it"
            )
        source = row.get("source") or ""
        if not isinstance(source, str) or (source and source not in there):
            raise UserError(f"{origin}: source {shown(source)} is no document of {index.name}")
        answerable = row.get("answerable", bool(source))
        if not isinstance(answerable, bool):
            raise UserError(f"{origin}: answerable takes true or false, not {shown(answerable)}")
        asked.append(question_of(origin, row.get("prompt", row.get("question"))))  # type: ignore[arg-type]
        sources.append(source)
        known.append(answerable)
    if not asked:
        raise UserError(f"{questions}: no questions: the file is empty")
    return asked, sources, known


def _measured(index: Index, asked: Sequence[str], sources: Sequence[str]) -> dict[str, float]:
    """The measures over documents: each counts where the first of its chunks stands."""
    if not asked:
        return {}
    found = index.passages(index.search(asked, LOOKED_AT))
    rankings = [list(dict.fromkeys(passage.source for passage in each)) for each in found]
    return measures(rankings, [{source: 1.0} for source in sources])
