"""Mistral (arXiv 2310.06825): llama whose layers all see a window, or, from version 0.2 on, everything."""

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
    window_of,
    write_rope,
    write_shape,
)
from jaxft.models.families.family import Family
from jaxft.models.rope import rope_settings


def read(raw: Mapping[str, Any]) -> Config:
    length = raw.get("max_position_embeddings", 4096 * 32)
    window = raw.get("sliding_window", 4096)
    return Config(
        **read_shape({"num_key_value_heads": 8, **raw}),
        **rope_settings(raw, 10000.0, length),
        max_length=length,
        activation=activation_of(raw.get("hidden_act", "silu")),
        windows=(window,) * raw["num_hidden_layers"] if window else (),
        tied=bool(raw.get("tie_word_embeddings", False)),
    )


def write(config: Config) -> dict[str, Any]:
    return {
        **write_shape(config),
        **write_rope(config),
        "hidden_act": SPELLINGS[config.activation],
        "sliding_window": window_of(config),
    }


FAMILY = Family(
    "MistralForCausalLM", read, write, functools.partial(tensors_by_name, norms=TWO_NORMS)
)
