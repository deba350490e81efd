"""The angles by which rotary positions turn features: the kinds that transformers' modeling_rope_utils knows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxft.errors import UserError, nearest


def rope_frequencies(
    head_dim: int,
    theta: float | None,
    scaling: Mapping[str, Any] | None,
    max_length: int,
) -> tuple[np.ndarray, float]:
    """The angle per position of each pair of features, and the factor of cosine and sine.

    Args:
      head_dim: features of a head that are rotated.
      theta: the base; `scaling["rope_theta"]` goes before it.
      scaling: transformers' `rope_scaling` (with "type" or "rope_type") or `rope_parameters`;
        known types are default, linear, llama3, yarn (arXiv 2309.00071), longrope (arXiv 2402.13753) and
        proportional.
      max_length: the model's max_position_embeddings.

    Returns:
      Frequencies (head_dim / 2,) in float32, and the attention factor, 1.0 except for yarn and longrope. Of longrope
      they are those of sequences up to its original length: see `long_frequencies`.

    Raises:
      UserError: the type is unknown, a key that it needs is missing or does not fit, or only a part of the
        features is to be rotated, which `head_dim` says.

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
    if scaling.get("partial_rotary_factor", 1.0) != 1.0 and kind != "proportional":
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


def _longrope(
    plain: np.ndarray, theta: float, scaling: Mapping[str, Any], max_length: int
) -> tuple[np.ndarray, float]:
    """Each pair's own factor, and one for all that grows with the ratio of the lengths."""
    factor = scaling.get("attention_factor")
    if factor is None:
        original = scaling["original_max_position_embeddings"]
        ratio = scaling.get("factor") or max_length / original
        factor = 1.0 if ratio <= 1 else math.sqrt(1 + math.log(ratio) / math.log(original))
    return plain / _factors(plain, scaling, "short_factor"), factor


def _factors(plain: np.ndarray, scaling: Mapping[str, Any], key: str) -> np.ndarray:
    factors = np.asarray(scaling[key], np.float64)
    if factors.shape != plain.shape:
        raise UserError(f"rope scaling: {key} has {factors.size} numbers for {plain.size} pairs")
    return factors


def long_frequencies(head_dim: int, theta: float, scaling: Mapping[str, Any]) -> np.ndarray | None:
    """longrope's frequencies (head_dim / 2,) of sequences past its original length; None of other kinds."""
    if scaling.get("rope_type") != "longrope":
        return None
    plain = float(theta) ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    return (plain / _factors(plain, scaling, "long_factor")).astype(np.float32)


def _proportional_rope(
    plain: np.ndarray, theta: float, scaling: Mapping[str, Any], max_length: int
) -> tuple[np.ndarray, float]:
    """The first pairs turn as they would if all did; the others do not (gemma4)."""
    turned = int(scaling.get("partial_rotary_factor", 1.0) * plain.size)
    return np.where(np.arange(plain.size) < turned, plain, 0.0) / scaling.get("factor", 1.0), 1.0


_ROPE = {
    "default": _default_rope,
    "linear": _linear_rope,
    "llama3": _llama3_rope,
    "yarn": _yarn_rope,
    "longrope": _longrope,
    "proportional": _proportional_rope,
}
