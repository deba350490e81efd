"""Gemma 4, its text: sliding layers and full ones differ in their heads; the upper layers may have no own keys.

Consecutive layers of one structure are a segment. The sizes with experts (26B-A4B) are not served.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxft.errors import UserError
from jaxft.models.config import Config
from jaxft.models.families import gemma4_layers
from jaxft.models.families.common import (
    FULL,
    SLIDING,
    SPELLINGS,
    activation_of,
    causal,
    kinds_of,
    read_shape,
    windows_of,
    write_shape,
)
from jaxft.models.families.family import Family
from jaxft.models.families.gemma4_tensors import spare, tensors

WINDOW, INPUTS, ROWS = 512, 256, 262_144
DEFAULTS = {
    "vocab_size": 262_144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
}


def read(raw: Mapping[str, Any]) -> Config:
    causal({} if raw.get("use_bidirectional_attention") == "vision" else raw)
    if raw.get("enable_moe_block"):
        raise UserError(
            "config.json: enable_moe_block: gemma 4's experts (26B-A4B) are not served; its dense sizes are"
        )
    raw = {**DEFAULTS, **raw}
    layers = raw["num_hidden_layers"]
    kinds = list(
        raw.get("layer_types") or [SLIDING if (i + 1) % 6 else FULL for i in range(layers)]
    )
    kinds[-1:] = [FULL]  # as transformers has it, whatever the folder says
    bias = bool(raw.get("attention_bias", False))
    length = raw.get("max_position_embeddings", 131_072)
    inputs = raw.get("hidden_size_per_layer_input", INPUTS) or 0
    return Config(
        **read_shape(raw) | {"query_scale": 1.0},
        **gemma4_layers.read(raw, kinds, length),
        max_length=length,
        norm_place="both",
        query_key_norm="head",
        value_norm=True,
        activation=activation_of(raw.get("hidden_activation") or "gelu_pytorch_tanh"),
        attention_bias=bias,
        output_bias=bias,
        logit_softcap=raw.get("final_logit_softcapping"),
        windows=windows_of(kinds, raw.get("sliding_window", WINDOW)),
        layer_inputs=inputs,
        layer_vocabulary=raw.get("vocab_size_per_layer_input", ROWS) if inputs else 0,
        layer_scalars=True,
        embedding_scale=raw["hidden_size"] ** 0.5,
        tied=bool(raw.get("tie_word_embeddings", True)),
    )


def write(config: Config) -> dict[str, Any]:
    return {
        **write_shape(config),
        **gemma4_layers.write(config, kinds_of(config)),
        "hidden_activation": SPELLINGS[config.activation],
        "attention_bias": config.attention_bias,
        "final_logit_softcapping": config.logit_softcap,
        "layer_types": kinds_of(config),
        "sliding_window": max(config.windows, default=WINDOW),
        "hidden_size_per_layer_input": config.layer_inputs,
        "vocab_size_per_layer_input": config.layer_vocabulary or ROWS,
        "enable_moe_block": False,
    }


FAMILY = Family("Gemma4ForCausalLM", read, write, tensors, spare=spare)
