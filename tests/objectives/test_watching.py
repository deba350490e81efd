"""What is said of a run that learns from rewards: each mistake is planted, and found once."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from jaxft.objectives.watching import MOST, Watch, correlation

FINE = {
    "reward": 0.5,
    "length": 20.0,
    "watched": math.nan,
    "by_length": 0.0,
    "truncated": 0.0,
    "same": 0.2,
}


def said(batches, watch=None):
    """(number of the batch, line) of all that is said."""
    watch = watch or Watch(64)
    return [
        (number, line)
        for number, batch in enumerate(batches, 1)
        for line in watch.lines(**FINE | batch)
    ]


def noisy(middle, seed, spread=0.02):
    return [float(value) for value in np.random.default_rng(seed).normal(middle, spread)]


RISING = np.linspace(0.2, 0.8, 200)
STILL = np.full(200, 0.4)


@pytest.mark.parametrize("seed", range(5))
def test_a_proxy_that_rises_alone_is_told_before_a_fifth_of_the_run_is_over(seed):
    proxy, held = noisy(RISING, seed), noisy(STILL, seed + 100)
    [(number, line)] = said({"reward": a, "watched": b} for a, b in zip(proxy, held, strict=True))
    assert number < 40
    assert "held-out graders has not" in line


@pytest.mark.parametrize("seed", range(5))
def test_rewards_that_rise_together_are_no_finding(seed):
    proxy, held = noisy(RISING, seed), noisy(RISING / 2, seed + 100)
    assert not said({"reward": a, "watched": b} for a, b in zip(proxy, held, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_a_run_that_learns_nothing_yet_is_no_finding(seed):
    proxy, held = noisy(STILL, seed), noisy(STILL, seed + 100)
    assert not said({"reward": a, "watched": b} for a, b in zip(proxy, held, strict=True))


def test_rewards_that_rise_with_length_alone_are_told():
    rewards, lengths = noisy(RISING, 0), noisy(20 + 40 * RISING, 1, 1.0)
    longer = [
        {"reward": a, "length": b, "by_length": 0.8} for a, b in zip(rewards, lengths, strict=True)
    ]
    [(_, line)] = said(longer)
    assert "rises with the length" in line
    assert not said(batch | {"by_length": 0.1} for batch in longer)


def test_groups_of_one_reward_are_told_once():
    [(number, line)] = said([{"same": 1.0}] * 9)
    assert number == 3
    assert "nothing is learned" in line
    assert not said([{"same": 1.0}, {"same": 1.0}, {"same": 0.9}] * 9)


def test_answers_that_are_cut_off_are_told():
    [(_, line)] = said([{"truncated": 0.2}] * 9)
    assert "20 % of the answers reach config.rollout.max_new_tokens=64" in line
    assert not said([{"truncated": 0.05}] * 9)


def test_it_goes_on_from_its_state_and_remembers_little():
    batches = [
        {"reward": a, "watched": b} for a, b in zip(noisy(RISING, 3), noisy(STILL, 4), strict=True)
    ]
    whole, first, then = Watch(64), Watch(64), Watch(64)
    said(batches, whole)
    said(batches[:17], first)
    then.restore(json.loads(json.dumps(first.state(), allow_nan=False)))
    said(batches[17:], then)
    assert then.state() == whole.state()
    assert len(whole.state()["points"]) <= MOST


def test_correlation_is_that_inside_of_groups():
    rewards = np.asarray([[0.0, 1.0], [5.0, 6.0], [np.nan, np.nan]])
    assert correlation(rewards, np.asarray([[1, 2], [1, 2], [9, 1]])) == pytest.approx(1.0)
    assert correlation(rewards, np.asarray([[2, 1], [2, 1], [9, 1]])) == pytest.approx(-1.0)
    assert correlation(rewards[:1] * 0, np.asarray([[2, 1]])) == 0.0
