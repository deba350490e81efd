"""What is turned by rotary positions: a part of each head, or the layers of one kind; read and written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.errors import UserError
from jaxft.models.config import Config, Rotary
from jaxft.models.families.common import spelled
from jaxft.models.rope import KEYS, PARTIAL, rope_settings


def read_turned(
    raw: Mapping[str, Any],
    head_dim: int,
    length: int,
    *,
    theta: float = 10000.0,
    part: float = 1.0,
    proportional: bool = True,
) -> dict[str, Any]:
    """The rotary settings of a family that turns a part of each head: those of `rope_settings`, and `rotary_dim`.

    Args:
        raw: config.json.
        head_dim: features of a head.
        length: the longest sequence.
        theta: the family's base, and
        part: its `partial_rotary_factor`, where config.json has none.
        proportional: whether the family knows a part of that kind: of the pairs of a whole head.

    Raises:
        UserError: a part that is no even number of features, or one that the family does not know.
    """
    inner = [raw[key] for key in reversed(KEYS) if raw.get(key)]
    found = [one[PARTIAL] for one in (*inner, raw) if one.get(PARTIAL) is not None]
    share = found[0] if found else part
    if inner and "proportional" in (inner[0].get("rope_type"), inner[0].get("type")):
        if share != 1.0 and not proportional:
            raise UserError(
                f"config.json: {PARTIAL} {share} of the kind proportional is not known to {raw.get('model_type')}, "
                "here as in transformers"
            )
        return rope_settings({**raw, PARTIAL: share}, theta, length)
    size = int(head_dim * share)
    if size % 2 or not 0 < size <= head_dim:
        raise UserError(
            f"config.json: {PARTIAL} turns {size} of a head's {head_dim} features: they pair, so an even number"
        )
    plain = {key: _unparted(value) if key in KEYS else value for key, value in raw.items()}
    settings = rope_settings(_unparted(plain), theta, length)
    return settings | {"rotary_dim": size if size < head_dim else 0}


def _unparted(settings: Any) -> Any:
    if not isinstance(settings, Mapping):
        return settings
    return {key: value for key, value in settings.items() if key != PARTIAL}


def write_turned(config: Config) -> dict[str, Any]:
    """The inverse of `read_turned`."""
    size = config.rotary_dim or config.head_dim
    part = size / config.head_dim
    if int(config.head_dim * part) != size:
        part = math.nextafter(part, 1.0)
    settings = {PARTIAL: part, **spelled(config.rope_theta, config.rope_scaling)}
    return {"rope_parameters": settings, PARTIAL: settings[PARTIAL]}


def turned_in(
    kind: str, kinds: Sequence[Any], rope: Mapping[str, Any]
) -> tuple[Rotary | None, ...]:
    """Each layer's rotary positions, where those of one kind alone are turned."""
    rotary = Rotary(rope["rope_theta"], rope["rope_scaling"])
    return tuple(rotary if one == kind else None for one in kinds)
