"""The configuration of a comparison: `configs/compare.py`, with some keys set otherwise."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from jaxft.configuration import recipes
from jaxft.configuration.keys import assign, flatten, unknown
from jaxft.configuration.load import pairs_of
from jaxft.configuration.values import from_text, from_value, literal, tupled
from jaxft.errors import UserError, shown

RECIPE = "configs/compare.py"
UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
SIZES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
AT_LEAST = {
    "batch_size": 1,
    "eval_batch_size": 1,
    "max_new_tokens": 1,
    "seeds": 2,
    "seed": 0,
    "steps": 0,
    "worth": 0,
    "price_per_hour": 0,
    "search.rates": 1,
    "search.widen": 0,
    "data.tuning": 0,
    "data.max_length": 0,
}


def load_comparison(source: str, overrides: Sequence[str] | Mapping[str, Any] = ()) -> ConfigDict:
    """The configuration of a comparison, checked and locked.

    Args:
        source: a recipe, whose `get_config()` returns it, or RUN/config.json or RUN/repeat.json of a comparison.
        overrides: as of `load_config`.

    Raises:
        UserError: no such file or key (the nearest is named), or a value that the key does not take.
    """
    path, argument = recipes.split_source(source)
    file = recipes.find(path)
    if argument is not None:
        raise UserError(f"--config {source}: a comparison takes no argument, not {argument!r}")
    schema = recipes.run(recipes.find(RECIPE), None)
    defaults = flatten(schema)
    given = flatten(recipes.run(file, None)) if path.endswith(".py") else _read(str(file))
    for key, value in given.items():
        if key not in defaults:
            raise UserError(f"{file}: {unknown(key, defaults)}")
        assign(schema, key, from_value(key, value, defaults[key]))
    for key, value, is_text in pairs_of(overrides):
        _override(schema, defaults, key, value, is_text)
    check_comparison(schema)
    return schema.lock()


def seconds_of(text: str) -> float | None:
    """The seconds of a budget; None for none.

    >>> seconds_of("30m"), seconds_of("1.5h"), seconds_of("0")
    (1800.0, 5400.0, None)
    """
    number, unit = _measured("budget", text, UNITS, "a time, such as 90s, 30m or 2h")
    return number * UNITS[unit] or None


def bytes_of(key: str, text: str) -> int | None:
    """The bytes of a limit; None for none.

    >>> bytes_of("memory", "1.5G"), bytes_of("kept", "")
    (1500000000, None)
    """
    if not text:
        return None
    number, unit = _measured(key, text.removesuffix("B"), SIZES, "a size, such as 100k, 20M or 8G")
    return int(number * SIZES[unit])


def check_comparison(config: ConfigDict) -> None:
    """Raises UserError for a value out of range."""
    flat = flatten(config)
    for key, low in AT_LEAST.items():
        if flat[key] < low:
            raise UserError(
                f"config.{key} takes a number of at least {low}, not {shown(flat[key])}"
            )
    if flat["search.factor"] <= 1:
        raise UserError(
            f"config.search.factor takes a number above 1, not {shown(flat['search.factor'])}"
        )
    if not flat["steps"] and flat["epochs"] <= 0:
        raise UserError("config.steps and config.epochs are both 0: nothing would be tuned")
    parts = flat["search.parts"]
    if not parts or list(parts) != sorted(parts) or not 0 < parts[0] <= parts[-1] <= 1:
        raise UserError(
            f"config.search.parts takes parts of a run from 0 to 1 that grow, such as 0.25,0.5, not {shown(parts)}"
        )
    for key in ("search.examples", "search.passages"):
        if not flat[key] or any(not isinstance(one, int) or one < 1 for one in flat[key]):
            raise UserError(
                f"config.{key} takes whole numbers from 1, such as 2,4, not {shown(flat[key])}"
            )
    if flat["data.chat"] not in ("auto", "true", "false"):
        raise UserError(
            f"config.data.chat takes auto | true | false, not {shown(flat['data.chat'])}"
        )
    seconds_of(flat["budget"])
    for key in ("memory", "kept"):
        bytes_of(key, flat[key])


def _measured(key: str, text: str, units: Mapping[str, float], takes: str) -> tuple[float, str]:
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]?)", text.strip())
    if not found or found[2].lower() not in units:
        raise UserError(f"config.{key} takes {takes}, not {shown(text)}")
    return float(found[1]), found[2].lower()


def _read(file: str) -> dict[str, Any]:
    try:
        with open(file, encoding="utf-8") as stream:
            written = json.load(stream)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON that can be read: {error}") from None
    if not isinstance(written, dict):
        raise UserError(f"{file}: not a configuration")
    flat: dict[str, Any] = {}
    for name, value in written.items():
        if name in ("data", "search") and isinstance(value, dict):
            flat |= {f"{name}.{key}": tupled(part) for key, part in value.items()}
        else:
            flat[name] = tupled(value)
    return flat


def _override(
    config: ConfigDict, defaults: Mapping[str, Any], key: str, value: Any, is_text: bool
) -> None:
    holder = next((name for name in defaults if key.startswith(f"{name}.")), "")
    if key in defaults:
        default = defaults[key]
        is_text = is_text or (isinstance(value, str) and not isinstance(default, str))
        assign(config, key, (from_text if is_text else from_value)(key, value, default))
    elif isinstance(defaults.get(holder), dict):  # an entry of settings or fields
        entry = _entry(value) if is_text else tupled(value)
        assign(config, holder, {**flatten(config)[holder], key.removeprefix(f"{holder}."): entry})
    else:
        raise UserError(unknown(key, defaults, value))


def _entry(text: str) -> Any:
    try:
        return literal(text)
    except ValueError:
        return text
