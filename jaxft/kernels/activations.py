"""Activations of a feed-forward, gated or not. Nothing but their inputs is kept for the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.errors import UserError, nearest


def relu_squared(x: Array) -> Array:
    """max(x, 0)^2 (arXiv 2109.08668)."""
    return jnp.square(jax.nn.relu(x))


def quick_gelu(x: Array) -> Array:
    """x sigmoid(1.702 x), which is near to gelu (arXiv 1606.08415, section 2)."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
    "relu_squared": relu_squared,
}


def activate(x: Float[Array, "*batch intermediate"], activation: str) -> Array:
    """activation(x), not gated (gpt2): nothing but x is kept for the backward pass."""
    return jax.checkpoint(ACTIVATIONS[activation], prevent_cse=False)(x)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(2,))
def _gated(gate: Array, up: Array, activation: str) -> Array:
    return ACTIVATIONS[activation](gate) * up


def gated(
    gate: Float[Array, "*batch intermediate"],
    up: Float[Array, "*batch intermediate"],
    activation: str,
) -> Float[Array, "*batch intermediate"]:
    """activation(gate) * up, for any of `ACTIVATIONS` (arXiv 2002.05202)."""
    if activation not in ACTIVATIONS:
        raise UserError(
            f"unknown activation {activation!r}: known are {', '.join(ACTIVATIONS)}"
            f"{nearest(activation, ACTIVATIONS)}"
        )
    return _gated(gate, up, activation)
