"""Temperature, top-k and top-p as transformers defines them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.inference.sampling import restrict, sample

SIZE = 13
restricted = jax.jit(restrict)
drawn = jax.jit(sample)


def kept(scores: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Which tokens of a row transformers' TopKLogitsWarper and then TopPLogitsWarper keep."""
    scores = scores.astype(np.float64)
    if top_k > 0:
        scores = np.where(scores < np.sort(scores)[-min(top_k, SIZE)], -np.inf, scores)
    if top_p < 1.0:
        order = np.argsort(scores)
        exponentials = np.exp(scores[order] - scores.max())
        removed = np.cumsum(exponentials / exponentials.sum()) <= 1 - top_p
        removed[-1] = False
        scores[order[removed]] = -np.inf
    return scores > -np.inf


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 200), min_size=2 * SIZE, max_size=2 * SIZE, unique=True),
    st.integers(0, SIZE + 3),
    st.sampled_from([0.0, 0.011, 0.303, 0.71, 0.97, 1.0]),
)
def test_what_is_kept_is_what_transformers_keeps(numbers, top_k, top_p):
    scores = np.asarray(numbers, np.float32).reshape(2, SIZE) / 23
    found = restricted(scores, np.int32(top_k), np.float32(top_p))
    want = np.stack([kept(row, top_k, top_p) for row in scores])
    np.testing.assert_array_equal(found > -np.inf, want)
    np.testing.assert_array_equal(np.asarray(found)[want], scores[want])


def test_equal_scores_are_kept_together():
    scores = jnp.asarray([[3.0, 1.0, 1.0, 1.0, 0.0]])
    found = restricted(scores, np.int32(2), np.float32(1.0))
    assert (found > -jnp.inf).tolist() == [[True, True, True, True, False]]


def many(scores, temperature, top_k, top_p, count=4000):
    keys = jax.random.split(jax.random.key(0), count)
    rows = jnp.broadcast_to(jnp.asarray(scores, jnp.float32), (count, len(scores)))
    return np.asarray(
        drawn(rows, keys, np.float32(temperature), np.int32(top_k), np.float32(top_p))
    )


def test_draws_follow_the_softmax_at_the_temperature():
    scores = np.asarray([2.0, 1.0, 0.0, -1.0, -3.0])
    for temperature in (0.5, 1.0, 2.0):
        want = np.exp(scores / temperature) / np.exp(scores / temperature).sum()
        found = np.bincount(many(scores, temperature, 0, 1.0), minlength=5) / 4000
        np.testing.assert_allclose(found, want, atol=0.03)


def test_the_temperature_goes_before_top_p():
    scores = [2.0, 1.0, 0.0, -1.0, -3.0]
    # probabilities .64 .24 .09 at 1; .86 .12 at 0.5; .43 .26 .16 .10 at 2
    assert set(many(scores, 1.0, 0, 0.8)) == {0, 1}
    assert set(many(scores, 0.5, 0, 0.8)) == {0}
    assert set(many(scores, 2.0, 0, 0.8)) == {0, 1, 2}


def test_top_p_counts_what_top_k_left():
    # among the first two, the likeliest alone has .73
    assert set(many([2.0, 1.0, 0.0, -1.0, -3.0], 1.0, 2, 0.7)) == {0}
    assert set(many([2.0, 1.0, 0.0, -1.0, -3.0], 1.0, 0, 0.7)) == {0, 1}


def test_zeros_of_either_sign_are_equal_and_minus_infinity_is_last():
    scores = jnp.asarray([[-0.0, 0.0, -jnp.inf, -1.0, -2.0]])
    for top_k, top_p in ((1, 1.0), (0, 0.1)):
        found = restricted(scores, np.int32(top_k), np.float32(top_p))
        assert (found > -jnp.inf).tolist() == [[True, True, False, False, False]]
    assert (restricted(scores, np.int32(4), np.float32(1.0)) == scores).all()
