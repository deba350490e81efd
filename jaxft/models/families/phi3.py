"""Phi-3 and Phi-4 (arXiv 2404.14219, 2503.01743): llama with fused kernels, partly turned heads, and longrope."""

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
    write_shape,
)
from jaxft.models.families.family import Family
from jaxft.models.families.turned import read_turned, write_turned
from jaxft.models.rope import ORIGINAL

ORIGINAL_LENGTH = 4096  # of transformers where its top level has none, whatever stands inside


def read(raw: Mapping[str, Any]) -> Config:
    length = raw.get("max_position_embeddings", 4096)
    shape = read_shape({"rms_norm_eps": 1e-5, **raw})
    original = {ORIGINAL: raw.get(ORIGINAL, ORIGINAL_LENGTH)}
    window = raw.get("sliding_window")
    return Config(
        **shape,
        **read_turned({**raw, **original}, shape["head_dim"], length),
        max_length=length,
        activation=activation_of(raw.get("hidden_act", "silu")),
        fused_qkv=True,
        fused_gate_up=True,
        windows=(window,) * shape["layers"] if window else (),
        tied=bool(raw.get("tie_word_embeddings", False)),
    )


def write(config: Config) -> dict[str, Any]:
    scaling = dict(config.rope_scaling)
    return {
        **write_shape(config),
        **write_turned(config),
        ORIGINAL: scaling.get(ORIGINAL, config.max_length),
        "hidden_act": SPELLINGS[config.activation],
        "sliding_window": window_of(config),
        "pad_token_id": None,  # transformers' own lies beyond a small vocabulary
    }


FAMILY = Family("Phi3ForCausalLM", read, write, functools.partial(tensors_by_name, norms=TWO_NORMS))
