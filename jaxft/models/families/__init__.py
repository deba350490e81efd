"""The families, one file each: how config.json reads as a `Config` and is written from one, and the tensors' names.

To add one, write its file and its entry in `FAMILIES`.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from typing import Any

from jaxft.errors import UserError, nearest, shown
from jaxft.models.config import Config
from jaxft.models.families import (
    cohere2,
    exaone4,
    gemma,
    gemma2,
    gemma3,
    gemma4,
    glm4,
    gpt2,
    granite,
    llama,
    ministral3,
    mistral,
    nemotron,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen3,
    seed_oss,
    smollm3,
    stablelm,
    starcoder2,
)
from jaxft.models.families.family import Family, Tensor
from jaxft.models.families.unserved import missing_in
from jaxft.models.segments import segments_of
from jaxft.tree import in_layers

__all__ = ["FAMILIES", "Family", "Tensor", "family_of", "module_names", "tensors_of"]

# config.json's model_type -> the family.
FAMILIES = {
    "llama": llama.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
    "mistral": mistral.FAMILY,
    "ministral3": ministral3.FAMILY,
    "gemma": gemma.FAMILY,
    "gemma2": gemma2.FAMILY,
    "gemma3_text": gemma3.FAMILY,
    "gemma4_text": gemma4.FAMILY,
    "smollm3": smollm3.FAMILY,
    "olmo2": olmo2.FAMILY,
    "olmo3": olmo3.FAMILY,
    "granite": granite.FAMILY,
    "gpt2": gpt2.FAMILY,
    "phi3": phi3.FAMILY,
    "glm4": glm4.FAMILY,
    "exaone4": exaone4.FAMILY,
    "seed_oss": seed_oss.FAMILY,
    "cohere2": cohere2.FAMILY,
    "starcoder2": starcoder2.FAMILY,
    "stablelm": stablelm.FAMILY,
    "nemotron": nemotron.FAMILY,
}

ALIKE = 0.75  # of two names' letters: below it they have little in common but letters


def family_of(model_type: Any, where: str, raw: Mapping[str, Any] | None = None) -> Family:
    """The family of a config.json's `model_type`.

    Args:
        model_type: the architecture's name.
        where: the file, for messages.
        raw: the whole config.json, which says what an architecture has that none of the families has.

    Raises:
        UserError: an architecture that is not served, with the nearest that is, what it has that is missing, and all
            that are known.
    """
    known = ", ".join(FAMILIES)
    if model_type is None:
        raise UserError(
            f"{where}: no model_type, which names the architecture; jaxft knows {known}"
        )
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        lacking = missing_in(raw or {})
        says = f": it has {lacking}, which jaxft does not serve" if lacking else ""
        raise UserError(
            f"{where}: unknown architecture {shown(model_type)}{_nearest(model_type)}{says}; jaxft knows {known}"
        )
    return FAMILIES[model_type]


def _nearest(model_type: Any) -> str:
    """The family whose name begins this one's, or the one that is spelled most like it."""
    if not isinstance(model_type, str):
        return ""
    begins = [name for name in FAMILIES if model_type.startswith(name.removesuffix("_text"))]
    if begins:
        return f" (nearest: {max(begins, key=len)!r})"
    alike = difflib.get_close_matches(model_type, FAMILIES, n=1, cutoff=ALIKE)
    return nearest(model_type, alike)


def tensors_of(config: Config) -> dict[str, Tensor]:
    """{path in the tree: Tensor} of a decoder's family, its biases and head as the config says."""
    return dict(_tensors_of(config))


@functools.lru_cache(maxsize=64)
def _tensors_of(config: Config) -> dict[str, Tensor]:
    tensors = FAMILIES[config.family].tensors
    found = {path: tensor for path, tensor in tensors(config).items() if not in_layers(path)}
    for segment in segments_of(config):
        own = {path: tensor for path, tensor in tensors(segment.config).items() if in_layers(path)}
        found |= {f"{segment.name}/{path.split('/', 1)[1]}": one for path, one in own.items()}
    return found


def module_names(config: Config) -> dict[str, str]:
    """{path of a kernel: its module's name with {layer}}: the names that PEFT knows modules by."""
    names = {path: tensor.module for path, tensor in tensors_of(config).items()}
    return names | {"head/kernel": "lm_head"}
