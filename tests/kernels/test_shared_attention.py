"""Attention over a shared and an own part is one softmax over both."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.kernels.shared_attention import (
    Sharing,
    shared_attention,
    shared_attention_reference,
)

PARTS, PROMPTS, GROUP, SLOTS, LENGTH, COLUMNS = 2, 2, 3, 4, 5, 6


def sharing() -> Sharing:
    """Four slots a part, which stand in their ring's column 2; prompts of 5, 3, 1 and 4 tokens."""
    continuation = jnp.asarray([[4, 0, 5, 1], [3, 2, 0, 5]])
    known = jnp.asarray([[5, 3], [1, 4]])
    slot = jnp.zeros((PARTS, PROMPTS * GROUP), jnp.int32)
    for part in range(PARTS):
        slot = slot.at[part, continuation[part]].set(jnp.arange(SLOTS))
    shared = jnp.arange(LENGTH)[None, None, :] >= LENGTH - known[:, :, None]
    before = jnp.asarray([0, 1, 5, 3, 2, 4, 0, 1])
    age = (2 - jnp.arange(COLUMNS)) % COLUMNS
    return Sharing(continuation, slot, shared, before, age, jnp.int32(COLUMNS))


@pytest.mark.parametrize(
    "settings", [{}, {"window": 4, "softcap": 1.5}], ids=["plain", "window and soft cap"]
)
def test_it_is_its_definition(settings):
    keys = jax.random.split(jax.random.key(0), 5)
    rows, slots, heads, size = PARTS * PROMPTS, PARTS * SLOTS, 2, 8
    query = jax.random.normal(keys[0], (slots, 2 * heads, 1, size))
    shared = [jax.random.normal(key, (rows, heads, LENGTH, size)) for key in keys[1:3]]
    own = [jax.random.normal(key, (slots, heads, COLUMNS, size)) for key in keys[3:]]
    layers = [jnp.stack([-x, x]) for x in own]
    found = shared_attention(
        query, *shared, *layers, jnp.int32(1), sharing(), scale=0.5, **settings
    )
    want = shared_attention_reference(query, *shared, *own, sharing(), scale=0.5, **settings)
    np.testing.assert_allclose(found, want, atol=1e-5)
    assert np.abs(want).max() > 0.1
