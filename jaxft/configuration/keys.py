"""The keys of a configuration: their names, which there are, and setting one of them."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from jaxft.configuration import recipes
from jaxft.configuration.elsewhere import told
from jaxft.configuration.values import from_text, from_value, literal, tupled, whole_inside
from jaxft.errors import UserError, named
from jaxft.sequences import common_prefix_length

# Keys of numbers whose 0 means "none" in the recipe, and of ints in a mapping or a list.
ZERO_IS_NONE = (
    "steps",
    "data.max_length",
    "checkpoint.every",
    "eval_every",
    "samples.count",
    "optimizer.warmup_steps",
    "optimizer.decay_steps",
    "optimizer.clip_norm",
)
WHOLE_INSIDE = ("method.rank_pattern", "method.layers_to_transform")
LONGEST = 200  # letters of a key that is compared with others


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Each key's value by the key's full name.

    >>> flatten(ConfigDict({"seed": 0, "method": {"rank": 8}}))
    {'method.rank': 8, 'seed': 0}
    """
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= {f"{name}.{key}": _plain(part) for key, part in value.items()}
        else:
            flat[name] = _plain(value)
    return flat


def schema_of(flat: Mapping[str, Any]) -> ConfigDict:
    """The recipe that holds the keys and defaults for an objective and a method.

    Of an objective that there is not it is the one whose keys are most alike.
    """
    from jaxft.objectives import OBJECTIVES  # models and data come with it, which takes a second

    row = OBJECTIVES.get(str(flat.get("objective.name")))
    files = [row.recipe] if row else list(dict.fromkeys(row.recipe for row in OBJECTIVES.values()))
    found = [recipes.run(recipes.find(file), str(flat["method.name"])) for file in files]
    return min(found, key=lambda schema: len(flatten(schema).keys() ^ flat.keys()))


def conform(config: ConfigDict, where: str, older: bool = False) -> ConfigDict:
    """A locked copy that has exactly the keys of the schema for its objective and method, each of its type.

    Raises UserError, naming `where` the configuration is from, for a missing key (with `older` it gets its default), an
    unknown key and a value of another type.
    """
    given = flatten(config)
    if "method.name" not in given:
        raise UserError(f"{where}: config.method.name is missing")
    schema = schema_of(given)
    defaults = flatten(schema)
    for key in given:
        if key not in defaults:
            raise UserError(f"{where}: {unknown(key, defaults)}")
    missing = [f"config.{key}" for key in defaults if key not in given]
    if missing and not older:
        raise UserError(f"{where}: {', '.join(missing)}: missing")
    with schema.unlocked(), schema.ignore_type():  # walks over every value: once, not for each key
        for key, default in defaults.items():
            _put(schema, key, from_value(key, given.get(key, default), default))
    return schema.lock()


def override(config: ConfigDict, key: str, value: Any, is_text: bool) -> None:
    """Sets a key, one entry of a dict, or (given a mapping) several keys of a section.

    `is_text` says that the value is a command line's; text for a key of another type is too.

    Raises:
        UserError: the key is unknown (the nearest is named) or a section, or the value does not fit it.
    """
    flat = flatten(config)
    parts = key.split(".", 2)
    holder = ".".join(parts[:2])
    if key in flat and _is_none(value) and (empty := _empty(config, key)) is not None:
        assign(config, key, empty)
    elif key in flat:
        default = flat[key]
        is_text = is_text or (isinstance(value, str) and not isinstance(default, str))
        assign(config, key, (from_text if is_text else from_value)(key, value, default))
    elif len(parts) == 3 and parts[2] and isinstance(flat.get(holder), dict):
        entry = _entry(value) if is_text else tupled(value)
        assign(config, holder, {**flat[holder], parts[2]: entry})
    elif key in config and isinstance(section := _entry(value) if is_text else value, Mapping):
        for name, part in section.items():
            override(config, f"{key}.{name}", part, False)
    elif key in config:
        keys = ", ".join(name for name in flat if name.startswith(f"{key}."))
        raise UserError(f"config.{key} is a section; set one of its keys: {keys}")
    else:
        raise UserError(unknown(key, flat, value))


def assign(config: ConfigDict, key: str, value: Any) -> None:
    """Writes the value at the key, in a locked configuration as well."""
    section = key.rpartition(".")[0]
    holder = config[section] if section else config
    with holder.unlocked(), holder.ignore_type():
        _put(config, key, value)


def _put(config: ConfigDict, key: str, value: Any) -> None:
    section, _, name = key.rpartition(".")
    holder = config[section] if section else config
    holder[name] = whole_inside(value) if key in WHOLE_INSIDE else value


def unknown(key: str, keys: Iterable[str], value: Any = "") -> str:
    """The message for a key that there is not.

    A name that PEFT or TRL has is told by our key for the same; of any other name the nearest keys are told.
    """
    if len(key) > LONGEST:
        return f"no key config.{named(key)}"
    if known := told(key, value if isinstance(value, str) else ""):
        return f"no key config.{named(key)}; write {known}"

    def far(name: str) -> tuple[int, int]:
        whole = distance(key, name)
        return min(whole, 1 + distance(key.split(".")[-1], name.split(".")[-1])), whole

    ranked = sorted((far(name), name) for name in keys)
    limit = max((2, 99), ranked[0][0])
    close = [name for rank, name in ranked if rank <= limit][:3]
    return f"no key config.{named(key)} (nearest: {', '.join(f'config.{name}' for name in close)})"


def _is_none(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.strip().lower() in ("none", "null"))


def _empty(config: ConfigDict, key: str) -> Any:
    """What "none" means for a key that may be empty; None for one that may not."""
    default = flatten(schema_of(flatten(config)))[key]
    if key in ZERO_IS_NONE:
        return type(default)(0)
    return default if default in ("", (), {}) else None


def distance(first: str, second: str) -> int:
    """Letters to change, insert, drop or swap with a neighbour to make one word the other.

    >>> distance("rnak", "rank"), distance("rank", "ranks"), distance("rank", "")
    (1, 1, 4)
    """
    same = common_prefix_length(first, second)
    first, second = first[same:], second[same:]  # a common beginning costs nothing
    before, row = list[int](), list(range(len(second) + 1))
    for i, letter in enumerate(first):
        before, above, row = row, before, [i + 1]
        for j, other in enumerate(second):
            row.append(min(before[j] + (letter != other), before[j + 1] + 1, row[j] + 1))
            if i and j and letter == second[j - 1] and first[i - 1] == other:
                row[-1] = min(row[-1], above[j - 1] + 1)
    return row[-1]


def _entry(text: str) -> Any:
    try:
        return literal(text)
    except ValueError:
        return text


def _plain(value: Any) -> Any:
    return tupled(value.to_dict()) if isinstance(value, ConfigDict) else value


def said_of_flag(flag: str, value: str) -> str:
    """What to write for a flag that is a key without `--config.`, or another library's name; "" for neither."""
    if known := told(flag, value):
        return known
    name = {"data": "data.train"}.get(flag, flag.lower().replace("-", "_"))
    keys = list(flatten(schema_of({"method.name": "lora"})))
    meant = [key for key in keys if key == name] or [
        key for key in keys if key.split(".")[-1] == name
    ]
    return f"--config.{meant[0]}={shlex.quote(value) if value else 'VALUE'}" if meant else ""
