"""A cache's layer read in parts is the layer read whole."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.kernels.cached import QUARTERED, over_layer


@pytest.mark.parametrize("rows", [8, 6, 5], ids="rows={}".format)
@pytest.mark.parametrize("used", [1, QUARTERED // 4, QUARTERED // 4 + 1, QUARTERED])
def test_parts_are_the_whole(rows, used):
    shape = (2, rows, 1, QUARTERED, 3)
    keys, values = (jax.random.normal(jax.random.key(seed), shape) for seed in (0, 1))
    query = jax.random.normal(jax.random.key(2), (rows, 3))
    live = jnp.arange(QUARTERED) < used
    read = []

    def look(key, value, query):
        read.append(key.shape[2])
        scores = (key[:, 0] * query[:, None]).sum(axis=-1)
        weights = jnp.where(live[None, : key.shape[2]], scores, 0.0)
        return (weights[..., None] * value[:, 0]).sum(axis=1)

    run = jax.jit(lambda number, used: over_layer(look, keys, values, number, used, query))
    found = run(1, used)
    assert min(read) == QUARTERED // 4
    want = look(keys[1], values[1], query)
    np.testing.assert_allclose(found, want, atol=1e-4)
