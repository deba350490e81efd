"""A decoder's shape as a GGUF file says it: the inverse of `architectures.config_of`, read back and compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.errors import UserError
from jaxft.formats.gguf.architectures import ARCHITECTURES, Architecture, config_of
from jaxft.formats.gguf.header import Header
from jaxft.formats.gguf.rotary import said_scaling
from jaxft.models.config import Config, Rotary
from jaxft.models.families import family_of

SAID_ELSEWHERE = ("family", "dtype", "remat")


@dataclasses.dataclass(frozen=True)
class Given:
    """A tensor that is to be written, as far as the reading of settings asks for it."""

    shape: tuple[int, ...]
    array: np.ndarray | None = None

    def read(self) -> np.ndarray:
        """Its numbers."""
        assert self.array is not None
        return self.array


def architecture_for(config: Config, where: str) -> tuple[str, Architecture]:
    """(llama.cpp's name, its row) for a decoder. Raises UserError for a family that has none here."""
    for name, row in ARCHITECTURES.items():
        if config.family in (row.model_type, *row.also):
            return name, row
    known = ", ".join(one for row in ARCHITECTURES.values() for one in (row.model_type, *row.also))
    raise UserError(f"{where}: {config.family} is not written to GGUF; these are: {known}")


def settings_of(config: Config, name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(the keys below the architecture's name, tensors that say settings).

    Args:
        config: the decoder's.
        name: llama.cpp's name of its architecture.
    """
    rms = "rms_" if config.norm == "rms" else ""
    said: dict[str, Any] = {
        "context_length": config.max_length,
        "embedding_length": config.hidden,
        "feed_forward_length": config.intermediate,
        "block_count": config.layers,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.key_heads,
        f"attention.layer_norm_{rms}epsilon": float(config.norm_epsilon),
        "vocab_size": config.vocabulary,
    }
    if config.windows:
        said["attention.sliding_window"] = max(config.windows)
    if config.attention_softcap:
        said["attn_logit_softcapping"] = float(config.attention_softcap)
    if config.logit_softcap:
        said["final_logit_softcapping"] = float(config.logit_softcap)
    beside: dict[str, np.ndarray] = {}
    if config.positions == "rotary":
        turning, beside = _rotary(config)
        said |= turning
    said |= ARCHITECTURES[name].said(config)
    return {f"{name}.{key}": value for key, value in said.items()}, beside


def _rotary(config: Config) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    rotary = Rotary(config.rope_theta, config.rope_scaling)
    said: dict[str, Any] = {
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.rotary_dim or config.head_dim,
    }
    if config.rotaries and config.windows:
        by_window = dict(zip(config.windows, config.rotaries, strict=True))
        rotary = by_window.get(0) or rotary
        if inside := next((one for window, one in by_window.items() if window and one), None):
            said["rope.freq_base_swa"] = float(inside.theta)
    said["rope.freq_base"] = float(rotary.theta)
    dim = config.rotary_dim or config.head_dim
    scaling, beside = said_scaling(rotary, dim, config.max_length)
    return said | {f"rope.scaling.{key}": value for key, value in scaling.items()}, beside


def check_said(
    config: Config,
    metadata: Mapping[str, Any],
    names: Sequence[str],
    beside: Mapping[str, np.ndarray],
    where: str,
) -> None:
    """UserError where a file with these keys and tensors is read as another decoder, which names what it cannot say."""
    tensors: dict[str, Any] = {name: Given((config.vocabulary, config.hidden)) for name in names}
    tensors |= {name: Given(array.shape, array) for name, array in beside.items()}
    raw = config_of(Header(Path(where), dict(metadata), tensors))
    read = family_of(raw["model_type"], where).read(raw)
    ours, theirs = dataclasses.asdict(config), dataclasses.asdict(read)
    lost = [key for key in ours if key not in SAID_ELSEWHERE and ours[key] != theirs[key]]
    if lost:
        values = "; ".join(f"{key} {ours[key]}, read as {theirs[key]}" for key in lost)
        raise UserError(
            f"{where}: llama.cpp's files of {metadata['general.architecture']} cannot say: {values[:400]}"
        )
