"""How alike two texts are, from 0 to 1: the measures of `text_similarity`.

fuzzy_match          2 M / (length + length), M the longest common subsequence of letters: RapidFuzz's `ratio`
bleu                 sentence BLEU (Papineni et al. 2002) by sacrebleu, smoothed by exp, as sacrebleu has it by default
gleu                 the lower of precision and recall of all 1- to 4-grams (arXiv 1609.08144): NLTK's
meteor               Banerjee and Lavie 2005, of equal words: alpha 0.9, beta 3, gamma 0.5, as NLTK's, which takes
                     stems and WordNet's synonyms for equal too
rouge_1 ... rouge_5  F1 of n-grams, rouge_l that of the longest common subsequence (Lin 2004): rouge_score's, unstemmed
"""

from __future__ import annotations

import collections
import importlib
import importlib.util
import itertools
import re
from collections.abc import Callable, Sequence

from jaxft.errors import UserError

Measure = Callable[[str, str], float]
MOST_STEPS = 4e10  # elements of a text times elements of the other: some seconds


class TooLong(Exception):
    """The texts are too long to be compared; the message says how long they are."""


def common_length(left: Sequence[str], right: Sequence[str]) -> int:
    """Of the longest common subsequence, by bits of one number (Hyyro 2004): a step an element of the longer text.

    Raises:
        TooLong: their lengths' product is above `MOST_STEPS`.

    >>> common_length("kitten", "sitting")
    4
    """
    left, right = sorted((left, right), key=len)
    if len(left) * len(right) > MOST_STEPS:
        raise TooLong(
            f"texts of {len(left):,} and {len(right):,} elements are too long to be compared"
        )
    indices: dict[str, int] = {}
    for index, element in enumerate(left):
        indices[element] = indices.get(element, 0) | 1 << index
    full = (1 << len(left)) - 1
    row = full
    for element in right:
        hits = row & indices.get(element, 0)
        row = (row + hits | row - hits) & full
    return len(left) - row.bit_count()


def fuzzy_match(said: str, reference: str) -> float:
    """2 M / (length + length) of letters.

    >>> fuzzy_match("this is a test", "this is a test!")
    0.9655172413793104
    """
    if not said and not reference:
        return 1.0
    return 2 * common_length(said, reference) / (len(said) + len(reference))


def bleu(said: str, reference: str) -> float:
    """Sentence BLEU, by sacrebleu."""
    library = importlib.import_module("sacrebleu")
    return min(1.0, float(library.sentence_bleu(said, [reference]).score) / 100)


def gleu(said: str, reference: str) -> float:
    """The lower of precision and recall of all 1- to 4-grams of words.

    >>> gleu("the cat sat", "the cat sat"), gleu("the cat", "the cat sat")
    (1.0, 0.5)
    """
    left, right = said.split(), reference.split()
    grams = [
        sum((_grams(words, n) for n in range(1, 5)), collections.Counter())
        for words in (left, right)
    ]
    most = max(grams[0].total(), grams[1].total())
    return (grams[0] & grams[1]).total() / most if most else 0.0


def meteor(said: str, reference: str) -> float:
    """F of matched words, less by how many pieces the matches stand in.

    >>> round(meteor("the cat sat on the mat", "on the mat sat the cat"), 4)
    0.5
    """
    left, right = said.lower().split(), reference.lower().split()
    pairs = _matched(left, right)
    if not pairs:
        return 0.0
    precision, recall = len(pairs) / len(left), len(pairs) / len(right)
    mean = precision * recall / (0.9 * precision + 0.1 * recall)
    chunks = 1 + sum((a + 1, b + 1) != after for (a, b), after in itertools.pairwise(pairs))
    return mean * (1 - 0.5 * (chunks / len(pairs)) ** 3)


def _matched(left: Sequence[str], right: Sequence[str]) -> list[tuple[int, int]]:
    """Indices of equal words, each used once, from the last on, as NLTK pairs them."""
    indices = collections.defaultdict(list)
    for index, word in enumerate(right):
        indices[word].append(index)
    pairs = [
        (index, indices[left[index]].pop())
        for index in range(len(left) - 1, -1, -1)
        if indices.get(left[index])
    ]
    return pairs[::-1]


def rouge_n(n: int) -> Measure:
    """F1 of n-grams of words.

    >>> rouge_n(1)("The cat, the mat", "a cat on a mat")
    0.4444444444444444
    """

    def measure(said: str, reference: str) -> float:
        left, right = (_grams(_words(text), n) for text in (said, reference))
        return _f1((left & right).total(), left.total(), right.total())

    return measure


def rouge_l(said: str, reference: str) -> float:
    """F1 of the longest common subsequence of words.

    >>> rouge_l("police killed the gunman", "police kill the gunman")
    0.75
    """
    left, right = _words(said), _words(reference)
    return _f1(common_length(left, right), len(left), len(right))


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _grams(words: Sequence[str], n: int) -> collections.Counter[tuple[str, ...]]:
    return collections.Counter(
        tuple(words[index : index + n]) for index in range(len(words) - n + 1)
    )


def _f1(common: int, left: int, right: int) -> float:
    return 2 * common / (left + right) if common else 0.0


MEASURES: dict[str, Measure] = {
    "fuzzy_match": fuzzy_match,
    "bleu": bleu,
    "gleu": gleu,
    "meteor": meteor,
    "rouge_l": rouge_l,
    **{f"rouge_{n}": rouge_n(n) for n in range(1, 6)},
}
NEEDED = {  # measure or grader: (the package that it needs, the extra that brings it)
    "bleu": ("sacrebleu", "graders"),
    "cosine": ("wordllama", "static"),
    "math": ("math_verify", "graders"),
    "json_schema": ("jsonschema", "graders"),
}


def check_installed(name: str) -> None:
    """Raises UserError where the package that a measure or a grader needs is not installed."""
    package, extra = NEEDED.get(name, ("", ""))
    if package and importlib.util.find_spec(package) is None:
        raise UserError(f"the package {package} is not installed: pip install 'jaxft[{extra}]'")
