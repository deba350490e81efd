"""Measures of rankings, beside trec_eval's."""

import json
from pathlib import Path

import pytest

from jaxft.retrieval.measures import measures, ndcg, recall, reciprocal_rank

GOLDEN = json.loads((Path(__file__).parent / "golden" / "measures.json").read_text())


def test_measures_are_trec_evals():
    for row in GOLDEN:
        ranking, relevant, expected = row["ranking"], row["relevant"], row["expected"]
        for k in (1, 4, 10):
            assert recall(ranking, relevant, k) == pytest.approx(expected[f"recall_{k}"], abs=1e-6)
        assert ndcg(ranking, relevant, 10) == pytest.approx(expected["ndcg_cut_10"], abs=1e-6)
        assert reciprocal_rank(ranking, relevant) == pytest.approx(expected["recip_rank"], abs=1e-6)
    assert len({row["expected"]["ndcg_cut_10"] for row in GOLDEN}) > 20


def test_they_are_averaged_over_queries():
    found = measures([row["ranking"] for row in GOLDEN], [row["relevant"] for row in GOLDEN])
    for ours, theirs in (
        ("recall@4", "recall_4"),
        ("ndcg@10", "ndcg_cut_10"),
        ("mrr", "recip_rank"),
    ):
        mean = sum(row["expected"][theirs] for row in GOLDEN) / len(GOLDEN)
        assert found[ours] == pytest.approx(mean, abs=1e-6)
