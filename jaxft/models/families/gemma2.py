"""Gemma 2 (arXiv 2408.00118): norms on both sides, scales stored less 1, soft caps, windows in every other layer."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from jaxft.models.config import Config
from jaxft.models.families.common import (
    FOUR_NORMS,
    FULL,
    SLIDING,
    SPELLINGS,
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

WINDOW = 4096  # of transformers where config.json has none


def read(raw: Mapping[str, Any]) -> Config:
    layers = raw["num_hidden_layers"]
    kinds = raw.get("layer_types") or [SLIDING, FULL] * ((layers + 1) // 2)
    scale = raw.get("query_pre_attn_scalar", 256) ** -0.5
    shape = read_shape({"head_dim": 256, "num_key_value_heads": 4, **raw}) | {"query_scale": scale}
    bias = bool(raw.get("attention_bias", False))
    length = raw.get("max_position_embeddings", 8192)
    return Config(
        **shape,
        **rope_settings(raw, 10000.0, length),
        max_length=length,
        norm_offset=1.0,
        norm_place="both",
        activation=activation_of(raw.get("hidden_activation") or "gelu_pytorch_tanh"),
        attention_bias=bias,
        output_bias=bias,
        attention_softcap=raw.get("attn_logit_softcapping", 50.0),
        logit_softcap=raw.get("final_logit_softcapping", 30.0),
        windows=windows_of(kinds[:layers], raw.get("sliding_window", WINDOW)),
        embedding_scale=raw["hidden_size"] ** 0.5,
        tied=bool(raw.get("tie_word_embeddings", True)),
    )


def write(config: Config) -> dict[str, Any]:
    return {
        **write_shape(config),
        **write_rope(config),
        "hidden_activation": SPELLINGS[config.activation],
        "attention_bias": config.attention_bias,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        "layer_types": kinds_of(config),
        "query_pre_attn_scalar": round(config.query_scale**-2),
        "sliding_window": window_of(config) or WINDOW,
    }


def needed(raw: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """transformers' gemma2 needs a window where no layer has one too."""
    if raw.get("sliding_window", WINDOW):
        return {}
    return {"sliding_window": WINDOW, "layer_types": kinds_of(config)}


FAMILY = Family(
    "Gemma2ForCausalLM",
    read,
    write,
    functools.partial(tensors_by_name, norms=FOUR_NORMS),
    needed=needed,
)
