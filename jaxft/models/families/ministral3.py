"""Ministral 3: mistral with yarn, and queries that grow with the position (llama 4's temperature)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from jaxft.models.config import Config
from jaxft.models.families import mistral
from jaxft.models.families.common import TWO_NORMS, spelled, tensors_by_name
from jaxft.models.families.family import Family
from jaxft.models.rope import KEYS, ORIGINAL

BETA = "llama_4_scaling_beta"
# Of transformers where config.json has none.
ROTARY = {
    "type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    ORIGINAL: 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    BETA: 0.1,
}


def read(raw: Mapping[str, Any]) -> Config:
    length = raw.get("max_position_embeddings", 262_144)
    given = [raw[key] for key in KEYS if raw.get(key)]
    whole = {"rms_norm_eps": 1e-5, "sliding_window": None, "head_dim": 128, **raw}
    whole |= {"max_position_embeddings": length} | ({} if given else {KEYS[0]: ROTARY})
    config = mistral.read(whole)
    rotary: Mapping[str, Any] = given[-1] if given else ROTARY
    settled = {**rotary, **dict(config.rope_scaling)}
    growth = (float(rotary[BETA]), float(settled[ORIGINAL])) if rotary.get(BETA) else ()
    return dataclasses.replace(config, query_growth=growth)


def write(config: Config) -> dict[str, Any]:
    beta, original = config.query_growth or (0.0, config.max_length)
    rotary = {ORIGINAL: int(original), **spelled(config.rope_theta, config.rope_scaling)}
    written = mistral.write(config)
    written.pop("rope_scaling", None)
    return {**written, "rope_parameters": rotary | {BETA: beta}}


FAMILY = Family(
    "Ministral3ForCausalLM", read, write, functools.partial(tensors_by_name, norms=TWO_NORMS)
)
