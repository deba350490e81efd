"""Qwen3 (arXiv 2505.09388): llama with a norm on each query and key head."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from jaxft.models.config import Config
from jaxft.models.families.common import (
    SPELLINGS,
    TWO_NORMS,
    activation_of,
    read_shape,
    tensors_by_name,
    write_rope,
    write_shape,
)
from jaxft.models.families.family import Family
from jaxft.models.families.qwen2 import upper_windows, write_upper_windows
from jaxft.models.rope import rope_settings


def read(raw: Mapping[str, Any]) -> Config:
    length = raw.get("max_position_embeddings", 32768)
    bias = bool(raw.get("attention_bias", False))
    return Config(
        **read_shape({"head_dim": 128, "num_key_value_heads": 32, **raw}),
        **rope_settings(raw, 10000.0, length),
        max_length=length,
        query_key_norm="head",
        activation=activation_of(raw.get("hidden_act", "silu")),
        attention_bias=bias,
        output_bias=bias,
        windows=upper_windows(raw),
        tied=bool(raw.get("tie_word_embeddings", False)),
    )


def write(config: Config) -> dict[str, Any]:
    return {
        **write_shape(config),
        **write_rope(config),
        "hidden_act": SPELLINGS[config.activation],
        "attention_bias": config.attention_bias,
        **write_upper_windows(config),
    }


FAMILY = Family(
    "Qwen3ForCausalLM", read, write, functools.partial(tensors_by_name, norms=TWO_NORMS)
)
