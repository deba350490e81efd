"""Granite 3: llama with four factors: on the embedded tokens, attention's scores, the residual and the logits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from jaxft.models.config import Config
from jaxft.models.families import llama
from jaxft.models.families.common import TWO_NORMS, tensors_by_name
from jaxft.models.families.family import Family


def read(raw: Mapping[str, Any]) -> Config:
    return dataclasses.replace(
        llama.read(raw),
        embedding_scale=raw.get("embedding_multiplier", 1.0),
        query_scale=raw.get("attention_multiplier", 1.0),
        residual_scale=raw.get("residual_multiplier", 1.0),
        logit_scale=1.0 / raw.get("logits_scaling", 1.0),
    )


def write(config: Config) -> dict[str, Any]:
    return {
        **llama.write(config),
        "embedding_multiplier": config.embedding_scale,
        "attention_multiplier": config.query_scale,
        "residual_multiplier": config.residual_scale,
        "logits_scaling": float(f"{1.0 / config.logit_scale:.12g}"),
    }


FAMILY = Family(
    "GraniteForCausalLM", read, write, functools.partial(tensors_by_name, norms=TWO_NORMS)
)
