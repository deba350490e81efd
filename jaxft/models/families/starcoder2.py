"""StarCoder 2 (arXiv 2402.19173): layer norms, biases everywhere, a plain feed-forward, windows."""

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

MODULES = {"up_proj": "mlp.c_fc", "down_proj": "mlp.c_proj"}


def read(raw: Mapping[str, Any]) -> Config:
    length = raw.get("max_position_embeddings", 4096)
    epsilon = {"rms_norm_eps": raw.get("norm_epsilon", 1e-5)}
    shape = read_shape({"num_key_value_heads": 2, **raw, **epsilon})
    bias, window = bool(raw.get("use_bias", True)), raw.get("sliding_window")
    return Config(
        **shape,
        **rope_settings(raw, 10000.0, length),
        max_length=length,
        norm="layer",
        activation=activation_of(raw.get("hidden_act", "gelu_pytorch_tanh")),
        gated=False,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        windows=(window,) * shape["layers"] if window else (),
        tied=bool(raw.get("tie_word_embeddings", True)),
    )


def write(config: Config) -> dict[str, Any]:
    shape = write_shape(config)
    return {
        **shape,
        **write_rope(config),
        "norm_epsilon": shape.pop("rms_norm_eps"),
        "hidden_act": SPELLINGS[config.activation],
        "sliding_window": window_of(config),
        "use_bias": config.mlp_bias,
    }


FAMILY = Family(
    "Starcoder2ForCausalLM",
    read,
    write,
    functools.partial(tensors_by_name, norms=TWO_NORMS, modules=MODULES),
)
