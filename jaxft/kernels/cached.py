"""What reads a layer of a cache: all rows at once, or, on a CPU, a few at a time.

A CPU copies the slice of a cache that a product reads. That of all rows goes to memory and back; that of a few rows
stays in the processor's own. Nor does it read what is not written yet, to a quarter of a long cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxft.kernels.platform import by_platform

MOST_ROWS = 4
QUARTERED = 128  # columns; each length that is read is a program of its own


def over_layer(
    function: Callable[..., Any],
    keys: Float[Array, "layers batch key_heads length head_dim"],
    values: Float[Array, "layers batch key_heads length head_dim"],
    number: Int[Array, ""],
    used: Int[Array, ""],
    *arrays: Any,
) -> Any:
    """`function(keys[number], values[number], *arrays)`, whose arrays and results have the batch as their first axis.

    Each row of the results must depend on the same row of everything else alone. From column `used` on nothing may
    matter: keys and values may end there.
    """
    rows, columns = keys.shape[1], keys.shape[3]
    few = next(size for size in range(min(MOST_ROWS, rows), 0, -1) if rows % size == 0)
    parts = 4 if columns >= QUARTERED and columns % 4 == 0 else 1

    def whole(keys: Array, values: Array, number: Array, used: Array, *arrays: Array) -> Any:
        return function(keys[number], values[number], *arrays)

    def by_rows(length: int, keys: Array, values: Array, number: Array, *arrays: Array) -> Any:
        def part(_: None, start: Array) -> tuple[None, Any]:
            def layer(cache: Array) -> Array:
                first = (number, start, *(jnp.zeros_like(start),) * 3)
                size = (1, few, cache.shape[2], length, cache.shape[4])
                return jax.lax.dynamic_slice(cache, first, size)[0]

            own = (jax.lax.dynamic_slice_in_dim(x, start, few) for x in arrays)
            return None, function(layer(keys), layer(values), *own)

        starts = few * jnp.arange(rows // few, dtype=number.dtype)
        results = jax.lax.scan(part, None, starts)[1]
        return jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), results)

    def in_parts(keys: Array, values: Array, number: Array, used: Array, *arrays: Array) -> Any:
        lengths = [columns * count // parts for count in range(1, parts + 1)]
        forms = [functools.partial(by_rows, length) for length in lengths]
        chosen = jnp.clip((used - 1) * parts // columns, 0, parts - 1)
        return jax.lax.switch(chosen, forms, keys, values, number, *arrays)

    if not jax.sharding.get_abstract_mesh().empty:
        return whole(keys, values, number, used, *arrays)
    return by_platform(keys, values, number, used, *arrays, cpu=in_parts, default=whole)
