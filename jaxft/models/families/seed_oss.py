"""Seed-OSS: llama with biases on q, k and v, and a head size of its own."""

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

DEFAULTS = {"head_dim": 128, "num_key_value_heads": 8}


def read(raw: Mapping[str, Any]) -> Config:
    length = raw.get("max_position_embeddings", 524288)
    return Config(
        **read_shape({**DEFAULTS, **raw}),
        **rope_settings(raw, 10000.0, length),
        max_length=length,
        activation=activation_of(raw.get("hidden_act", "silu")),
        attention_bias=bool(raw.get("attention_bias", True)),
        output_bias=bool(raw.get("attention_out_bias", False)),
        mlp_bias=bool(raw.get("mlp_bias", False)),
        tied=bool(raw.get("tie_word_embeddings", False)),
    )


def write(config: Config) -> dict[str, Any]:
    return {
        **write_shape(config),
        **write_rope(config),
        "hidden_act": SPELLINGS[config.activation],
        "attention_bias": config.attention_bias,
        "attention_out_bias": config.output_bias,
        "mlp_bias": config.mlp_bias,
    }


FAMILY = Family(
    "SeedOssForCausalLM", read, write, functools.partial(tensors_by_name, norms=TWO_NORMS)
)
