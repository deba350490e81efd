"""jaxft.weights.combining: what each way of combining low-rank updates makes of them."""

from __future__ import annotations

import numpy as np
import pytest

from jaxft.errors import UserError
from jaxft.weights.combining import WAYS, Update, combined, distance, elect, largest, random_keep


def update(seed: int, rank: int = 3, scale: float = 1.5) -> Update:
    draw = np.random.default_rng(seed)
    a, b = draw.normal(size=(7, rank)), draw.normal(size=(rank, 5))
    return Update(a.astype(np.float32), b.astype(np.float32), scale)


def product(one: Update) -> np.ndarray:
    return one.scale * (one.a @ one.b)


TWO, WEIGHTS = [update(0), update(1, scale=0.5)], [0.7, -0.4]
SUM = 0.7 * product(TWO[0]) - 0.4 * product(TWO[1])


def test_side_by_side_is_the_weighted_sum():
    one = combined([update(0), update(1, rank=2, scale=0.5)], WEIGHTS, WAYS["cat"])
    assert one.rank == 5
    sums = 0.7 * product(update(0)) - 0.4 * product(update(1, rank=2, scale=0.5))
    np.testing.assert_allclose(product(one), sums, atol=1e-5)


def test_an_svd_keeps_the_directions_of_the_whole_sum_that_are_largest():
    one = combined(TWO, WEIGHTS, WAYS["svd"], rank=2)
    u, sizes, v = np.linalg.svd(SUM)
    np.testing.assert_allclose(product(one), (u[:, :2] * sizes[:2]) @ v[:2], atol=1e-5)
    apart, whole = distance(one, TWO, WEIGHTS)
    np.testing.assert_allclose(apart, np.linalg.norm(sizes[2:]), rtol=1e-4)
    np.testing.assert_allclose(whole, np.linalg.norm(sizes), rtol=1e-5)


@pytest.mark.parametrize("name", [name for name, way in WAYS.items() if not way.elected])
def test_half_of_an_adapter_twice_is_the_adapter(name):
    """Where signs are elected those that agree are averaged, so that two halves are a half."""
    halves = combined([update(2), update(2)], [0.5, 0.5], WAYS[name], density=1.0)
    whole = (
        2 * product(update(2))
        if not (WAYS[name].whole or WAYS[name].beside)
        else product(update(2))
    )
    np.testing.assert_allclose(product(halves), whole, atol=1e-5)


def test_signs_are_elected_by_the_total_or_by_their_number():
    tensors = np.array([[3.0, 1.0, 0.0], [-1.0, -2.0, 0.0], [-1.0, 1.0, 4.0]])
    np.testing.assert_allclose(elect(tensors, tensors, "total"), [3.0, 1.0, 4.0])
    np.testing.assert_allclose(elect(tensors, tensors, "frequency"), [-1.0, 1.0, 4.0])


def test_the_largest_numbers_stay():
    kept = largest(np.array([[0.1, -5.0], [2.0, -0.3]]), 0.5)
    assert kept.tolist() == [[False, True], [True, False]]
    assert not largest(np.ones((2, 2)), 0.1).any()


def test_dare_keeps_the_share_and_the_mean():
    numbers = np.ones((200, 200), np.float32)
    kept = random_keep(0.3, 0, "q_proj")(numbers)
    assert abs(kept.mean() - 0.3) < 4 * (0.3 * 0.7 / numbers.size) ** 0.5
    assert (kept == random_keep(0.3, 0, "q_proj")(numbers)).all()
    assert (kept != random_keep(0.3, 0, "v_proj")(numbers)).any()
    means = np.mean(
        [
            product(combined(TWO, WEIGHTS, WAYS["dare_linear_svd"], rank=5, density=0.5, keep=keep))
            for keep in (random_keep(0.5, seed, "x") for seed in range(400))
        ],
        0,
    )
    deviation = np.hypot(0.7 * product(TWO[0]), 0.4 * product(TWO[1])) / 400**0.5
    assert (np.abs(means - SUM) < 5 * deviation + 1e-5).all()


def test_a_and_b_of_different_ranks_have_no_sum():
    with pytest.raises(UserError, match="has the ranks 2, 3"):
        combined([update(0), update(1, rank=2)], WEIGHTS, WAYS["linear"])
