"""Command R7B and Command A (arXiv 2504.00698): attention and feed-forward side by side; only windows are turned."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from jaxft.models.config import Config
from jaxft.models.families.common import (
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
from jaxft.models.families.turned import turned_in
from jaxft.models.rope import rope_settings

WINDOW = 4096  # of transformers where config.json has none


def read(raw: Mapping[str, Any]) -> Config:
    length = raw.get("max_position_embeddings", 8192)
    shape = read_shape({**raw, "head_dim": None, "rms_norm_eps": raw.get("layer_norm_eps", 1e-5)})
    every = raw.get("sliding_window_pattern", 4)
    kinds = raw.get("layer_types") or [
        SLIDING if (layer + 1) % every else FULL for layer in range(shape["layers"])
    ]
    rope = rope_settings(raw, 10000.0, length)
    bias = bool(raw.get("attention_bias", False))
    return Config(
        **shape,
        **rope,
        max_length=length,
        norm="layer",
        norm_bias=False,
        norm_place="parallel",
        activation=activation_of(raw.get("hidden_act", "silu")),
        attention_bias=bias,
        output_bias=bias,
        windows=windows_of(kinds, raw.get("sliding_window", WINDOW)),
        rotaries=turned_in(SLIDING, kinds, rope),
        rotary_pairs="neighbours",
        logit_scale=raw.get("logit_scale", 0.0625),
        tied=bool(raw.get("tie_word_embeddings", True)),
    )


def write(config: Config) -> dict[str, Any]:
    shape = write_shape(config)
    return {
        **shape,
        **write_rope(config),
        "layer_norm_eps": shape.pop("rms_norm_eps"),
        "hidden_act": SPELLINGS[config.activation],
        "attention_bias": config.attention_bias,
        "layer_types": kinds_of(config),
        "logit_scale": config.logit_scale,
        "sliding_window": window_of(config) or WINDOW,
    }


FAMILY = Family(
    "Cohere2ForCausalLM",
    read,
    write,
    functools.partial(tensors_by_name, norms={"attention_norm": "input_layernorm"}),
)
