"""SmolLM3: llama some of whose layers are not turned by position (arXiv 2501.18795)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from jaxft.errors import UserError, counted
from jaxft.models.config import Config, Rotary
from jaxft.models.families import llama
from jaxft.models.families.common import (
    FULL,
    SLIDING,
    TWO_NORMS,
    kinds_of,
    rotaries_of,
    spelled,
    tensors_by_name,
    window_of,
    windows_of,
)
from jaxft.models.families.family import Family
from jaxft.models.rope import rope_settings, rotary_fields


def read(raw: Mapping[str, Any]) -> Config:
    raw = {"tie_word_embeddings": True, "num_key_value_heads": 4, **raw}
    layers, length = raw["num_hidden_layers"], raw.get("max_position_embeddings", 32768)
    every = raw.get("no_rope_layer_interval", 4)
    turned = raw.get("no_rope_layers") or [(layer + 1) % every for layer in range(layers)]
    if len(turned) < layers:
        raise UserError(
            f"config.json: no_rope_layers has {counted(len(turned), 'layer')}, and num_hidden_layers is {layers}"
        )
    found = rope_settings(raw, 2e6, length)
    rotary = Rotary(found["rope_theta"], found["rope_scaling"])
    windowed = raw.get("use_sliding_window", False)
    # As in transformers, kinds of layers that are named have their windows whatever `use_sliding_window` says.
    kinds = raw.get("layer_types") or [SLIDING if windowed and not one else FULL for one in turned]
    return dataclasses.replace(
        llama.read(raw),
        **found | rotary_fields([rotary if one else None for one in turned[:layers]]),
        max_length=length,
        windows=windows_of(kinds[:layers], raw.get("sliding_window")),
    )


def write(config: Config) -> dict[str, Any]:
    return {
        **llama.write(config),
        "rope_parameters": spelled(config.rope_theta, config.rope_scaling),
        "no_rope_layers": [int(one is not None) for one in rotaries_of(config)],
        "layer_types": kinds_of(config),
        "sliding_window": window_of(config),
        "use_sliding_window": bool(config.windows),
        "pad_token_id": None,  # by default it is one that a smaller vocabulary lacks
    }


FAMILY = Family(
    "SmolLM3ForCausalLM", read, write, functools.partial(tensors_by_name, norms=TWO_NORMS)
)
