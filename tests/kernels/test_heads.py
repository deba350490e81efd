from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxft.kernels.heads import joined_heads, split_heads


@pytest.mark.parametrize("length", [16, 5])
def test_heads_are_split_and_joined_the_same_way_by_tiles(monkeypatch, length):
    """Each head is a run of the width; the way for TPUs, where eights divide the rows, gives the same."""
    x = jax.random.normal(jax.random.key(0), (2, length, 12))
    split = split_heads(x, 3)
    np.testing.assert_array_equal(split[:, 1], x[:, :, 4:8])
    np.testing.assert_array_equal(joined_heads(split), x)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arrays, tpu, default: tpu(*arrays))
    np.testing.assert_array_equal(split_heads(x, 3), split)
    np.testing.assert_array_equal(joined_heads(split), x)
