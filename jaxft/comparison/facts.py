"""What a lever still knows once the facts have changed, and nothing is tuned anew.

The answers that the documents hold change places: each that a test question has for its reference gives its place to
the next, in a copy of the documents and in the references alike. What reads the documents is asked again, over an index
of the copy. What does not read them would say the same again, and its answers are held against the new references.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxft.comparison.given import Given
from jaxft.evaluation.evaluate import summarize
from jaxft.evaluation.items import Item
from jaxft.evaluation.metrics import ANSWER
from jaxft.retrieval import update_index
from jaxft.retrieval.documents import Unreadable, read_documents

FOLDER = "changed"  # in RUN


@dataclasses.dataclass(frozen=True)
class Facts:
    """Facts that have changed.

    Attributes:
        given: what every lever gets, with an index of the changed documents, and of the test the questions on what has
            changed, with their new references.
        before: those questions with the references that they had.
    """

    given: Given
    before: Sequence[Item]


def changed_facts(given: Given) -> Facts | None:
    """The facts after the change; None where no documents are given, or no two of their facts are asked for."""
    if not given.index or given.metric.needs != ANSWER or given.graders:
        return None
    texts = [one.text for one in read_documents(given.config.data.documents, Unreadable(skip=True))]
    ring = ring_of((text for item in given.test for text in item.references), texts)
    both = [(item, after) for item in given.test if (after := _with(item, ring)) is not None]
    if not both:
        return None
    folder = given.folder / FOLDER
    (folder / "documents").mkdir(parents=True, exist_ok=True)
    for place, text in enumerate(texts):
        file = folder / "documents" / f"{place:06}.txt"
        file.write_text(exchanged(text, ring), encoding="utf-8")
    index = folder / "index"
    update_index(index, [str(folder / "documents")], {"tokenizer": given.config.model})
    later = dataclasses.replace(given, index=str(index), test=[item for _, item in both])
    return Facts(later, [item for item, _ in both])


def ring_of(references: Iterable[str], texts: Sequence[str]) -> dict[str, str]:
    """{fact: the one that takes its place} of the references that stand in the texts; {} where there are not two.

    >>> ring_of(["Ada", " Ben", "Cy"], ["Ada is a baker.", "Cy and Ben sail."])
    {'Ada': 'Ben', 'Ben': 'Cy', 'Cy': 'Ada'}
    """
    wanted = sorted({text.strip() for text in references} - {""})
    found = [fact for fact in wanted if any(_pattern([fact]).search(text) for text in texts)]
    return dict(zip(found, [*found[1:], *found[:1]], strict=True)) if len(found) > 1 else {}


def exchanged(text: str, ring: Mapping[str, str]) -> str:
    """The text with each fact in the place of the one before it.

    >>> exchanged("Ada met Ben and Adam.", {"Ada": "Ben", "Ben": "Ada"})
    'Ben met Ada and Adam.'
    """
    return _pattern(list(ring)).sub(lambda match: ring[match[0]], text)


def _pattern(facts: Sequence[str]) -> re.Pattern[str]:
    """The facts as whole words, the longest first."""
    longest = sorted(facts, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest))})(?!\w)")


def _with(item: Item, ring: Mapping[str, str]) -> Item | None:
    """The question with its references after the change; None where they do not change, or it names a fact itself."""
    facts = [text.strip() for text in item.references]
    if (
        not facts
        or not all(fact in ring for fact in facts)
        or _pattern(list(ring)).search(str(item.prompt))
    ):
        return None
    return dataclasses.replace(item, references=tuple(ring[fact] for fact in facts))


def known_still(
    facts: Facts, said: Sequence[Mapping[str, Any]], again: Sequence[Mapping[str, Any]] | None
) -> dict[str, Any]:
    """Scores the questions whose facts have changed.

    Args:
        facts: the change.
        said: records of all test questions, before it.
        again: of the changed questions, of a lever that was asked again; None: it would say the same.

    Returns:
        {before: the metric with the old facts, value: with the new ones, low, high: its interval, n: the questions}.
    """
    answers = {record["origin"]: record["answer"] for record in said}
    later = answers if again is None else {record["origin"]: record["answer"] for record in again}
    before, after = (
        figure_of(facts.given, items, answer)
        for items, answer in ((facts.before, answers), (facts.given.test, later))
    )
    told = {"value": after.value, "low": after.low, "high": after.high, "n": after.n}
    return {"before": before.value, **told}


def figure_of(given: Given, items: Sequence[Item], answers: Mapping[str, str | None]) -> Any:
    """The metric's figure of what was said to the items, by their origins."""
    answered = [dataclasses.replace(item, answer=answers.get(item.origin)) for item in items]
    return summarize([given.metric], answered).metrics[given.metric.name]
