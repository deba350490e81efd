"""Gradients of the layers' matrices in the type that computes, not in the wider one that stores.

A matrix that is stored in float32 and multiplied in bfloat16 has a bfloat16 gradient, which JAX widens before the scan
over the layers stacks it: of the adapters of 80 layers that is a copy in float32 of all of them. Here the stack is
narrow, and is widened where it is used. So is the cast copy of the matrices, which XLA would otherwise make for all
layers before the loop.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.tree import PyTree


def narrowed(layers: PyTree, dtype: Any) -> tuple[PyTree, list[Any]]:
    """Lets the gradients of the layers' leaves be of the products' dtype, and not of the leaves' own.

    Returns the layers, with `stop_gradient` at the leaves whose gradient can be narrow, and an array of zeros for each
    such leaf (None for the others): it is scanned with the layers, and its gradient is the leaf's.

    Args:
        layers: a tree of stacked leaves.
        dtype: that of the products.
    """
    leaves, structure = jax.tree.flatten(layers)
    taps = [_tap(leaf, jnp.dtype(dtype)) if _narrows(leaf, dtype) else None for leaf in leaves]
    cut = [
        leaf if tap is None else jax.lax.stop_gradient(leaf)
        for leaf, tap in zip(leaves, taps, strict=True)
    ]
    return jax.tree.unflatten(structure, cut), taps


def joined(layer: PyTree, taps: list[Any]) -> PyTree:
    """One layer, whose matrices send their gradients to the taps."""
    leaves, structure = jax.tree.flatten(layer)
    cut = [
        leaf if tap is None else _join(leaf, tap) for leaf, tap in zip(leaves, taps, strict=True)
    ]
    return jax.tree.unflatten(structure, cut)


def _narrows(leaf: Any, dtype: Any) -> bool:
    return leaf.dtype == jnp.float32 and leaf.ndim > 2 and jnp.dtype(dtype).itemsize < 4


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _tap(leaf: Float[Array, "..."], dtype: Any) -> Float[Array, "..."]:
    """Zeros, which nothing reads: the compiler drops them, and their gradient is the leaf's."""
    return jnp.zeros(leaf.shape, dtype)


_tap.defvjp(
    lambda leaf, dtype: (_tap(leaf, dtype), None),
    lambda dtype, _, gradient: (gradient.astype(jnp.float32),),
)


@jax.custom_vjp
def _join(leaf: Float[Array, "..."], tap: Float[Array, "..."]) -> Float[Array, "..."]:
    bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
    return jax.lax.bitcast_convert_type(jax.lax.optimization_barrier(bits), leaf.dtype)


_join.defvjp(
    lambda leaf, tap: (_join(leaf, tap), jnp.zeros((), tap.dtype)),
    lambda kind, gradient: (None, gradient.astype(kind.dtype)),
)
