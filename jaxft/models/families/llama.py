"""Llama (arXiv 2302.13971, 2407.21783) and what is built as it is."""

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
from jaxft.models.rope import rope_settings


def read(raw: Mapping[str, Any]) -> Config:
    bias = bool(raw.get("attention_bias", False))
    length = raw.get("max_position_embeddings", 2048)
    return Config(
        **read_shape(raw),
        **rope_settings(raw, 10000.0, length),
        max_length=length,
        activation=activation_of(raw.get("hidden_act", "silu")),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        tied=bool(raw.get("tie_word_embeddings", False)),
    )


def write(config: Config) -> dict[str, Any]:
    return {
        **write_shape(config),
        **write_rope(config),
        "hidden_act": SPELLINGS[config.activation],
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


FAMILY = Family(
    "LlamaForCausalLM", read, write, functools.partial(tensors_by_name, norms=TWO_NORMS)
)
