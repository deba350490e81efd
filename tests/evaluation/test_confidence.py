"""Intervals that cover what they promise, and comparisons that call chance a win in 5 of 100 times."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from jaxft.evaluation import confidence
from jaxft.evaluation.confidence import difference, figure
from jaxft.evaluation.metrics import METRICS, mean

DRAWS = 2500  # the standard error of a share of 5 % is then 0.44 %


def scored(scores):
    return np.stack([scores, np.ones(len(scores))], axis=1)


def draw(kind, n, generator):
    """Two equally good systems on n items: what each item adds to a metric."""
    if kind == "f1":
        return tuple(scored(one) for one in generator.beta(0.4, 0.6, size=(2, n)))
    if (
        kind == "loss"
    ):  # sums over tokens, of which items have other numbers; hard items are hard for both
        tokens = generator.integers(2, 30, n).astype(float)
        hard = generator.gamma(2.0, 1.0, n)
        sums = tokens * (hard + generator.normal(0, 0.3, (2, n)))
        return tuple(np.stack([one, tokens], axis=1) for one in sums)
    return tuple(scored((one < float(kind)).astype(float)) for one in generator.random(size=(2, n)))


def share_of_wins(kind, n):
    generator = np.random.default_rng(n)
    verdicts = [difference(*draw(kind, n, generator), range(n), mean).verdict for _ in range(DRAWS)]
    return sum(verdict != "cannot tell" for verdict in verdicts) / DRAWS


def share_of_wins_exactly(right, n):
    """The same of scores of right and wrong, over all outcomes: how many items differ, and for which system."""
    total = 0.0
    for differ in range(n + 1):
        odds = stats.binom.pmf(differ, n, 2 * right * (1 - right))
        for first in range(differ // 2 + 1):  # the other half mirrors this one
            change = np.repeat([1.0, -1.0, 0.0], [first, differ - first, n - differ])
            found = difference(scored(np.zeros(n)), scored(change), range(n), mean)
            ways = stats.binom.pmf(first, differ, 0.5) * (2 if 2 * first < differ else 1)
            total += odds * ways * (found.verdict != "cannot tell")
    return total


@pytest.mark.parametrize(("kind", "n"), [("f1", 20), ("loss", 50)])
def test_of_equally_good_systems_one_in_twenty_wins(kind, n):
    assert 0.04 <= share_of_wins(kind, n) <= 0.06


@pytest.mark.parametrize(("right", "n"), [(0.5, 20), (0.8, 20), (0.8, 50)])
def test_of_equally_right_systems_one_in_twenty_wins(right, n):
    assert 0.04 <= share_of_wins_exactly(right, n) <= 0.06


@pytest.mark.thorough
@pytest.mark.parametrize("n", [20, 50, 100, 300])
@pytest.mark.parametrize("kind", ["f1", "loss"])
def test_of_equally_good_systems_one_in_twenty_wins_with_any_number_of_items(kind, n):
    assert 0.04 <= share_of_wins(kind, n) <= 0.06


@pytest.mark.thorough
@pytest.mark.parametrize("n", [20, 30, 50, 100])
@pytest.mark.parametrize("right", [0.5, 0.7, 0.8])
def test_of_equally_right_systems_one_in_twenty_wins_with_any_number_of_items(right, n):
    assert 0.04 <= share_of_wins_exactly(right, n) <= 0.06


def test_where_hardly_any_item_differs_chance_wins_less():
    """Two of ten items differ on average: no test could say more with 5 % of errors."""
    assert share_of_wins_exactly(0.9, 10) <= 0.02


@pytest.mark.parametrize(
    ("kind", "n", "truth"), [("f1", 20, 0.4), ("0.8", 20, 0.8), ("0.9", 50, 0.9)]
)
def test_intervals_cover_the_truth(kind, n, truth):
    """At least 93 of 100; of right and wrong answers, which take few values, more than 95."""
    generator = np.random.default_rng(n)
    covered = 0
    for _ in range(1000):
        found = figure(draw(kind, n, generator)[0], range(n), mean, most=1.0)
        covered += found.low <= truth <= found.high
    assert covered / 1000 >= 0.93


def test_items_of_a_cluster_count_once():
    """Each item four times is no more knowledge: the interval is that of the items."""
    scores = np.random.default_rng(0).random(25)
    once = figure(scored(scores), range(25), mean)
    alike = figure(scored(np.repeat(scores, 4)), np.repeat(range(25), 4).tolist(), mean)
    assert (alike.n, alike.clusters) == (100, 25)
    assert (alike.value, alike.low, alike.high) == pytest.approx((once.value, once.low, once.high))
    apart = figure(scored(np.repeat(scores, 4)), range(100), mean)
    assert apart.high - apart.low < 0.6 * (once.high - once.low)


def test_where_all_are_right_the_interval_is_clopper_and_pearsons():
    """scipy.stats.binomtest(20, 20).proportion_ci() is (0.8315664, 1.0)."""
    right = figure(scored(np.ones(20)), range(20), mean, most=1.0)
    assert (right.low, right.high) == pytest.approx((0.8315664, 1.0), abs=1e-6)
    wrong = figure(scored(np.zeros(20)), range(20), mean, most=1.0)
    assert (wrong.low, wrong.high) == pytest.approx((0.0, 1 - 0.8315664), abs=1e-6)


def test_of_one_item_or_none_no_interval_is_claimed():
    one = figure(scored(np.ones(1)), [0], mean, most=1.0)
    assert (one.value, one.low, one.high, one.n) == (1.0, None, None, 1)
    none = figure(np.full((3, 2), np.nan), range(3), mean)
    assert (none.value, none.n) == (None, 0)
    assert difference(*[scored(np.ones(1))] * 2, [0], mean).verdict == "cannot tell"


def test_a_better_system_is_told_whichever_way_is_better():
    generator = np.random.default_rng(3)
    first = generator.random(60)
    second = first + 0.1 + generator.normal(0, 0.1, 60)
    assert difference(scored(first), scored(second), range(60), mean).verdict == "better"
    assert difference(scored(first), scored(second), range(60), mean, lower=True).verdict == "worse"


def test_the_items_that_it_says_are_about_what_is_needed():
    """With so many more, four tries of five tell the difference."""
    generator = np.random.default_rng(5)
    change = stats.zscore(generator.normal(size=40)) + 0.15
    found = difference(scored(np.zeros(40)), scored(change), range(40), mean)
    assert found.verdict == "cannot tell"
    needed, told = 40 + found.more, 0
    for _ in range(200):
        again = scored(generator.normal(0.15, 1.0, needed))
        told += difference(scored(np.zeros(needed)), again, range(needed), mean).verdict == "better"
    assert 0.72 <= told / 200 <= 0.88


def test_items_without_a_score_are_left_out_of_both():
    first, second = scored(np.arange(10.0)), scored(np.arange(10.0) + 1)
    first[0], second[1] = np.nan, np.nan
    found = difference(first, second, range(10), mean)
    assert (found.value, found.n) == (1.0, 8)


def test_many_items_are_resampled_in_blocks(monkeypatch):
    rows = scored(np.random.default_rng(0).random(300))
    whole = figure(rows, range(300), mean)
    monkeypatch.setattr(confidence, "AT_ONCE", 300 * 64)
    parts = figure(rows, range(300), mean)
    assert parts.low == pytest.approx(whole.low, abs=0.005)
    assert parts.high == pytest.approx(whole.high, abs=0.005)


def test_perplexity_has_the_losss_interval():
    rows = np.stack([np.random.default_rng(0).gamma(2.0, 5.0, 40), np.full(40, 10.0)], axis=1)
    loss, perplexity = (
        figure(rows, range(40), METRICS[name].value) for name in ("loss", "perplexity")
    )
    assert np.log([perplexity.low, perplexity.high]) == pytest.approx([loss.low, loss.high], 1e-3)
