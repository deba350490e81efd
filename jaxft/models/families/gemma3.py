"""Gemma 3 (arXiv 2503.19786): gemma 2 with norms of queries and keys for its soft caps, and two rotaries.

Its folders with vision have this as their text.
"""

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
    causal,
    kinds_of,
    read_shape,
    tensors_by_name,
    window_of,
    windows_of,
    write_rope_by_kind,
    write_shape,
)
from jaxft.models.families.family import Family
from jaxft.models.rope import rope_by_kind

WINDOW = 4096
# Of transformers: the folders with vision leave out what they have of it.
DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
}


def read(raw: Mapping[str, Any]) -> Config:
    causal(raw)
    raw = {**DEFAULTS, **raw}
    layers = raw["num_hidden_layers"]
    every = raw.get("sliding_window_pattern", 6)
    kinds = raw.get("layer_types") or [
        SLIDING if (layer + 1) % every else FULL for layer in range(layers)
    ]
    thetas = {FULL: raw.get("rope_theta") or 1e6, SLIDING: raw.get("rope_local_base_freq") or 1e4}
    bias = bool(raw.get("attention_bias", False))
    length = raw.get("max_position_embeddings", 131_072)
    return Config(
        **read_shape(raw) | {"query_scale": raw.get("query_pre_attn_scalar", 256) ** -0.5},
        **rope_by_kind(raw, kinds, thetas, FULL, length),
        max_length=length,
        norm_offset=1.0,
        norm_place="both",
        query_key_norm="head",
        activation=activation_of(raw.get("hidden_activation") or "gelu_pytorch_tanh"),
        attention_bias=bias,
        output_bias=bias,
        logit_softcap=raw.get("final_logit_softcapping"),
        windows=windows_of(kinds, raw.get("sliding_window", WINDOW)),
        embedding_scale=raw["hidden_size"] ** 0.5,
        tied=bool(raw.get("tie_word_embeddings", True)),
    )


def write(config: Config) -> dict[str, Any]:
    return {
        **write_shape(config),
        **write_rope_by_kind(config),
        "hidden_activation": SPELLINGS[config.activation],
        "attention_bias": config.attention_bias,
        "attn_logit_softcapping": None,  # which transformers has among the settings, and does not apply
        "final_logit_softcapping": config.logit_softcap,
        "layer_types": kinds_of(config),
        "query_pre_attn_scalar": round(config.query_scale**-2),
        "sliding_window": window_of(config) or WINDOW,
    }


FAMILY = Family(
    "Gemma3ForCausalLM", read, write, functools.partial(tensors_by_name, norms=FOUR_NORMS)
)
