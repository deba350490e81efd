"""The rotary settings of a config.json, which may stand under several keys: read as transformers 5 reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.errors import UserError, shown
from jaxft.models.config import Rotary

KEYS = ("rope_parameters", "rope_scaling")  # of transformers 5, and of those before
ORIGINAL = "original_max_position_embeddings"
PARTIAL = "partial_rotary_factor"
STRETCHED = ("llama3", "yarn", "longrope")  # kinds that ask for the original length


def rope_settings(raw: Mapping[str, Any], default_theta: float, max_length: int) -> dict[str, Any]:
    """The `rope_theta` and `rope_scaling` of a `Config`.

    The theta and the partial factor inside the settings go before those at the top level, the original length at the
    top level before the one inside: so it is in transformers. (A null counts as absent, where that fails.) A partial
    factor has no effect on the plain kind, as there; any other kind with one is refused later.

    Args:
        raw: config.json.
        default_theta: of the family.
        max_length: its `max_position_embeddings`, or the family's own.

    Raises:
        UserError: both keys are filled and say different things, or there are settings for each kind of layer.
    """
    filled = [key for key in KEYS if raw.get(key)]
    found = [_settings(raw, key, default_theta, max_length) for key in filled]
    if len(found) == 2 and found[0] != found[1]:
        both = " and ".join(f"{key} {shown(raw[key], 300)}" for key in filled)
        kept = json.dumps({"rope_theta": found[0]["rope_theta"], **_spelled(raw["rope_scaling"])})
        raise UserError(
            f"config.json: {both} say different things: keep one of them; if rope_scaling is meant, write "
            f'"rope_parameters": {kept[:400]} and take rope_scaling out'
        )
    return found[0] if found else _plain(raw.get("rope_theta") or default_theta)


def _spelled(scaling: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with their kind as rope_type, which older files call type."""
    return {"rope_type" if key == "type" else key: value for key, value in scaling.items()}


def _plain(theta: Any) -> dict[str, Any]:
    return {"rope_theta": float(theta), "rope_scaling": ()}


def _settings(
    raw: Mapping[str, Any], key: str, default_theta: float, max_length: int
) -> dict[str, Any]:
    """What one of the two keys says, with what the top level adds to it or overrules."""
    items = {key: value for key, value in dict(raw[key]).items() if value is not None}
    inner = [key for key, value in items.items() if isinstance(value, dict)]
    if inner:
        raise UserError(
            f"config.json: {key} has settings of its own for {', '.join(inner)}: "
            f"{raw.get('model_type')} turns all layers alike"
        )
    theta = items.pop("rope_theta", None) or raw.get("rope_theta") or default_theta
    kind = items.pop("rope_type", None) or items.get("type") or "default"
    items.pop("type", None)
    if kind == "default":
        return _plain(theta)
    if kind in STRETCHED:
        inner = items.get(ORIGINAL, max_length)
        items[ORIGINAL] = inner if raw.get(ORIGINAL) is None else raw[ORIGINAL]
    if raw.get(PARTIAL) is not None:
        items.setdefault(PARTIAL, raw[PARTIAL])
    if kind == "yarn" and "factor" in raw[key]:  # null: the ratio of the two lengths
        items.setdefault("factor", max_length / items[ORIGINAL])
    items = {key: tuple(x) if isinstance(x, list) else x for key, x in items.items()}
    scaling = tuple(sorted((items | {"rope_type": kind}).items()))
    return {"rope_theta": float(theta), "rope_scaling": scaling}


def rope_by_kind(
    raw: Mapping[str, Any],
    kinds: Sequence[str],
    thetas: Mapping[str, float],
    stretched: str,
    max_length: int,
) -> dict[str, Any]:
    """The rotary fields of a `Config` whose kinds of layers turn differently (gemma3, olmo3).

    Args:
        raw: config.json: `rope_parameters` has settings for each kind of layer; in older files `rope_scaling` at the
            top level is meant for one kind alone.
        kinds: of each layer.
        thetas: {kind: its base, where `rope_parameters` has none}.
        stretched: the kind that `rope_scaling` means.
        max_length: the model's.
    """
    own = raw.get("rope_parameters") or {}
    rotaries = {}
    for kind, theta in thetas.items():
        items = dict(own.get(kind) or {})
        if kind == stretched:
            items |= raw.get("rope_scaling") or {}
        found = settings_of_kind(raw, {"rope_type": "default", **items}, theta, max_length)
        rotaries[kind] = Rotary(found["rope_theta"], found["rope_scaling"])
    return rotary_fields([rotaries[kind] for kind in kinds])


def settings_of_kind(
    raw: Mapping[str, Any], items: Mapping[str, Any], default_theta: float, max_length: int
) -> dict[str, Any]:
    """`rope_settings` for one kind of layer.

    `items` are the kind's own settings. As in transformers, a `truncate` among them has no effect, and where they have
    no `partial_rotary_factor`, that of the top level of `raw` counts.
    """
    own = {key: value for key, value in items.items() if key != "truncate"}
    plain = {"model_type": raw.get("model_type"), KEYS[0]: own, PARTIAL: raw.get(PARTIAL)}
    return rope_settings(plain, default_theta, max_length)


def rotary_fields(rotaries: Sequence[Rotary | None]) -> dict[str, Any]:
    """The fields of a `Config` for these layers: one rotary for all, where they are alike."""
    first = rotaries[0]
    if first is not None and all(one == first for one in rotaries):
        return {"rope_theta": first.theta, "rope_scaling": first.scaling}
    return {"rotaries": tuple(rotaries)}
