from __future__ import annotations

import jax
import numpy as np

from jaxft.kernels.joined import joined_products, products


def test_one_product_gives_what_several_give():
    """Matrices of several widths, and the gradients to the input and to each."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (2, 3, 8))
    matrices = [
        jax.random.normal(key, (8, rank)) for key, rank in zip(keys[1:], (2, 1, 4), strict=True)
    ]

    def total(way, x, matrices):
        found = way(x, matrices)
        return sum((factor * y**2).sum() for factor, y in enumerate(found, 1)), found

    one, several = (
        jax.value_and_grad(total, (1, 2), has_aux=True)(way, x, matrices)
        for way in (joined_products, products)
    )
    jax.tree.map(
        lambda left, right: np.testing.assert_allclose(left, right, 1e-5, 1e-5), one, several
    )
