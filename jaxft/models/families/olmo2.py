"""OLMo 2 (arXiv 2501.00656): norms behind attention and feed-forward, and one over all queries and all keys."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from jaxft.models.config import Config
from jaxft.models.families import llama
from jaxft.models.families.common import tensors_by_name
from jaxft.models.families.family import Family

NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}


def read(raw: Mapping[str, Any]) -> Config:
    config = llama.read({"rms_norm_eps": 1e-5, **raw, "mlp_bias": False})  # which it never has
    return dataclasses.replace(config, norm_place="after", query_key_norm="width")


FAMILY = Family(
    "Olmo2ForCausalLM", read, llama.write, functools.partial(tensors_by_name, norms=NORMS)
)
