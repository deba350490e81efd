"""Graders from a JSON file, or from a list in a configuration."""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxft.errors import UserError, nearest, row_of, shown
from jaxft.objectives.graders.asking import MOST_REWARD, is_number
from jaxft.objectives.graders.kinds import Field, Grader, Kind, kind_of
from jaxft.objectives.graders.templates import fields_of, parts_of
from jaxft.runtime.untrusted import read_text

COMMON = {"type": Field((str,)), "name": Field((str,), ""), "weight": Field((int, float), 1.0)}
WORDS = {str: "a text", dict: "an object", list: "a list", int: "a number", float: "a number"}


def read_graders(source: Any, where: str = "config.graders") -> tuple[Grader, ...]:
    """Reads graders and looks at all that can be looked at before an answer is there.

    Args:
        source: a list of graders (each the object of OpenAI's JSON), one of them, or a file that holds either, or an
            object with them at `graders`.
        where: what a mistake is said to be in, where the source is no file.

    Returns:
        The graders; one without a name has its type for one.

    Raises:
        UserError: what is no JSON, an unknown type, field or placeholder, a field that is missing or of another kind,
            two graders of a name, a package that is not installed, code that does not compile. One line with the file,
            the grader, and the nearest right name.

    >>> read_graders([{"type": "regex", "pattern": "^yes"}])[0].settings["input"]
    '{{ sample.output_text }}'
    """
    if isinstance(source, (str, Path)):
        where = str(source)
        source = _parsed(Path(source))
    source = _plain(source)
    if isinstance(source, Mapping) and "type" not in source and "graders" in source:
        source = source["graders"]
    given = [source] if isinstance(source, Mapping) else source
    if not isinstance(given, (list, tuple)) or not given:
        raise UserError(f"{where}: a list of graders is expected, of at least one")
    try:
        return _all(given, where)
    except RecursionError:
        raise UserError(f"{where}: the graders are nested too deeply") from None


def check_items(graders: Sequence[Grader], items: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises UserError where a grader asks for a field that an item has not.

    Args:
        graders: as read.
        items: {file:line: item}.
    """
    for grader in graders:
        for field in dict.fromkeys(_fields(grader)):
            for origin, item in items.items():
                if field not in item:
                    raise UserError(
                        f"{origin}: the row has no {shown(field)}, which grader {shown(grader.name)} asks for"
                        f"{nearest(field, item)}"
                    )


def _fields(grader: Grader) -> list[str]:
    inner = [part for part in grader.settings.get("graders", ()) if isinstance(part, Grader)]
    own = [grader.settings[name] for name in kind_of(grader.kind).templates]
    return [*fields_of(own), *(field for part in inner for field in _fields(part))]


def _parsed(file: Path) -> Any:
    try:
        return json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON: {error}") from None


def _plain(value: Any) -> Any:
    """A configuration's own dicts and tuples as Python's."""
    return value.to_dict() if hasattr(value, "to_dict") else value


def _all(given: Sequence[Any], where: str) -> tuple[Grader, ...]:
    graders: list[Grader] = []
    for index, values in enumerate(given):
        grader = _read(_plain(values), f"{where}: grader {index + 1}")
        if any(grader.name == other.name for other in graders):
            raise UserError(
                f"{where}: two graders are called {shown(grader.name)}: give them other names"
            )
        graders.append(grader)
    return tuple(graders)


def _read(values: Any, where: str) -> Grader:
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: an object is expected, not {shown(values)}")
    if isinstance(values.get("name"), str) and values["name"]:
        where = f"{where} ({shown(values['name'])})"
    try:
        if "type" not in values:
            raise UserError(
                f"type is missing: keys found are {', '.join(map(shown, values)) or 'none'}"
            )
        kind = kind_of(values["type"])
        settings = _settings(values, {**COMMON, **kind.fields})
        if not settings["name"].isprintable():
            raise UserError(f"name {shown(settings['name'])}: it stands in one line of the metrics")
        if not is_number(settings["weight"]):
            raise UserError(f"weight: a number that is no larger than {MOST_REWARD:g} is expected")
        settings = _checked(kind, settings, where)
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(where) else f"{where}: {text}") from None
    own = {name: settings[name] for name in kind.fields}
    name = settings["name"] or settings["type"]
    return Grader(settings["type"], name, own, float(settings["weight"]))


def _checked(kind: Kind, settings: dict[str, Any], where: str) -> dict[str, Any]:
    """With the parts of a `multi` read, and everything looked at."""
    if "graders" in settings:
        given = settings["graders"]
        if isinstance(given, Mapping) and "type" not in given:
            given = [_named(name, _plain(part)) for name, part in given.items()]
        settings["graders"] = _all([given] if isinstance(given, Mapping) else given, where)
    for name in kind.templates:
        if isinstance(settings[name], str):
            parts_of(settings[name])
    kind.check(settings)
    return settings


def _named(name: str, part: Any) -> Any:
    """A part by the name under which it stands."""
    if not re.fullmatch(r"[^\W\d]\w*", name) or keyword.iskeyword(name):
        raise UserError(
            f"graders: {shown(name)} cannot stand in a formula: letters, digits and _ are expected, and no keyword"
        )
    return {**part, "name": name} if isinstance(part, Mapping) else part


def _settings(values: Mapping[str, Any], fields: Mapping[str, Field]) -> dict[str, Any]:
    for name in values:
        if name not in fields:
            close = nearest(str(name), fields) or f": there are {', '.join(fields)}"
            raise UserError(f"unknown field {shown(name)}{close}")
    settings = {}
    for name, field in fields.items():
        if name not in values and field.default == ():
            raise UserError(f"{name} is missing")
        value = _plain(values.get(name, field.default))
        value = list(value) if isinstance(value, tuple) else value
        absent = name not in values or (value is None and field.default is None)
        if not absent and (not isinstance(value, field.types) or isinstance(value, bool)):
            raise UserError(f"{name}: {WORDS[field.types[0]]} is expected, not {shown(value)}")
        if field.choices and not absent:
            row_of(dict.fromkeys(field.choices), value, name)
        settings[name] = value
    return settings
