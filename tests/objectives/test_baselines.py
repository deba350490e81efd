"""Advantages: TRL's from its own lines, verl's written out, and rewards that cannot be judged."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxft
from jaxft.errors import UserError
from jaxft.objectives.baselines import leave_one_out, over_greedy, whitened_returns

GOLDEN = json.loads((Path(__file__).parent / "golden" / "policy.json").read_text())
MASK = np.asarray([[1, 1, 1, 0], [1, 1, 0, 0]])


@pytest.mark.parametrize(
    "case",
    GOLDEN["advantages"],
    ids=lambda case: f"{case['rewards']}-{case['group']}-{case['settings']}",
)
def test_advantages_are_trls(case):
    asked = dict(case["settings"])
    function = leave_one_out if asked.pop("loss", "") == "rloo" else jaxft.advantages
    found = function(GOLDEN["rewards"][case["rewards"]], case["group"], weights=case["weights"], **asked)  # fmt: skip
    np.testing.assert_allclose(found, case["advantages"], rtol=1e-5, atol=1e-5)


def test_what_cannot_be_judged_moves_nothing():
    """Its own advantage is 0, and the others' are what they are without it."""
    rewards = [1.0, None, 0.0, 0.5]
    found = jaxft.advantages(rewards, 4)
    assert found[1] == 0
    unit = 0.5 / (0.5 + 1e-4)
    np.testing.assert_allclose(found, [unit, 0, -unit, 0], rtol=1e-5)
    assert not jnp.any(jaxft.advantages([None, 1.0, None, None], 2))


def test_they_are_computed_inside_a_program_too():
    rewards = jnp.asarray([1.0, 0.0, jnp.nan, 2.0])
    inside = jax.jit(jaxft.advantages, static_argnums=1)(rewards, 2)
    np.testing.assert_array_equal(inside, jaxft.advantages(rewards, 2))


def test_returns_to_go_are_whitened_over_all_tokens():
    """verl's `reinforce_plus_plus`, written out: the reward at the end, the KL's cost at each token."""
    costs = np.asarray([[0.1, 0.2, 0.3, np.nan], [0.0, 0.5, np.inf, 7.0]])
    returns = [[2 - 0.6, 2 - 0.5, 2 - 0.3], [-1 - 0.5, -1 - 0.5]]
    flat = np.concatenate(returns)
    white = (flat - flat.mean()) / np.sqrt(flat.var(ddof=1) + 1e-8)
    found = whitened_returns([2.0, -1.0], MASK, costs)
    np.testing.assert_allclose(np.asarray(found)[MASK == 1], white, rtol=1e-5)
    assert not np.any(np.asarray(found)[MASK == 0])


def test_a_row_that_cannot_be_judged_is_no_part_of_the_whitening():
    found = whitened_returns([2.0, np.nan, -1.0], np.ones((3, 2)))
    np.testing.assert_allclose(found[1], 0)
    np.testing.assert_allclose(found[0::2], whitened_returns([2.0, -1.0], np.ones((2, 2))), rtol=1e-6)  # fmt: skip


def test_a_groups_mean_can_be_taken_off_before_the_whitening():
    found = whitened_returns([2.0, 0.0, 5.0, 3.0], np.ones((4, 3)), group=2)
    np.testing.assert_allclose(found[:2], found[2:], rtol=1e-6)


def test_a_greedy_answer_is_a_baseline_for_one_completion_too():
    assert over_greedy([1.0, 0.0], [0.5, 0.5], group=1).tolist() == [0.5, -0.5]


def test_a_greedy_answer_a_prompt_serves_its_group():
    found = over_greedy([1.0, 0.0, 2.0, None], [0.5, 1.5], group=2)
    np.testing.assert_allclose(found, [0.5, -0.5, 0.5, 0.0])


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: jaxft.advantages([1.0, 2.0], 1), "group is 1: .* at least 2 completions"),
        (lambda: leave_one_out([1.0, 2.0], 1), "group is 1"),
        (lambda: jaxft.advantages([1.0, 2.0], 2.0), "group is 2.0: a whole number of completions is expected"),
        (lambda: jaxft.advantages([1.0, 2.0], None), "group is None"),
        (lambda: over_greedy([1.0], [1.0], group=0), "group is 0: .* at least 1 completion"),
        (lambda: jaxft.advantages([1.0, 2.0], 2, weights=["a"]), r"weights: numbers are expected, not \['a'\]"),
        (lambda: jaxft.advantages([1.0, 2.0, 3.0], 2), "3 rewards are not whole groups of 2"),
        (lambda: jaxft.advantages([], 2), r"rewards have shape \(0, 1\)"),
        (lambda: jaxft.advantages(["good", "bad"], 2), "rewards: numbers"),
        (lambda: jaxft.advantages([1.0, 2.0], 2, scale="groups"), "unknown scale 'groups'.*'group'"),
        (lambda: jaxft.advantages([1.0, 2.0], 2, combine="normalise"), "unknown combine.*'normalize'"),
        (lambda: jaxft.advantages([1.0, 2.0], 2, weights=[1.0, 2.0]), r"weights have shape \(2,\)"),
        (lambda: whitened_returns([1.0], MASK), r"mask has shape \(2, 4\): \(1, length\)"),
        (lambda: over_greedy([1.0, 2.0], [1.0]), "1 reward of greedy answers for 2 completions"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(run, message):
    with pytest.raises(UserError, match=message) as error:
        run()
    assert "\n" not in str(error.value)
