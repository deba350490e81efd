"""Scores of answers beside references that count n-grams: ROUGE, NIST and CIDEr.

Each gives an item numbers that add up, so that a resampled corpus needs no text: its score is a function of their sum.
BLEU and chrF are sacrebleu's (`overlap.py`).
"""

from __future__ import annotations

import collections
import functools
import math
import re
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

Tokens = Sequence[str]
Counts = collections.Counter[tuple[str, ...]]
References = Sequence[str]

NIST_ORDER = 5
CIDER_ORDER = 4
CIDER_SIGMA = 6.0
# At a ratio of lengths of 2/3 the penalty is 1/2.
NIST_BETA = -math.log(0.5) / math.log(1.5) ** 2
PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "(", ")", "{", "}", ".", "?", "!", ",", ":", "-", "--", "...", ";", '"']
)


def ngrams(tokens: Tokens, order: int) -> Counts:
    """How often each run of `order` tokens stands in them.

    >>> ngrams(["a", "b", "a", "b"], 2)[("a", "b")]
    2
    """
    runs = (tuple(tokens[start : start + order]) for start in range(len(tokens) - order + 1))
    return collections.Counter(runs)


def rouge_n(answer: str, references: References, order: int) -> float:
    """ROUGE-N's F (Lin 2004, https://aclanthology.org/W04-1013), of the reference where it is highest.

    Texts are lowered and split at what is no letter a-z or digit, as rouge-score 0.1.2 does without its stemmer.

    >>> rouge_n("the cat sat", ["The cat."], 1)
    0.8
    """
    return max(_rouge_n(rouge_tokens(answer), rouge_tokens(one), order) for one in references)


def rouge_l(answer: str, references: References) -> float:
    """ROUGE-L's F: of the longest common subsequence; of the reference where it is highest.

    >>> rouge_l("a b c d", ["a c d"])
    0.8571428571428571
    """
    return max(_rouge_l(rouge_tokens(answer), rouge_tokens(one)) for one in references)


def rouge_tokens(text: str) -> list[str]:
    """What ROUGE counts as words.

    >>> rouge_tokens("It's 3.5!")
    ['it', 's', '3', '5']
    """
    return re.findall("[a-z0-9]+", text.lower())


def _rouge_n(answer: Tokens, reference: Tokens, order: int) -> float:
    said, wanted = ngrams(answer, order), ngrams(reference, order)
    return _f_score((said & wanted).total(), said.total(), wanted.total())


def _rouge_l(answer: Tokens, reference: Tokens) -> float:
    lengths = [0] * (len(reference) + 1)
    for token in answer:
        before = 0
        for index, other in enumerate(reference, start=1):
            above = lengths[index]
            lengths[index] = before + 1 if token == other else max(above, lengths[index - 1])
            before = above
    return _f_score(lengths[-1], len(answer), len(reference))


def _f_score(common: int, said: int, wanted: int) -> float:
    precision, recall = common / max(said, 1), common / max(wanted, 1)
    return 2 * precision * recall / (precision + recall) if common else 0.0


def nist_rows(
    answers: Sequence[str], references: Sequence[References], tokens_of: Callable[[str], Tokens]
) -> Float[np.ndarray, "items 11"]:
    """What `nist_of` needs of each item: the information of the n-grams that are in a reference, how many n-grams the
    answer has, n = 1 to 5, and how long its references are on average.

    An n-gram's information is log2(count of its first n - 1 tokens / its own count) in all references.
    Departure from E2E's script: an answer of fewer than n tokens has 0 n-grams there, and not a negative number.
    """
    cut = [[tokens_of(one.lower()) for one in each] for each in references]
    counts = [Counts() for _ in range(NIST_ORDER + 1)]
    for tokens in (tokens for each in cut for tokens in each):
        counts[0][()] += len(tokens)
        for order in range(1, NIST_ORDER + 1):
            counts[order].update(ngrams(tokens, order))
    rows = np.zeros((len(answers), 2 * NIST_ORDER + 1))
    for row, answer, each in zip(rows, answers, cut, strict=True):
        said = tokens_of(answer.lower())
        row[-1] = sum(map(len, each)) / len(each)
        for order in range(1, NIST_ORDER + 1):
            known = functools.reduce(Counts.__or__, (ngrams(one, order) for one in each))
            hits = ngrams(said, order) & known
            row[order - 1] = sum(
                times * math.log2(counts[order - 1][gram[:-1]] / counts[order][gram])
                for gram, times in hits.items()
            )
            row[NIST_ORDER + order - 1] = max(len(said) - order + 1, 0)
    return rows


def nist_of(sums: Float[np.ndarray, "... 11"]) -> Float[np.ndarray, "..."]:
    """NIST's score (Doddington 2002) of the sums of `nist_rows`: information an n-gram, over all n, times a penalty of
    answers that are shorter than their references.
    """
    information, lengths = sums[..., :NIST_ORDER], sums[..., NIST_ORDER:-1]
    gained = (information / np.maximum(lengths, 1.0)).sum(axis=-1)
    ratio = lengths[..., 0] / np.maximum(sums[..., -1], 1e-9)
    penalty = np.exp(-NIST_BETA * np.log(np.clip(ratio, 1e-9, 1.0)) ** 2)
    return np.asarray(gained * penalty)


def cider_scores(
    answers: Sequence[Tokens], references: Sequence[Sequence[Tokens]]
) -> Float[np.ndarray, " items"]:
    """CIDEr-D of each item, from 0 to 10 (arXiv 1411.5726, section 5; E2E's script and COCO's report its mean).

    n-grams, n = 1 to 4, weigh by how often they stand in the text and how few items have them in a reference; the
    similarity is a cosine in which the answer's weights are clipped at the reference's, times a penalty for another
    length.

    Args:
        answers: the tokens of each.
        references: likewise, one or more an item.
    """
    seen = Counts()
    for each in references:
        seen.update({gram for tokens in each for gram in _all_grams(tokens)})
    most = math.log(len(references))

    def vectors(tokens: Tokens) -> list[dict[tuple[str, ...], float]]:
        return [
            {gram: n * (most - math.log(max(seen[gram], 1))) for gram, n in grams.items()}
            for grams in (ngrams(tokens, order) for order in range(1, CIDER_ORDER + 1))
        ]

    def similarity(answer: Tokens, reference: Tokens) -> float:
        # COCO's script takes the number of bigrams for the length.
        delta = max(len(answer) - 1, 0) - max(len(reference) - 1, 0)
        penalty = math.exp(-(delta**2) / (2 * CIDER_SIGMA**2))
        total = 0.0
        for said, wanted in zip(vectors(answer), vectors(reference), strict=True):
            product = sum(
                min(said[gram], wanted[gram]) * wanted[gram] for gram in said if gram in wanted
            )
            norms = math.hypot(*said.values()) * math.hypot(*wanted.values())
            total += product / norms if norms else product
        return penalty * total / CIDER_ORDER

    return np.asarray(
        [
            10 * sum(similarity(answer, one) for one in each) / len(each)
            for answer, each in zip(answers, references, strict=True)
        ]
    )


def _all_grams(tokens: Tokens) -> set[tuple[str, ...]]:
    return {gram for order in range(1, CIDER_ORDER + 1) for gram in ngrams(tokens, order)}
