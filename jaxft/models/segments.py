"""Segments: consecutive layers of one structure, which the decoder scans over in one program.

What differs from layer to layer in data alone (window, rotary) is scanned beside them. A decoder whose layers are all
alike has one segment, `layers` in the tree; one whose layers differ in structure has `layers_0`, `layers_1`, ...
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from jaxft.models.config import Config, Rotary
from jaxft.models.rope import ORIGINAL


class Segment(NamedTuple):
    """Consecutive layers of one structure.

    Attributes:
        name: of the segment in the tree.
        start: the number of its first layer in the model.
        config: that of a decoder with these layers alone.
    """

    name: str
    start: int
    config: Config


def segments_of(config: Config) -> tuple[Segment, ...]:
    """The segments of a decoder, in the order of their layers.

    Raises ValueError where the parts of the configuration are not its layers.
    """
    if not config.parts:
        return (Segment("layers", 0, config),)
    counts = [count for count, _ in config.parts]
    if sum(counts) != config.layers or min(counts) < 1:
        raise ValueError(f"parts of {counts} layers are no {config.layers} layers")
    found = []
    for number, (count, changes) in enumerate(config.parts):
        start = sum(counts[:number])
        here = slice(start, start + count)
        own = dataclasses.replace(
            config,
            layers=count,
            windows=config.windows[here],
            rotaries=config.rotaries[here],
            parts=(),
            **dict(changes),
        )
        found.append(Segment(f"layers_{number}", start, own))
    return tuple(found)


def original_lengths(config: Config) -> set[int]:
    """The sequence lengths from which on longrope's layers take their long factors; empty without such layers.

    `jaxft.load` refuses a model with more than one.
    """
    rotaries = list[Rotary | None]()
    for _, _, own in segments_of(config):
        rotaries += own.rotaries or [Rotary(own.rope_theta, own.rope_scaling)]
    kinds = [dict(one.scaling) for one in rotaries if one is not None]
    return {int(one[ORIGINAL]) for one in kinds if one.get("rope_type") == "longrope"}


def attention_projections(config: Config) -> tuple[str, ...]:
    """The projections of attention's input in a segment: fused, or those of the queries, keys and values it makes."""
    if config.fused_qkv:
        return ("qkv_proj",)
    if config.keys_from >= 0:
        return ("q_proj",)
    return ("q_proj", "k_proj") if config.keys_are_values else ("q_proj", "k_proj", "v_proj")


def query_key_norms(config: Config) -> tuple[str, ...]:
    """The norms of the queries and keys that a segment makes."""
    if not config.query_key_norm:
        return ()
    return ("q_norm",) if config.keys_from >= 0 else ("q_norm", "k_norm")


def start_of(config: Config, path: str) -> int:
    """The number of the first layer of the segment in which a path stands; 0 outside of the layers."""
    starts = {segment.name: segment.start for segment in segments_of(config)}
    return starts.get(path.split("/")[0], 0)
