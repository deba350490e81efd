from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.kernels.rotary import (
    neighbours_by_product,
    rotary,
    rotated_by_halves,
    rotated_by_product,
    rotated_neighbours,
)
from jaxft.models.frequencies import rope_frequencies


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def test_rotary_rotates_the_halves_by_position_times_frequency():
    """As transformers' llama: x cos + rotate_half(x) sin."""
    x, frequencies = normal(0, 2, 3, 5, 8), np.asarray([1.0, 0.5, 0.1, 0.01], np.float32)
    positions = np.asarray([[0, 1, 2, 0, 1], [7, 8, 9, 10, 11]], np.int32)
    angles = np.concatenate([positions[..., None] * frequencies] * 2, axis=-1)[:, None]
    half = np.concatenate([-x[..., 4:], x[..., :4]], axis=-1)
    want = 1.25 * (x * np.cos(angles) + half * np.sin(angles))
    np.testing.assert_allclose(rotary(x, positions, frequencies, 1.25), want, atol=1e-6)


WAYS = {
    "halves": (rotated_by_product, rotated_by_halves),
    "neighbours": (neighbours_by_product, rotated_neighbours),
}


@pytest.mark.parametrize("pairs", WAYS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rotary_by_a_product_is_the_plain_one_bit_for_bit(dtype, pairs):
    """What TPUs compute, beside what all others do."""
    x, angles = normal(0, 2, 3, 5, 8).astype(dtype), normal(1, 2, 1, 5, 4)
    both = [jax.jit(function)(x, jnp.cos(angles), jnp.sin(angles)) for function in WAYS[pairs]]
    assert both[0].dtype == dtype
    np.testing.assert_array_equal(*both)


def test_the_gradient_of_rotary_is_autodiffs():
    """The rotation back, which the rule calls, is the transpose of the rotation."""
    x, frequencies = normal(0, 2, 3, 5, 8), np.asarray([1.0, 0.5, 0.1, 0.01], np.float32)
    positions = jnp.arange(10, dtype=jnp.int32).reshape(2, 5)
    angles = positions.astype(jnp.float32)[:, None, :, None] * frequencies[None, None, None, :]
    ways = (
        lambda x: rotary(x, positions, frequencies, 1.25),
        lambda x: rotated_by_halves(x, 1.25 * jnp.cos(angles), 1.25 * jnp.sin(angles)),
    )
    gradients = [jax.vjp(way, x)[1](normal(1, *x.shape))[0] for way in ways]
    np.testing.assert_allclose(*gradients, rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 1000))
def test_rotary_scores_depend_on_the_distance_alone(shift):
    query, key = normal(0, 1, 1, 4, 8), normal(1, 1, 1, 4, 8)
    frequencies, _ = rope_frequencies(8, 10000.0, None, 2048)

    def scores(shift):
        positions = jnp.arange(4, dtype=jnp.int32)[None] + shift
        rotated = [rotary(x, positions, frequencies, 1.0)[0, 0] for x in (query, key)]
        return rotated[0] @ rotated[1].T

    np.testing.assert_allclose(scores(shift), scores(0), atol=2e-3)


def test_neighbours_turn_as_halves_do_in_another_order():
    x, frequencies = normal(0, 2, 3, 5, 8), np.asarray([1.0, 0.5, 0.1, 0.01], np.float32)
    positions = jnp.arange(10, dtype=jnp.int32).reshape(2, 5)
    order = np.asarray([0, 2, 4, 6, 1, 3, 5, 7])
    halves = rotary(x[..., order], positions, frequencies, 1.25)
    neighbours = rotary(x, positions, frequencies, 1.25, "neighbours")
    np.testing.assert_array_equal(neighbours[..., order], halves)


def test_features_beyond_the_rotated_ones_pass_and_take_the_scale_alone():
    x, frequencies = normal(0, 2, 3, 5, 8), np.asarray([1.0, 0.5], np.float32)
    positions = jnp.arange(10, dtype=jnp.int32).reshape(2, 5)
    whole = rotary(x, positions, frequencies, 1.25, scale=0.5)
    np.testing.assert_array_equal(whole[..., 4:], 0.5 * x[..., 4:])
    first = rotary(x[..., :4], positions, frequencies, 0.625)
    np.testing.assert_allclose(whole[..., :4], first, rtol=1e-6)


def test_frequencies_of_zero_turn_nothing():
    """So layers without rotary are scanned with those that have one."""
    x, positions = normal(0, 2, 3, 5, 8), jnp.arange(10, dtype=jnp.int32).reshape(2, 5)
    np.testing.assert_array_equal(rotary(x, positions, np.zeros(4, np.float32)), x)
