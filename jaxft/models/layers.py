"""The small layers of a decoder: norms, gated activations, rotary positions.

Each keeps only its inputs for the backward pass and computes the rest again there: what lies
between is cheap to compute and as large as the hidden states.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxft.errors import UserError, nearest
from jaxft.kernels.platform import by_platform

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(2, 3))
def _rms_norm(x: Array, scale: Array, epsilon: float, offset: float) -> Array:
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    factor = scale.astype(jnp.float32) + offset
    return (wide * inverse * jnp.broadcast_to(factor, x.shape)).astype(x.dtype)


def rms_norm(
    x: Float[Array, "*batch hidden"],
    scale: Float[Array, " hidden"],
    *,
    epsilon: float,
    offset: float = 0.0,
) -> Float[Array, "*batch hidden"]:
    """Root mean square norm: x / sqrt(mean(x^2) + epsilon) * (offset + scale).

    Computed in float32, returned in x's dtype.
    `offset` is 1.0 for gemma, whose scale is stored less 1 (arXiv 1910.07467).
    """
    return _rms_norm(x, scale, epsilon, offset)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(3,))
def _layer_norm(x: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + epsilon)
    scaled = centred * inverse * jnp.broadcast_to(scale.astype(jnp.float32), x.shape)
    return (scaled + jnp.broadcast_to(bias.astype(jnp.float32), x.shape)).astype(x.dtype)


def layer_norm(
    x: Float[Array, "*batch hidden"],
    scale: Float[Array, " hidden"],
    bias: Float[Array, " hidden"],
    *,
    epsilon: float,
) -> Float[Array, "*batch hidden"]:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias, in float32, returned in x's dtype."""
    return _layer_norm(x, scale, bias, epsilon)


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
    """activation(gate) * up, for silu, gelu_tanh and the exact gelu (arXiv 2002.05202)."""
    if activation not in ACTIVATIONS:
        raise UserError(
            f"unknown activation {activation!r}: known are {', '.join(ACTIVATIONS)}"
            f"{nearest(activation, ACTIVATIONS)}"
        )
    return _gated(gate, up, activation)


def rotary(
    x: Float[Array, "batch heads length head_dim"],
    positions: Int[Array, "batch length"],
    frequencies: Float[Array, " half"] | np.ndarray,
    attention_factor: float = 1.0,
) -> Float[Array, "batch heads length head_dim"]:
    """Rotates the pairs (i, i + head_dim / 2) of x by position * frequencies[i] (arXiv 2104.09864).

    The halves are paired as in transformers' llama. Computed in float32, returned in x's dtype;
    `attention_factor` multiplies the result (yarn).
    """
    angles = (
        positions.astype(jnp.float32)[:, None, :, None]
        * jnp.asarray(frequencies)[None, None, None, :]
    )
    cosine, sine = jnp.cos(angles) * attention_factor, jnp.sin(angles) * attention_factor
    return _rotated(x, cosine, sine)


@jax.custom_vjp
def _rotated(x: Array, cosine: Array, sine: Array) -> Array:
    """Linear in x; its transpose is the rotation back."""
    return by_platform(x, cosine, sine, tpu=rotated_by_product, default=rotated_by_halves)


def _rotated_forward(x: Array, cosine: Array, sine: Array) -> tuple[Array, tuple[Array, Array]]:
    return _rotated(x, cosine, sine), (cosine, sine)


def _rotated_backward(kept: tuple[Array, Array], cotangent: Array) -> tuple[Array, None, None]:
    cosine, sine = kept
    return _rotated(cotangent, cosine, -sine), None, None


_rotated.defvjp(_rotated_forward, _rotated_backward)


def rotated_by_halves(x: Array, cosine: Array, sine: Array) -> Array:
    """The rotation of `rotary`, by angles (batch, 1, length, head_dim / 2)."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cosine - second * sine, second * cosine + first * sine)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def rotated_by_product(x: Array, cosine: Array, sine: Array) -> Array:
    """`rotated_by_halves`, bit for bit, for a TPU: halves of 64 fill half of its registers.

    The halves change places by a product with a permutation, which is exact: the rest is one pass over whole heads.
    """
    size = x.shape[-1]
    permutation = jnp.roll(jnp.eye(size, dtype=x.dtype), size // 2, axis=0)
    swapped = jnp.matmul(x, permutation, precision="highest").astype(jnp.float32)
    cosine = jnp.concatenate([cosine, cosine], axis=-1)
    sine = jnp.concatenate([-sine, sine], axis=-1)
    return (x.astype(jnp.float32) * cosine + swapped * sine).astype(x.dtype)


def rope_frequencies(
    head_dim: int,
    theta: float | None,
    scaling: Mapping[str, Any] | None,
    max_length: int,
) -> tuple[np.ndarray, float]:
    """The angle per position of each pair of features, and the factor of cosine and sine.

    Args:
      head_dim: features of a head, all of them rotated.
      theta: the base; `scaling["rope_theta"]` goes before it.
      scaling: transformers' `rope_scaling` (with "type" or "rope_type") or `rope_parameters`;
        known types are default, linear, llama3 and yarn (arXiv 2309.00071).
      max_length: the model's max_position_embeddings.

    Returns:
      Frequencies (head_dim / 2,) in float32, and the attention factor, 1.0 except for yarn.

    Raises:
      UserError: the type is unknown, a key that it needs is missing, or only a part of the
        features is to be rotated.

    >>> linear = {"rope_type": "linear", "factor": 2.0}
    >>> frequencies, factor = rope_frequencies(4, 10000.0, linear, 8)
    >>> frequencies.tolist(), factor
    ([0.5, 0.004999999888241291], 1.0)
    """
    scaling = dict(scaling or {})
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in _ROPE:
        raise UserError(
            f"unknown rope scaling {kind!r}: known are {', '.join(_ROPE)}{nearest(kind, _ROPE)}"
        )
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("rope with a partial_rotary_factor other than 1.0 is not known")
    theta = scaling.get("rope_theta") or theta
    if theta is None:
        raise UserError("rope needs a base: neither rope_theta nor rope_parameters gives one")
    # float64, rounded once: within the last place of transformers, which computes in float32
    plain = float(theta) ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    scaling = {"original_max_position_embeddings": max_length, **scaling}
    try:
        frequencies, attention_factor = _ROPE[kind](plain, float(theta), scaling, max_length)
    except KeyError as missing:
        raise UserError(f"rope scaling {kind!r} lacks {missing}") from None
    return frequencies.astype(np.float32), float(attention_factor)


def _default_rope(
    plain: np.ndarray, theta: float, scaling: Mapping[str, Any], max_length: int
) -> tuple[np.ndarray, float]:
    return plain, 1.0


def _linear_rope(
    plain: np.ndarray, theta: float, scaling: Mapping[str, Any], max_length: int
) -> tuple[np.ndarray, float]:
    return plain / scaling["factor"], 1.0


def _llama3_rope(
    plain: np.ndarray, theta: float, scaling: Mapping[str, Any], max_length: int
) -> tuple[np.ndarray, float]:
    """Long waves are slowed down, short ones stay, those between are blended (llama 3.1)."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - smooth) * plain / scaling["factor"] + smooth * plain, 1.0


def _yarn_rope(
    plain: np.ndarray, theta: float, scaling: Mapping[str, Any], max_length: int
) -> tuple[np.ndarray, float]:
    """As transformers' modeling_rope_utils has it, the correction range truncated or not."""
    original, half = scaling["original_max_position_embeddings"], plain.size
    factor = scaling["factor"]
    factor = max_length / original if factor is None else factor

    def feature(turns: float) -> float:
        """The feature pair that turns so often over the original length."""
        return half * math.log(original / (turns * 2 * math.pi)) / math.log(theta)

    low = feature(scaling.get("beta_fast") or 32)
    high = feature(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    high = high + 0.001 if low == high else high
    slow = np.clip((np.arange(half) - low) / (high - low), 0.0, 1.0)
    return plain / factor * slow + plain * (1 - slow), _yarn_attention_factor(scaling, factor)


def _yarn_attention_factor(scaling: Mapping[str, Any], factor: float) -> float:
    def magnitude(strength: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * strength * math.log(factor) + 1.0

    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    strength, strength_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if strength and strength_all:
        return magnitude(strength) / magnitude(strength_all)
    return magnitude(1.0)


_ROPE = {
    "default": _default_rope,
    "linear": _linear_rope,
    "llama3": _llama3_rope,
    "yarn": _yarn_rope,
}
