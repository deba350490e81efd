"""Scores of one answer beside its references, each from 0 to 1."""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Callable, Sequence

Normalize = Callable[[str], str]


def _squad(text: str) -> str:
    """SQuAD's reading (arXiv 1606.05250): small letters, without punctuation and articles."""
    small = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", small).split())


# How texts are read before they are compared, by the name that a reader gives.
READINGS: dict[str, Normalize] = {
    "none": lambda text: text,
    "spaces": lambda text: " ".join(text.split()),
    "lower": lambda text: " ".join(text.lower().split()),
    "squad": _squad,
}


def exact(answer: str, references: Sequence[str], normalize: Normalize) -> float:
    """1.0 where the answer is one of the references.

    >>> exact(" A  cat", ["A cat"], READINGS["spaces"]), exact("cat.", ["The cat"], READINGS["squad"])
    (1.0, 1.0)
    """
    return float(normalize(answer) in map(normalize, references))


def contains(answer: str, references: Sequence[str], normalize: Normalize) -> float:
    """1.0 where a reference stands in the answer, whole words of it.

    >>> contains("It is 12 cats.", ["12"], READINGS["squad"]), contains("120 cats", ["12"], READINGS["squad"])
    (1.0, 0.0)
    """
    said = normalize(answer)
    wanted = (re.escape(normalize(one)) for one in references)
    return float(any(one and re.search(rf"(?<!\w){one}(?!\w)", said) for one in wanted))


def f1(answer: str, references: Sequence[str], normalize: Normalize) -> float:
    """The harmonic mean of precision and recall of words, of the reference where it is highest (SQuAD's F1).

    >>> f1("a black cat", ["the black dog"], READINGS["squad"])
    0.5
    """
    return max(_f1(normalize(answer).split(), normalize(one).split()) for one in references)


def _f1(said: Sequence[str], wanted: Sequence[str]) -> float:
    if not said or not wanted:
        return float(said == wanted)
    common = (collections.Counter(said) & collections.Counter(wanted)).total()
    return 2 * common / (len(said) + len(wanted))
