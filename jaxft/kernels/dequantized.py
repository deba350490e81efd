"""Products with rows of a matrix that lie in units, which are runs of rows with one scale: (units, unit, out).

Where the axis of the units stays from the codes to the product, the TPU's compiler takes dequantizing into the
product. Where codes are a matrix it writes the scale of every row to memory first, four times the bytes of the codes
and more (libtpu 0.0.42), or the dequantized rows (0.0.52).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.kernels.platform import by_platform

Run = Callable[[jax.Array, int], jax.Array]


def in_turn(
    weight: Any, x: jax.Array, use: Callable[[Run, jax.Array], jax.Array]
) -> list[jax.Array]:
    """What `use` makes of each run's dequantized rows, in x's dtype. A run waits until the one before has been used.

    So one run stands dequantized at a time, where the compiler does not take it into the product altogether, and it
    is not shared between the forward pass made again and the backward pass, which would keep it in between. Nor does
    the compiler move the units' axis behind the arithmetic.
    """
    found = [x]
    for index, run in enumerate(weight.runs()):
        units, found[-1] = jax.lax.optimization_barrier((weight.units(), found[-1]))
        found.append(use(run, weight.dequantized(index, units).astype(x.dtype)))
    return found[1:]


def times(
    x: Float[Array, "... rows"], piece: Float[Array, "units unit out"]
) -> Float[Array, "... out"]:
    """x times a piece: for TPUs over the two axes of its rows, elsewhere as matrices, which is the same."""

    def by_units(x: jax.Array, piece: jax.Array) -> jax.Array:
        apart = x.reshape(*x.shape[:-1], *piece.shape[:2])
        return jnp.einsum("...ur,uro->...o", apart, piece)

    def plain(x: jax.Array, piece: jax.Array) -> jax.Array:
        return x @ piece.reshape(-1, piece.shape[-1])

    return by_platform(x, piece, tpu=by_units, default=plain)


def times_transposed(
    x: Float[Array, "... out"], piece: Float[Array, "units unit out"]
) -> Float[Array, "... rows"]:
    """x times a piece's transpose. Units first, or the TPU's compiler writes the piece out in another layout."""

    def by_units(x: jax.Array, piece: jax.Array) -> jax.Array:
        found = jax.lax.optimization_barrier(jnp.einsum("...o,uro->u...r", x, piece))
        return jnp.moveaxis(found, 0, -2).reshape(*x.shape[:-1], -1)

    def plain(x: jax.Array, piece: jax.Array) -> jax.Array:
        return jnp.einsum("...o,io->...i", x, piece.reshape(-1, piece.shape[-1]))

    return by_platform(x, piece, tpu=by_units, default=plain)
