"""Products of rows with the weight of their group: an expert's, or an adapter's out of a bank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxft.tree import PyTree


def grouped_product(
    x: Float[Array, "... in"],
    stack: PyTree,
    groups: Int[Array, "..."],
    product: Callable[[jax.Array, Any], jax.Array],
) -> Float[Array, "... out"]:
    """Each row of x times the weight of its group; 0 for a row whose group is not in the stack.

    The plain reference: one group after the other, each multiplied by all rows, so that the work is groups times that
    of one product.

    Args:
        x: (..., in).
        stack: a weight whose arrays have the groups as their leading axis.
        groups: (...) of each row.
        product: (x, one group's weight) -> (..., out).
    """
    count = jax.tree.leaves(stack)[0].shape[0]

    def add(total: jax.Array, one: Any) -> tuple[jax.Array, None]:
        number, weight = one
        y = product(x, weight)
        here = jnp.broadcast_to((groups == number)[..., None], y.shape)
        return jnp.where(here, y, total), None

    out = jax.eval_shape(lambda weight: product(x, weight), jax.tree.map(lambda a: a[0], stack))
    numbers = jnp.arange(count, dtype=groups.dtype)
    return jax.lax.scan(add, jnp.zeros(out.shape, out.dtype), (numbers, stack))[0]
