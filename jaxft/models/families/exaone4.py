"""EXAONE 4 (arXiv 2507.11407): norms behind attention and feed-forward and on each head; only windows are turned."""

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

NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}


def read(raw: Mapping[str, Any]) -> Config:
    length = raw.get("max_position_embeddings", 2048)
    shape = read_shape({"num_key_value_heads": 32, "rms_norm_eps": 1e-5, **raw})
    window = raw.get("sliding_window", 4096)
    every = raw.get("sliding_window_pattern", 4) if window else 0
    kinds = raw.get("layer_types") or [
        SLIDING if every and (layer + 1) % every else FULL for layer in range(shape["layers"])
    ]
    rope = rope_settings(raw, 10000.0, length)
    return Config(
        **shape,
        **rope,
        max_length=length,
        norm_place="after",
        query_key_norm="head",
        activation=activation_of(raw.get("hidden_act", "silu")),
        windows=windows_of(kinds, window),
        rotaries=turned_in(SLIDING, kinds, rope) if window else (),
        tied=bool(raw.get("tie_word_embeddings", False)),
    )


def write(config: Config) -> dict[str, Any]:
    everywhere = not config.rotaries
    return {
        **write_shape(config),
        **write_rope(config),
        "hidden_act": SPELLINGS[config.activation],
        "layer_types": kinds_of(config),
        "sliding_window": None if everywhere else window_of(config) or config.max_length,
        "sliding_window_pattern": None,
    }


FAMILY = Family("Exaone4ForCausalLM", read, write, functools.partial(tensors_by_name, norms=NORMS))
