"""The two kinds of gemma 4's layers, and those that read another's keys and values: as parts of a `Config`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.errors import UserError, shown
from jaxft.models.config import Config
from jaxft.models.families.common import FULL, SLIDING, spelled
from jaxft.models.rope import PARTIAL, settings_of_kind

ROTARIES = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", PARTIAL: 0.25, "rope_theta": 1_000_000.0},
}
OWN = {"head_dim": "head_dim", "num_key_value_heads": "key_heads"}  # what full layers may have


def read(raw: Mapping[str, Any], kinds: Sequence[str], length: int) -> dict[str, Any]:
    """The rotary and the `parts` of a `Config` with layers of these kinds.

    Raises UserError where `per_layer_config` says what no part can hold, or no layer is there to read keys from.
    """
    rotaries = raw.get("rope_parameters") or ROTARIES
    turned = {
        kind: settings_of_kind(raw, one, raw.get("rope_theta") or 1e4, length)
        for kind, one in ((kind, rotaries.get(kind) or ROTARIES[kind]) for kind in ROTARIES)
    }
    same_keys = bool(raw.get("attention_k_eq_v", False))
    full = {**turned[FULL], **_heads_of_full(raw, kinds, same_keys)}
    full["keys_are_values"] = same_keys
    unshared = raw["num_hidden_layers"] - (raw.get("num_kv_shared_layers") or 0)
    wide = 2 if raw.get("use_double_wide_mlp", False) else 1
    parts: list[tuple[int, tuple[tuple[str, Any], ...]]] = []
    lenders: dict[str, int] = {}
    structure = [(kind, layer >= unshared) for layer, kind in enumerate(kinds)]
    for (kind, borrows), group in itertools.groupby(structure):
        changes = dict(full) if kind == FULL else {}
        if borrows:
            if kind not in lenders:
                raise UserError(
                    f"config.json: num_kv_shared_layers: no layer before is of the kind {shown(kind)}"
                )
            changes |= {"keys_from": lenders[kind], "intermediate": wide * raw["intermediate_size"]}
        else:
            lenders[kind] = len(parts)
        parts.append((len(list(group)), tuple(changes.items())))
    return {**turned[SLIDING], "parts": tuple(parts)}


def _heads_of_full(raw: Mapping[str, Any], kinds: Sequence[str], same_keys: bool) -> dict[str, Any]:
    """The head size and key heads of the layers that see everything."""
    if raw.get("per_layer_config") is None:
        own = {"head_dim": raw.get("global_head_dim", 512)}
        if same_keys and raw.get("num_global_key_value_heads") is not None:
            own["num_key_value_heads"] = raw["num_global_key_value_heads"]
    else:
        layers = {int(layer): dict(one) for layer, one in raw["per_layer_config"].items()}
        own = next(iter(layers.values()), {})
        wanted = [layer for layer, kind in enumerate(kinds) if kind == FULL]
        uniform = all(one == own for one in layers.values()) and not own.keys() - OWN.keys()
        if not uniform or (layers and sorted(layers) != wanted):
            raise UserError(
                "config.json: per_layer_config: jaxft's gemma4 knows head_dim and num_key_value_heads of its own of "
                "all layers of full_attention together"
            )
    return {OWN[key]: value for key, value in own.items()}


def write(config: Config, kinds: Sequence[str]) -> dict[str, Any]:
    """The inverse of `read`."""
    starts = itertools.accumulate((count for count, _ in config.parts), initial=0)
    parts = [
        (kinds[at], count, dict(ch)) for at, (count, ch) in zip(starts, config.parts, strict=False)
    ]
    full: dict[str, Any] = next((changes for kind, _, changes in parts if kind == FULL), {})
    heads = {key: full[field] for key, field in OWN.items() if field in full}
    where = [layer for layer, kind in enumerate(kinds) if kind == FULL]
    shared = [(count, changes) for _, count, changes in parts if "keys_from" in changes]
    rotary = (full.get("rope_theta", config.rope_theta), full.get("rope_scaling", ()))
    return {
        "rope_parameters": {
            SLIDING: spelled(config.rope_theta, config.rope_scaling),
            FULL: spelled(*rotary),
        },
        "attention_k_eq_v": full.get("keys_are_values", False),
        # By both spellings: transformers 5.23 writes the first, folders have the others.
        "per_layer_config": {str(layer): heads for layer in where},
        "global_head_dim": full.get("head_dim", config.head_dim),
        "num_global_key_value_heads": full.get("key_heads"),
        "num_kv_shared_layers": sum(count for count, _ in shared),
        "use_double_wide_mlp": any(
            changes["intermediate"] > config.intermediate for _, changes in shared
        ),
    }
