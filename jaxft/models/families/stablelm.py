"""StableLM (arXiv 2402.17834): layer norms, a quarter of each head turned; the 12B is parallel, with norms a head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxft.models.config import Config
from jaxft.models.families.common import (
    SPELLINGS,
    TWO_NORMS,
    activation_of,
    read_shape,
    tensors_by_name,
    write_shape,
)
from jaxft.models.families.family import Family, Tensor
from jaxft.models.families.turned import read_turned, write_turned

PARALLEL = {"attention_norm": "input_layernorm"}
MODULES = {
    "q_norm": "self_attn.q_layernorm.norms.{expert}",
    "k_norm": "self_attn.k_layernorm.norms.{expert}",
}


def read(raw: Mapping[str, Any]) -> Config:
    length = raw.get("max_position_embeddings", 4096)
    epsilon = {"rms_norm_eps": raw.get("layer_norm_eps", 1e-5)}
    shape = read_shape({"num_key_value_heads": 32, **raw, **epsilon, "head_dim": None})
    return Config(
        **shape,
        **read_turned(raw, shape["head_dim"], length, part=0.25, proportional=False),
        max_length=length,
        norm="layer",
        norm_place="parallel" if raw.get("use_parallel_residual", False) else "before",
        query_key_norm="heads" if raw.get("qk_layernorm", False) else "",
        activation=activation_of(raw.get("hidden_act", "silu")),
        attention_bias=bool(raw.get("use_qkv_bias", False)),
        tied=bool(raw.get("tie_word_embeddings", False)),
    )


def write(config: Config) -> dict[str, Any]:
    shape = write_shape(config)
    return {
        **shape,
        **write_turned(config),
        "layer_norm_eps": shape.pop("rms_norm_eps"),
        "hidden_act": SPELLINGS[config.activation],
        "qk_layernorm": bool(config.query_key_norm),
        "use_parallel_residual": config.norm_place == "parallel",
        "use_qkv_bias": config.attention_bias,
    }


def tensors(config: Config) -> dict[str, Tensor]:
    norms = PARALLEL if config.norm_place == "parallel" else TWO_NORMS
    return tensors_by_name(config, norms, modules=MODULES)


FAMILY = Family("StableLmForCausalLM", read, write, tensors)
