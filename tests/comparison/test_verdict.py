"""The verdict names no winner that the intervals do not carry, and the simplest lever of those that do win."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from jaxft.comparison.verdict import Scored, Verdict, difference_of, score_of, verdict
from jaxft.evaluation.metrics import METRICS, Metric, of_grader, of_scores

EXACT = of_scores("exact", lambda answer, references: 0.0)
LOSS = METRICS["loss"]


def lever(
    name: str,
    chances: np.ndarray,
    generator: np.random.Generator,
    seeds: int = 3,
    spread: float = 0.0,
) -> Scored:
    """A lever that is right with these chances, item by item, which a seed shifts all together."""
    each = []
    for _ in range(seeds):
        shifted = np.clip(chances + generator.normal(0, spread), 0, 1)
        right = (generator.random(len(chances)) < shifted).astype(float)
        each.append(np.stack([right, np.ones(len(chances))], axis=1))
    return Scored(name, np.array(each), range(len(chances)))


def task(
    generator: np.random.Generator, gains: Sequence[float], items: int, spread: float = 0.02
) -> list[Scored]:
    """A plain prompt on questions of any difficulty, and levers that are right more often by so much."""
    chances = 0.15 + 0.3 * generator.beta(1, 2, items)  # away from 0: cutting there would be a gain
    simplest = lever("prompt", chances, generator, seeds=1)
    others = [
        lever(f"lever {n}", np.clip(chances + gain, 0, 1), generator, spread=spread)
        for n, gain in enumerate(gains, start=1)
    ]
    return [simplest, *others]


@pytest.mark.parametrize(("items", "spread"), [(20, 0.0), (20, 0.05), (60, 0.05)])
def test_where_nothing_helps_no_winner_is_named(items: int, spread: float) -> None:
    """Of 60 tasks on which seven levers change nothing, at most six end with a winner: the promise is one in 20."""
    generator = np.random.default_rng(items)
    told = [verdict(task(generator, [0.0] * 7, items, spread), EXACT, 0.05) for _ in range(60)]
    assert sum(one.told == "chosen" for one in told) <= 6
    assert all(one.chosen is None for one in told if one.told == "cannot tell")


def test_the_simplest_of_equally_good_levers_is_taken() -> None:
    """Three levers gain the same, in 30 tasks: the first of them is taken, and the prompt never."""
    generator = np.random.default_rng(1)
    told = [verdict(task(generator, [0.5, 0.5, 0.5], 60), EXACT, 0.05).chosen for _ in range(30)]
    assert told.count("lever 1") >= 28
    assert "prompt" not in told


def test_a_lever_that_is_better_than_the_simpler_ones_is_taken() -> None:
    generator = np.random.default_rng(2)
    told = [verdict(task(generator, [0.0, 0.2, 0.7], 60), EXACT, 0.05) for _ in range(30)]
    assert sum(one.chosen == "lever 3" for one in told) >= 28


def test_a_prompt_that_is_always_right_needs_no_lever() -> None:
    """Nothing helps where nothing can: the figures say so, and the second sentence is of the nearest lever."""
    generator = np.random.default_rng(3)
    right = np.ones(80)
    rows = [lever("prompt", right, generator, seeds=1), lever("lora", right, generator)]
    found = verdict(rows, EXACT, 0.05)
    assert (found.told, found.chosen, found.next) == ("nothing helps", "prompt", "lora")
    assert found.sentences[0].startswith("Nothing helps")
    assert "lora" in found.sentences[1]


@pytest.mark.parametrize("metric", [EXACT, of_grader("wants")], ids=["exact", "grader"])
@pytest.mark.parametrize("right", [0.0, 1.0])
def test_two_levers_alike_on_few_rows_are_not_known_to_be_equal(
    right: float, metric: Metric
) -> None:
    """Of 30 rows all alike another in nine may still differ; as many more rows as are named are enough."""

    def told(items: int) -> Verdict:
        numbers = np.full((1, items, 2), (right, 1.0))
        rows = [Scored(name, numbers, range(items)) for name in ("prompt", "lora")]
        return verdict(rows, metric, 0.05)

    alone = score_of(Scored("prompt", np.full((1, 30, 2), (right, 1.0)), range(30)), metric)
    assert (alone.low, alone.high) == pytest.approx(
        (0.884, 1.0) if right else (0.0, 0.116), abs=1e-3
    )
    few = told(30)
    assert (few.told, few.chosen) == ("cannot tell", None)
    assert few.more == 42
    assert "may gain up to 0.116" in few.sentences[0]
    assert told(71).told == "cannot tell"
    assert (told(72).told, told(72).chosen) == ("nothing helps", "prompt")


def test_what_cannot_be_told_says_how_many_rows_would() -> None:
    """With as many more rows as it asks for, a true gain is found most of the time."""
    generator = np.random.default_rng(4)
    asked = [verdict(task(generator, [0.15], 30, 0.0), EXACT, 0.05) for _ in range(20)]
    more = [one.more for one in asked if one.told == "cannot tell" and one.more]
    enough = 30 + int(np.median(more))
    found = [verdict(task(generator, [0.15], enough, 0.0), EXACT, 0.05).chosen for _ in range(16)]
    assert 50 < enough < 1000
    assert found.count("lever 1") >= 8
    assert all(str(one.more) in one.sentences[1].replace(",", "") for one in asked if one.more)


def test_seeds_that_differ_widen_the_interval() -> None:
    """Runs that lie far apart carry less than runs that agree, and are never called a winner by one good seed."""
    generator = np.random.default_rng(5)
    chances = np.full(200, 0.3)
    base = lever("prompt", chances, generator, seeds=1)
    one_good = np.array(
        [[[float(n < 180), 1.0] for n in range(200)]]
        + [[[float(n < 60), 1.0] for n in range(200)]] * 2
    )
    agreeing = np.array([[[float(n < 100), 1.0] for n in range(200)]] * 3)
    lucky, steady = (
        Scored(name, each, range(200)) for name, each in (("a", one_good), ("b", agreeing))
    )
    apart, together = (difference_of(base, each, EXACT, comparisons=1) for each in (lucky, steady))
    assert apart.value == pytest.approx(together.value)
    assert together.verdict == "better"
    assert apart.verdict == "cannot tell"
    wide, narrow = (score_of(each, EXACT) for each in (lucky, steady))
    assert wide.high - wide.low > narrow.high - narrow.low  # type: ignore[operator]


def test_no_difference_is_larger_than_the_scores_can_be() -> None:
    """However far the seeds lie apart."""
    prompt = Scored("prompt", np.full((1, 40, 2), (0.0, 1.0)), range(40))
    scores = np.repeat([0.55, 0.525, 0.0], 40).reshape(3, 40, 1)
    raft = Scored("raft", np.concatenate([scores, np.ones_like(scores)], axis=-1), range(40))
    found = difference_of(prompt, raft, EXACT, comparisons=3)
    assert found.value == pytest.approx(0.3583, abs=1e-4)
    assert (found.low, found.high) == (-1.0, 1.0)


def test_a_lever_of_which_nothing_is_known_is_passed_over() -> None:
    """Its seeds lie so far apart that nothing beats it, but it does not beat the prompt, and DPO does."""
    generator = np.random.default_rng(4)
    prompt = lever("prompt", np.full(60, 0.5), generator, seeds=1)
    each = [np.full((60, 2), (share, 1.0)) for share in (0.5, 0.65, 0.83)]
    lora = Scored("lora", np.array(each), range(60))
    dpo = Scored("dpo", np.full((3, 60, 2), (1.0, 1.0)), range(60))
    assert difference_of(lora, dpo, EXACT, comparisons=2).verdict == "cannot tell"
    found = verdict([prompt, lora, dpo], EXACT, 0.05)
    assert (found.told, found.chosen) == ("chosen", "dpo")
    assert "Nor does lora beat prompt, which another lever does: it is passed over." in found.steps


def test_less_is_better_of_a_loss() -> None:
    """A lever with a lower loss a token wins, and one with a higher one is worse."""
    generator = np.random.default_rng(6)
    tokens = generator.integers(5, 20, 50).astype(float)

    def losing(name: str, loss: float, seeds: int) -> Scored:
        sums = tokens * (loss + generator.normal(0, 0.1, (seeds, 50)))
        return Scored(name, np.stack([sums, np.tile(tokens, (seeds, 1))], axis=2), range(50))

    rows = [losing("prompt", 3.0, 1), losing("lora", 2.0, 3), losing("full", 2.5, 3)]
    found = verdict(rows, LOSS, 0.1)
    assert (found.told, found.chosen) == ("chosen", "lora")
    assert difference_of(rows[1], rows[2], LOSS, comparisons=2).verdict == "worse"


def test_steps_name_every_comparison() -> None:
    """The reasoning has a step for each lever that is passed by, and one for the end."""
    generator = np.random.default_rng(7)
    found = verdict(task(generator, [0.6, 0.6], 60), EXACT, 0.05)
    assert len(found.steps) == 3
    assert found.steps[0].startswith("Beside prompt")
    assert "lever 1 +" in found.steps[0]
    assert "beat it" in found.steps[0]


def test_one_lever_alone_cannot_be_told() -> None:
    alone = lever("prompt", np.full(20, 0.5), np.random.default_rng(8), seeds=1)
    found = verdict([alone], EXACT, 0.05)
    assert (found.told, found.chosen) == ("cannot tell", None)
    with pytest.raises(ValueError):
        verdict([], EXACT, 0.05)


def test_levers_that_were_not_measured_are_said_to_be_left_open() -> None:
    """Nothing helps "of what was measured": the budget may have left out what does."""
    generator = np.random.default_rng(9)
    right = np.ones(80)
    rows = [lever("prompt", right, generator, seeds=1), lever("examples", right, generator)]
    found = verdict(rows, EXACT, 0.05, ["full"])
    assert found.sentences[0].startswith("Nothing that was measured helps")
    assert found.steps[0] == "Not measured, so that nothing is said of them: full."
