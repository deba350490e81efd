"""Qwen2 and Qwen2.5 (arXiv 2407.10671): llama with biases on q, k and v, and windows in the upper layers."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from jaxft.models.config import Config
from jaxft.models.families.common import (
    FULL,
    SLIDING,
    SPELLINGS,
    TWO_NORMS,
    activation_of,
    kinds_of,
    read_shape,
    tensors_by_name,
    window_of,
    windows_of,
    write_rope,
    write_shape,
)
from jaxft.models.families.family import Family
from jaxft.models.rope import rope_settings


def read(raw: Mapping[str, Any]) -> Config:
    length = raw.get("max_position_embeddings", 32768)
    return Config(
        **read_shape({"num_key_value_heads": 32, **raw}),
        **rope_settings(raw, 10000.0, length),
        max_length=length,
        activation=activation_of(raw.get("hidden_act", "silu")),
        attention_bias=True,
        windows=upper_windows(raw),
        tied=bool(raw.get("tie_word_embeddings", False)),
    )


def upper_windows(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """The windows of the layers from `max_window_layers` on, where config.json turns them on."""
    window = raw.get("sliding_window", 4096) if raw.get("use_sliding_window", False) else None
    first = raw.get("max_window_layers", 28)
    kinds = raw.get("layer_types") or [
        SLIDING if layer >= first else FULL for layer in range(raw["num_hidden_layers"])
    ]
    return windows_of(kinds, window)


def write(config: Config) -> dict[str, Any]:
    return {
        **write_shape(config),
        **write_rope(config),
        "hidden_act": SPELLINGS[config.activation],
        **write_upper_windows(config),
    }


def write_upper_windows(config: Config) -> dict[str, Any]:
    """The inverse of `upper_windows`."""
    return {
        "layer_types": kinds_of(config),
        "sliding_window": window_of(config),
        "use_sliding_window": bool(config.windows),
    }


FAMILY = Family(
    "Qwen2ForCausalLM", read, write, functools.partial(tensors_by_name, norms=TWO_NORMS)
)
