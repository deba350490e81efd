"""A configuration from a recipe or from a run, and back into a run's config.json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from jaxft.configuration import recipes
from jaxft.configuration.keys import conform, flatten, override
from jaxft.configuration.rules import check
from jaxft.configuration.values import from_text
from jaxft.errors import UserError, shown

ABSENT = "(absent)"


def is_comparison(made: ConfigDict | str) -> bool:
    """Whether a configuration, or the text of a written one, is of a comparison and not of a run."""
    if isinstance(made, ConfigDict):
        return "levers" in made
    try:
        written = json.loads(made)
    except (ValueError, RecursionError):
        return False
    return isinstance(written, dict) and "levers" in written


def load_config(source: str, overrides: Sequence[str] | Mapping[str, Any] = ()) -> ConfigDict:
    """The configuration of a recipe or of a run, with some keys set otherwise, checked and locked.

    Args:
      source: `PATH.py` or `PATH.py:ARGUMENT`, a file whose `get_config(ARGUMENT)` returns the
        configuration; or the config.json of a run. A relative path is sought from the working
        directory, then among the recipes that come with jaxft.
      overrides: command line arguments, `--config.KEY=VALUE` or `--config.KEY VALUE`, or a mapping
        of keys to values (or to texts, read like a command line's). Later ones win. Setting
        `method.name` asks the recipe for the method of that name.

    Raises:
      UserError: no such file, recipe, argument or key (the nearest is named), or a value that the
        key does not take.
    """
    pairs = list(pairs_of(overrides))
    chosen = [value for key, value, _ in pairs if key == "method.name"]
    method = from_text("method.name", str(chosen[-1]), "") if chosen else None
    path, argument = recipes.split_source(source)
    file = recipes.find(path)
    made = recipes.run(file, argument, method) if path.endswith(".py") else None
    if is_comparison(made or recipes.read_text(file)):
        from jaxft.configuration.comparing import load_comparison

        return load_comparison(source, overrides)
    if made is not None:
        config = conform(made, str(file))
    elif argument is not None:
        raise UserError(f"--config {source}: a written configuration takes no argument")
    else:
        config = from_json(recipes.read_text(file), str(file))
        _same_method(config, method, path)
    for key, value, is_text in pairs:
        override(config, key, value, is_text)
    check(flatten(config))
    return config


def to_json(config: ConfigDict) -> str:
    """The whole configuration as JSON, to run again from by `--config RUN/config.json`."""
    return json.dumps(config.to_dict(), indent=2, ensure_ascii=False) + "\n"


def from_json(text: str, where: str = "config.json", older: bool = False) -> ConfigDict:
    """The configuration that `to_json` wrote: lists become tuples again, and every key is there.

    With `older` an earlier jaxft may have written it: keys that it did not have yet get their defaults.

    Raises UserError, beginning with `where`, for text that is no configuration.
    """
    try:
        written = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}:{error.lineno}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, deep nesting
        raise UserError(f"{where}: not JSON that can be read: {error}") from None
    if not isinstance(written, dict):
        raise UserError(f"{where}: not a configuration")
    sections = [part for part in written.values() if isinstance(part, dict)]
    if dotted := [name for part in (written, *sections) for name in part if "." in name]:
        raise UserError(f"{where}: no key {shown(dotted[0])}")
    return conform(ConfigDict(_sections(written)), where, older)


def difference(old: ConfigDict, new: ConfigDict) -> list[str]:
    """A line `key: old -> new` for each key whose values differ.

    >>> difference(ConfigDict({"seed": 0, "steps": 9}), ConfigDict({"seed": 1, "steps": 9}))
    ['seed: 0 -> 1']
    """
    before, after = flatten(old), flatten(new)
    lines = []
    for key in sorted(before | after):
        left = repr(before[key]) if key in before else ABSENT
        right = repr(after[key]) if key in after else ABSENT
        if left != right:
            lines.append(f"{key}: {left} -> {right}")
    return lines


def pairs_of(overrides: Sequence[str] | Mapping[str, Any]) -> Iterator[tuple[str, Any, bool]]:
    """Each override as (full key, value, whether the value is text of a command line).

    Raises:
        UserError: a word is no `--config.KEY=VALUE`.
    """
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            yield key.removeprefix("config."), value, False
        return
    rest = iter(overrides)
    for word in rest:
        if not word.startswith("--config."):
            raise UserError(f"{shown(word)} is no override: those are --config.KEY=VALUE")
        key, equals, value = word.removeprefix("--config.").partition("=")
        if not equals:
            value = next(rest, "--")
            if value.startswith("--"):
                raise UserError(f"--config.{key} needs a value: --config.{key}=VALUE")
        yield key, value, True


def _sections(written: dict[str, Any]) -> dict[str, Any]:
    return {
        key: ConfigDict(value, convert_dict=False) if isinstance(value, dict) else value
        for key, value in written.items()
    }


def _same_method(config: ConfigDict, method: str | None, path: str) -> None:
    if method is not None and method != config.method.name:
        raise UserError(
            f"config.method.name: {path} is of a run with {config.method.name!r};"
            f" for {method!r} begin with a recipe, as configs/sft.py:{method}"
        )
