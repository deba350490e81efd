"""Gemma (arXiv 2403.08295): scales stored less 1, embedded tokens scaled by the root of their size."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from jaxft.models.config import Config
from jaxft.models.families.common import (
    SPELLINGS,
    TWO_NORMS,
    activation_of,
    causal,
    read_shape,
    tensors_by_name,
    write_rope,
    write_shape,
)
from jaxft.models.families.family import Family
from jaxft.models.rope import rope_settings


def read(raw: Mapping[str, Any]) -> Config:
    causal(raw)
    bias = bool(raw.get("attention_bias", False))
    length = raw.get("max_position_embeddings", 8192)
    act = raw.get("hidden_act") or "gelu_pytorch_tanh"
    return Config(
        **read_shape({"head_dim": 256, "num_key_value_heads": 16, **raw}),
        **rope_settings(raw, 10000.0, length),
        max_length=length,
        norm_offset=1.0,
        # The first folders say gelu and mean its approximation, as transformers knows.
        activation="gelu_tanh" if act == "gelu" else activation_of(act),
        attention_bias=bias,
        output_bias=bias,
        embedding_scale=raw["hidden_size"] ** 0.5,
        tied=bool(raw.get("tie_word_embeddings", True)),
    )


def write(config: Config) -> dict[str, Any]:
    return {
        **write_shape(config),
        **write_rope(config),
        "hidden_act": SPELLINGS[config.activation],
        "attention_bias": config.attention_bias,
    }


FAMILY = Family(
    "GemmaForCausalLM", read, write, functools.partial(tensors_by_name, norms=TWO_NORMS)
)
