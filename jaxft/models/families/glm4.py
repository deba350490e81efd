"""GLM-4 of 2025: norms on both sides, gate and up in one kernel, half of each head turned, by neighbours."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from jaxft.models.config import Config
from jaxft.models.families.common import (
    SPELLINGS,
    activation_of,
    read_shape,
    tensors_by_name,
    write_shape,
)
from jaxft.models.families.family import Family
from jaxft.models.families.turned import read_turned, write_turned

NORMS = {
    "attention_norm": "input_layernorm",
    "post_attention_norm": "post_self_attn_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "post_mlp_norm": "post_mlp_layernorm",
}
DEFAULTS = {"head_dim": 128, "num_key_value_heads": 2, "rms_norm_eps": 1.5625e-7}


def read(raw: Mapping[str, Any]) -> Config:
    length = raw.get("max_position_embeddings", 131072)
    shape = read_shape({**DEFAULTS, **raw})
    return Config(
        **shape,
        **read_turned(raw, shape["head_dim"], length, part=0.5),
        max_length=length,
        norm_place="both",
        activation=activation_of(raw.get("hidden_act", "silu")),
        attention_bias=bool(raw.get("attention_bias", True)),
        fused_gate_up=True,
        rotary_pairs="neighbours",
        tied=bool(raw.get("tie_word_embeddings", False)),
    )


def write(config: Config) -> dict[str, Any]:
    return {
        **write_shape(config),
        **write_turned(config),
        "hidden_act": SPELLINGS[config.activation],
        "attention_bias": config.attention_bias,
        "pad_token_id": None,  # transformers' own lies beyond a small vocabulary
    }


FAMILY = Family("Glm4ForCausalLM", read, write, functools.partial(tensors_by_name, norms=NORMS))
