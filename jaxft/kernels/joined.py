"""Several narrow products of one input as one."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxft.kernels.remat import keep_narrow


def products(
    x: Float[Array, "... in"], matrices: Sequence[Float[Array, "in rank"]]
) -> list[Float[Array, "... rank"]]:
    """The plain reference of `joined_products`: x times each matrix."""
    return [keep_narrow(x @ matrix) for matrix in matrices]


def joined_products(
    x: Float[Array, "... in"], matrices: Sequence[Float[Array, "in rank"]]
) -> list[Float[Array, "... rank"]]:
    """x times each matrix, by one product with all their columns.

    Each narrow product, and each of its gradients, reads x or its gradient whole for the sake of a few columns.
    """
    ends = np.cumsum([matrix.shape[-1] for matrix in matrices])[:-1]
    return jnp.split(keep_narrow(x @ jnp.concatenate(list(matrices), axis=-1)), ends, axis=-1)
