"""Nemotron-4 and Minitron (arXiv 2402.16819, 2407.14679): layer norms stored less 1, squared ReLU."""

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
    write_shape,
)
from jaxft.models.families.family import Family
from jaxft.models.families.turned import read_turned, write_turned


def read(raw: Mapping[str, Any]) -> Config:
    length = raw.get("max_position_embeddings", 4096)
    shape = read_shape({**raw, "rms_norm_eps": raw.get("norm_eps", 1e-5)})
    bias = bool(raw.get("attention_bias", False))
    return Config(
        **shape,
        **read_turned(raw, shape["head_dim"], length, part=0.5),
        max_length=length,
        norm="layer",
        norm_offset=1.0,
        activation=activation_of(raw.get("hidden_act", "relu2")),
        gated=False,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        tied=bool(raw.get("tie_word_embeddings", False)),
    )


def write(config: Config) -> dict[str, Any]:
    shape = write_shape(config)
    return {
        **shape,
        **write_turned(config),
        "norm_eps": shape.pop("rms_norm_eps"),
        "hidden_act": SPELLINGS[config.activation],
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


FAMILY = Family(
    "NemotronForCausalLM", read, write, functools.partial(tensors_by_name, norms=TWO_NORMS)
)
