"""Scores of answers equal those of the packages that define them (tests/golden/make_overlap.py)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jaxft.errors import UserError
from jaxft.evaluation import ngrams
from jaxft.evaluation.items import Item, Likelihood
from jaxft.evaluation.metrics import METRICS, metrics_of

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "overlap.json").read_text())
ITEMS = [
    Item(f"row {number}", "Where?", tuple(references), f"row {number}", answer=answer)
    for number, (answer, references) in enumerate(
        zip(GOLDEN["answers"], GOLDEN["references"], strict=True)
    )
]


def value(name, items):
    metric = METRICS[name]
    return float(metric.value(metric.rows(items).sum(axis=0)))


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_rouge_scores(name):
    found = METRICS[name].rows(ITEMS)[:, 0]
    assert found == pytest.approx(GOLDEN[name], abs=1e-12)


@pytest.mark.parametrize("name", ["bleu", "bleu_lower", "chrf"])
def test_bleu_and_chrf_of_the_sum_are_sacrebleus_of_the_corpus(name):
    """Items have one, two or three references."""
    assert value(name, ITEMS) == pytest.approx(GOLDEN[name], abs=1e-9)


def test_nist_is_that_of_e2es_script():
    items = [ITEMS[place] for place in GOLDEN["nist"]["items"]]
    assert value("nist", items) == pytest.approx(GOLDEN["nist"]["score"], abs=1e-9)


def test_cider_is_that_of_cocos_script():
    """On the same words: which words there are is the tokenizer's affair."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    cut = Tokenizer13a()
    answers = [cut(answer).split() for answer in GOLDEN["answers"]]
    references = [[cut(one).split() for one in each] for each in GOLDEN["references"]]
    assert ngrams.cider_scores(answers, references) == pytest.approx(GOLDEN["cider"], abs=1e-9)


def test_a_perfect_answer_has_the_highest_score_of_every_metric():
    perfect = [
        Item(item.origin, item.prompt, item.references[:1], item.cluster, answer=item.references[0])
        for item in ITEMS
    ]
    highest = {"bleu": 100, "bleu_lower": 100, "chrf": 100, "cider": 10}
    for name, metric in METRICS.items():
        if metric.needs == "answer" and name != "nist":
            assert value(name, perfect) == pytest.approx(highest.get(name, 1)), name


def test_how_texts_are_read_decides_what_is_exact():
    items = [Item("row 1", "?", ("The Cat",), "row 1", answer=" the  cat. ")]
    found = {}
    for reading in ("none", "spaces", "lower", "squad"):
        (metric,) = metrics_of(["exact"], reading)
        found[reading] = metric.rows(items)[0, 0]
    assert found == {"none": 0, "spaces": 0, "lower": 0, "squad": 1}


def test_losses_weigh_tokens_and_not_items():
    items = [
        Item("row 1", "", (), "1", likelihood=Likelihood(loss=8.0, tokens=4, hits=1)),
        Item("row 2", "", (), "2", likelihood=Likelihood(loss=1.0, tokens=1, hits=1)),
    ]
    assert value("loss", items) == 9 / 5
    assert value("perplexity", items) == pytest.approx(np.exp(9 / 5))
    assert value("token_accuracy", items) == 2 / 5


def test_a_pair_is_judged_by_its_sums_and_by_its_means():
    """The longer completion costs more in all, and less a token."""
    pair = Likelihood(6.0, 6, 0), Likelihood(4.0, 2, 0)
    items = [Item("row 1", "", (), "1", pair=pair)]
    assert value("preference_accuracy", items) == 0
    assert value("preference_accuracy_per_token", items) == 1
    assert value("preference_margin", items) == -2


def test_unknown_names_are_told_with_the_nearest():
    with pytest.raises(UserError, match=r"metric 'blue' is unknown \(nearest: 'bleu'"):
        metrics_of(["loss", "blue"])
    with pytest.raises(UserError, match=r"normalize 'squadd' is unknown.*nearest: 'squad'"):
        metrics_of(["exact"], "squadd")
    with pytest.raises(UserError, match="no metric is named; there are: loss"):
        metrics_of([])
