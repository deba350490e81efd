"""OLMo 3: OLMo 2 with windows in three of four layers, and a stretched rotary in the others alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from jaxft.models.config import Config
from jaxft.models.families import llama, olmo2
from jaxft.models.families.common import (
    FULL,
    SLIDING,
    kinds_of,
    tensors_by_name,
    window_of,
    windows_of,
    write_rope_by_kind,
)
from jaxft.models.families.family import Family
from jaxft.models.rope import KEYS, rope_by_kind

THETA, WINDOW = 500_000.0, 4096


def read(raw: Mapping[str, Any]) -> Config:
    layers = raw["num_hidden_layers"]
    kinds = raw.get("layer_types") or [
        SLIDING if (layer + 1) % 4 else FULL for layer in range(layers)
    ]
    # As in transformers, a base at the top level is that of the layers that see everything.
    thetas = {FULL: raw.get("rope_theta") or THETA, SLIDING: THETA}
    length = raw.get("max_position_embeddings", 2048)
    plain = {key: value for key, value in raw.items() if key not in KEYS}
    return dataclasses.replace(
        olmo2.read(plain),
        **rope_by_kind(raw, kinds, thetas, FULL, length),
        windows=windows_of(kinds, raw.get("sliding_window", WINDOW)),
    )


def write(config: Config) -> dict[str, Any]:
    return {
        **llama.write(config),
        **write_rope_by_kind(config),
        "layer_types": kinds_of(config),
        "sliding_window": window_of(config) or WINDOW,
    }


FAMILY = Family(
    "Olmo3ForCausalLM", read, write, functools.partial(tensors_by_name, norms=olmo2.NORMS)
)
