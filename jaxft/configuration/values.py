"""A key's value, given as text or as a Python value, brought to the type of its default."""

from __future__ import annotations

import ast
import contextlib
import json
import math
import numbers
import os
import warnings
from collections.abc import Mapping
from typing import Any

from jaxft.errors import UserError, shown

TAKES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: """a list of values, such as a,b or '("a", "b")'""",
    dict: """a mapping, such as '{"a": 1}'""",
}
# Keys of text that take a mapping as well: several held-out sets by name.
ALSO = {"data.eval": dict[str, Any]()}
SOURCES = ("data.train", "data.eval")  # one text, in which several stand with commas between
GRADERS = "graders"  # a text: a file, or the JSON of a list itself
# A list of mappings; a mapping alone is the grid that its entry of this key is.
GRID, GRID_KEY = "population", "grid"
TRUTH = {
    **dict.fromkeys(("true", "t", "yes", "y", "on", "1"), True),
    **dict.fromkeys(("false", "f", "no", "n", "off", "0"), False),
}


def from_text(key: str, text: str, default: Any) -> Any:
    """The value that `text` (of a command line) stands for where the default is `default`.

    >>> from_text("steps", "1e3", 0), from_text("optimizer.learning_rate", "1", 2e-4)
    (1000, 1.0)
    >>> from_text("method.targets", "q_proj,v_proj", ())
    ('q_proj', 'v_proj')

    Raises:
        UserError: the text is no value of the default's type.
    """
    if key in ALSO:
        default = ALSO[key] if text.strip().startswith("{") else ""
    if key == GRID and text.strip().startswith("{"):
        with contextlib.suppress(ValueError):
            return ({GRID_KEY: literal(text.strip())},)
    if key in SOURCES and text.strip()[:1] in ("(", "["):
        with contextlib.suppress(ValueError):
            return from_value(key, literal(text.strip()), default)
    readers = {bool: _bool, int: _int, float: _float, str: _unquoted, tuple: _tuple, dict: _dict}
    try:
        return _typed(readers[type(default)](text.strip()), default)
    except (ValueError, OverflowError):
        raise _wrong(key, text, default) from None


def from_value(key: str, value: Any, default: Any) -> Any:
    """The Python value `value`, of the default's type if nothing is lost by it.

    >>> from_value("steps", 1000.0, 0), from_value("method.targets", ["q_proj"], ())
    (1000, ('q_proj',))

    Raises:
        UserError: the value is not of the default's type.
    """
    if key in ALSO:
        default = ALSO[key] if isinstance(value, Mapping) else ""
    if key == GRADERS and isinstance(value, list | tuple | Mapping):
        value = json.dumps(value, ensure_ascii=False)
    if key == GRID and isinstance(value, Mapping):
        value = ({GRID_KEY: value},)
    if key in SOURCES and isinstance(value, list | tuple):
        value = ",".join(str(part).replace(",", "\\,") for part in value)
    try:
        return _typed(value, default)
    except (ValueError, OverflowError):
        raise _wrong(key, value, default) from None


def literal(text: str) -> Any:
    """What `text` means in JSON, else in Python; ValueError if it means nothing in either."""
    try:
        return tupled(json.loads(text))
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings():  # "\." in a regular expression is meant as it stands
            warnings.simplefilter("ignore")
            return tupled(ast.literal_eval(text))
    except (SyntaxError, TypeError, ValueError, MemoryError, RecursionError):
        raise ValueError(text) from None


def tupled(value: Any) -> Any:
    """The value with tuples for its lists and plain dicts for its mappings, at every depth."""
    if isinstance(value, Mapping):
        return {key: tupled(part) for key, part in value.items()}
    return tuple(map(tupled, value)) if isinstance(value, (list, tuple)) else value


def whole_inside(value: Any) -> Any:
    """Integers for the whole numbers of a mapping or a tuple: `1e1` means 10 there too.

    >>> whole_inside({"q_proj": 1e1, "k_proj": 0.5}), whole_inside((2.0,))
    ({'q_proj': 10, 'k_proj': 0.5}, (2,))
    """
    if isinstance(value, dict):
        return {key: whole_inside(part) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(map(whole_inside, value))
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _wrong(key: str, value: Any, default: Any) -> UserError:
    takes = TAKES.get(type(default), type(default).__name__)
    return UserError(f"config.{key} takes {takes}, not {shown(value, 200)}")


def _typed(value: Any, default: Any) -> Any:
    """The value as one of the default's type; ValueError if it is not one."""
    kind = type(default)
    if isinstance(value, os.PathLike) and kind is str:
        value = os.fspath(value)
    elif isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value):
        if kind is float or (kind is int and float(value).is_integer()):
            value = kind(value)
    elif isinstance(value, list) or (isinstance(value, Mapping) and kind is dict):
        value = tupled(value)
    if type(value) is not kind or (kind is tuple and not _alike(value, default)):
        raise ValueError(value)
    if kind is float and not math.isfinite(value):
        raise ValueError(value)
    return value


def _alike(values: tuple[Any, ...], default: tuple[Any, ...]) -> bool:
    """Whether the values are of the default's types, or, where it is empty, of one type."""
    kinds = {type(value) for value in default} or {type(value) for value in values[:1]}
    kinds |= {int, float} if kinds & {int, float} else set()
    return all(type(value) in kinds for value in values)


def _bool(text: str) -> bool:
    if text.lower() not in TRUTH:
        raise ValueError(text)
    return TRUTH[text.lower()]


def _int(text: str) -> int:
    try:
        return int(text)  # exact at any size, where a float is not
    except ValueError:
        number = float(text)
        if not number.is_integer():
            raise
        return int(number)


def _float(text: str) -> float:
    return float(text)


def _unquoted(text: str) -> str:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


def _tuple(text: str) -> tuple[Any, ...]:
    try:
        value = literal(text)
    except ValueError:
        return _words(text)
    if isinstance(value, dict):
        raise ValueError(text)
    if value is None or isinstance(value, bool):
        return (text,)
    return value if isinstance(value, tuple) else (value,)


def _words(text: str) -> tuple[str, ...]:
    """Bare words between commas, as the shell leaves them: `a,b`, `(a, b)`, or nothing at all."""
    inner = text[1:-1] if text.startswith("(") and text.endswith(")") else text
    if not inner.strip():
        return ()
    words = tuple(word.strip() for word in inner.strip().removesuffix(",").split(","))
    if any(not word or set(word) & set("()'\"") for word in words):
        raise ValueError(text)
    return words


def _dict(text: str) -> dict[Any, Any]:
    value = literal(text) if text else {}
    if not isinstance(value, dict):
        raise ValueError(text)
    return value
