"""The table of metrics: what each counts of an item, and its value of the counts' sum."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxft.errors import UserError, nearest
from jaxft.evaluation import answers as by_answer
from jaxft.evaluation import ngrams, overlap
from jaxft.evaluation.answers import READINGS, Normalize
from jaxft.evaluation.confidence import Rows, Value
from jaxft.evaluation.items import Item

LIKELIHOOD, ANSWER, PAIR, REWARDS = "likelihood", "answer", "pair", "rewards"
Numbers = Float[np.ndarray, "... numbers"]


@dataclasses.dataclass(frozen=True)
class Metric:
    """One row of the table.

    Attributes:
        name: as `--metrics` takes it.
        needs: "answer" (the model is asked), "likelihood" (of what stands in the data), "pair" (of two completions) or
            "rewards" (of both beside the base).
        rows: of items that have what it needs, the numbers that each adds; NaN where it cannot judge one.
        value: of sums of them.
        lower: whether less is better.
        most: the highest score of an item, where scores are from 0 to that and the value is their mean.
        compares: whether it compares the answer with references.
    """

    name: str
    needs: str
    rows: Callable[[Sequence[Item]], Rows]
    value: Value
    lower: bool = False
    most: float | None = None
    compares: bool = False


def mean(sums: Numbers) -> Float[np.ndarray, "..."]:
    """Of sums (score, weight): the mean; NaN without weight."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(sums[..., 0] / sums[..., 1])


def of_scores(
    name: str, score: Callable[[str, Sequence[str]], float | None], most: float | None = 1.0
) -> Metric:
    """The metric that is the mean of a score of answer and references; None: it cannot judge the answer."""

    def rows(items: Sequence[Item]) -> Rows:
        scores = [score(item.answer or "", item.references) for item in items]
        return np.asarray([(np.nan if one is None else one, 1.0) for one in scores], float)

    return Metric(name, ANSWER, rows, mean, most=most, compares=True)


def _of_likelihood(
    name: str,
    numbers: Callable[[Any], tuple[float, float]],
    value: Value = mean,
    *,
    lower: bool = False,
) -> Metric:
    def rows(items: Sequence[Item]) -> Rows:
        return np.asarray([numbers(item.likelihood) for item in items], float)

    return Metric(name, LIKELIHOOD, rows, value, lower)


def _of_pair(name: str, score: Callable[[Any, Any], float], most: float | None = 1.0) -> Metric:
    def rows(items: Sequence[Item]) -> Rows:
        return np.asarray([(score(*item.pair), 1.0) for item in items if item.pair], float)

    return Metric(name, PAIR, rows, mean, most=most)


def _of_rewards(name: str, score: Callable[[float, float], float], most: float | None) -> Metric:
    def rows(items: Sequence[Item]) -> Rows:
        return np.asarray([(score(*item.rewards), 1.0) for item in items if item.rewards], float)

    return Metric(name, REWARDS, rows, mean, most=most)


def _sacrebleu(name: str, kind: str, **settings: Any) -> Metric:
    def made() -> Any:
        import sacrebleu

        return getattr(sacrebleu, kind)(**settings)

    def rows(items: Sequence[Item]) -> Rows:
        return overlap.statistics(made(), *_texts(items))

    return Metric(name, ANSWER, rows, lambda sums: overlap.value_of(made(), sums), compares=True)


def _nist(items: Sequence[Item]) -> Rows:
    return ngrams.nist_rows(*_texts(items), lambda text: _words(text))


def _cider(items: Sequence[Item]) -> Rows:
    def cut(text: str) -> list[str]:
        return [word for word in _words(text.lower()) if word not in ngrams.PUNCTUATION]

    texts, references = _texts(items)
    scores = ngrams.cider_scores([*map(cut, texts)], [[*map(cut, each)] for each in references])
    return np.stack([scores, np.ones(len(scores))], axis=1)


@functools.lru_cache(maxsize=1)
def _tokenizer() -> Callable[[str], str]:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()


def _words(text: str) -> list[str]:
    """Words and signs as mteval-v13a cuts them."""
    return _tokenizer()(text).split()


def _texts(items: Sequence[Item]) -> tuple[list[str], list[Sequence[str]]]:
    return [item.answer or "" for item in items], [item.references for item in items]


def _table(normalize: Normalize) -> dict[str, Metric]:
    def read(name: str, score: Callable[[str, Sequence[str], Normalize], float]) -> Metric:
        return of_scores(name, lambda answer, references: score(answer, references, normalize))

    rows = (
        _of_likelihood("loss", lambda found: (found.loss, found.tokens), lower=True),
        _of_likelihood(
            "perplexity",
            lambda found: (found.loss, found.tokens),
            lambda sums: np.exp(mean(sums)),
            lower=True,
        ),
        _of_likelihood("token_accuracy", lambda found: (found.hits, found.tokens)),
        read("exact", by_answer.exact),
        read("contains", by_answer.contains),
        read("f1", by_answer.f1),
        _sacrebleu("bleu", "BLEU"),
        _sacrebleu("bleu_lower", "BLEU", lowercase=True),
        _sacrebleu("chrf", "CHRF"),
        of_scores("rouge1", lambda answer, references: ngrams.rouge_n(answer, references, 1)),
        of_scores("rouge2", lambda answer, references: ngrams.rouge_n(answer, references, 2)),
        of_scores("rougeL", ngrams.rouge_l),
        Metric("nist", ANSWER, _nist, ngrams.nist_of, compares=True),
        Metric("cider", ANSWER, _cider, mean, compares=True),
        _of_pair("preference_accuracy", lambda chosen, other: float(chosen.loss < other.loss)),
        _of_pair(
            "preference_accuracy_per_token",
            lambda chosen, other: float(chosen.loss / chosen.tokens < other.loss / other.tokens),
        ),
        _of_pair("preference_margin", lambda chosen, other: other.loss - chosen.loss, most=None),
        _of_rewards("reward_accuracy", lambda chosen, other: float(chosen > other), 1.0),
        _of_rewards("reward_margin", lambda chosen, other: chosen - other, None),
    )
    return {metric.name: metric for metric in rows}


METRICS: Mapping[str, Metric] = _table(READINGS["spaces"])


def metrics_of(names: Sequence[str], normalize: str = "spaces") -> list[Metric]:
    """The metrics of these names.

    Args:
        names: of the table.
        normalize: how answer and references are read before `exact`, `contains` and `f1` compare them: a key of
            `READINGS`.

    Raises:
        UserError: one that does not exist, or none.
    """
    if normalize not in READINGS:
        known = ", ".join(READINGS)
        raise UserError(
            f"normalize {normalize!r} is unknown; known: {known}{nearest(normalize, READINGS)}"
        )
    if not names:
        raise UserError(f"no metric is named; there are: {', '.join(METRICS)}")
    table = _table(READINGS[normalize])
    for name in names:
        if name not in table:
            close = nearest(name, table) or f"; there are: {', '.join(table)}"
            raise UserError(f"metric {name!r} is unknown{close}")
    return [table[name] for name in dict.fromkeys(names)]


def of_grader(name: str) -> Metric:
    """The mean of what a grader gives (`Item.grades`), which is called grader/NAME."""

    def rows(items: Sequence[Item]) -> Rows:
        return np.asarray([(item.grades.get(name, np.nan), 1.0) for item in items], float)

    return Metric(f"grader/{name}", ANSWER, rows, mean)


def metric_named(name: str) -> Metric:
    """The row of the table; of another name, a grader's or a task's, the mean of scores."""
    return METRICS.get(name) or dataclasses.replace(of_grader(name), name=name)
