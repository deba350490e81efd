"""What judges an answer inside a process of its own: somebody's Python, a pattern, a schema, and mathematics.

Each function takes what its grader says and what it is asked of, and returns a number, or raises.
"""

from __future__ import annotations

import ast
import functools
import importlib
import json
import math
import re
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any


class NotJudged(Exception):
    """There is no number; the message says why."""


def python(source: str, item: Any, sample: Any) -> float:
    """What `grade(sample, item)` of the source returns.

    >>> python("def grade(sample, item): return sample['output_text'] == item['a']", {"a": "x"}, {"output_text": "x"})
    1.0
    """
    module = sys.modules["grader"] = types.ModuleType("grader")  # where dataclasses look for it
    exec(compile(source, "grader", "exec"), vars(module))
    grade = getattr(module, "grade", None)
    if not callable(grade):
        raise NotJudged("the source defines no grade(sample, item)")
    return number(grade(sample, item))


def compiles(source: str) -> float:
    """1.0 where the source is Python that defines `grade`; an error that says where it is not."""
    tree = compile(source, "grader", "exec", ast.PyCF_ONLY_AST)
    names = {getattr(node, "name", getattr(node, "id", None)) for node in ast.walk(tree)}
    if "grade" not in names:
        raise NotJudged("it defines no grade(sample, item)")
    return 1.0


def number(value: Any) -> float:
    """A reward as a float; `NotJudged` for what is no finite number.

    >>> number(True), number(2)
    (1.0, 2.0)
    """
    if hasattr(value, "item") and not hasattr(value, "items"):  # NumPy's
        value = value.item()
    if value is None:
        raise NotJudged("it returned None")
    if not isinstance(value, (bool, int, float)):
        raise NotJudged(f"it returned {type(value).__name__} {str(value)[:40]!r}, not a number")
    if not math.isfinite(value):
        raise NotJudged(f"it returned {value}")
    return float(value)


def regex(pattern: str, text: str, reference: str | None = None) -> float:
    """1.0 where the pattern is found; with a reference, where its first group (or all it matches) is the reference.

    >>> regex("#### *([0-9]+)", "so #### 12", "12"), regex("^yes", "no")
    (1.0, 0.0)
    """
    found = re.search(pattern, text)
    if found is None or reference is None:
        return float(found is not None)
    return float(found[1 if found.re.groups else 0] == reference)


def json_schema(schema: Any, text: str) -> float:
    """1.0 where the text is JSON that the schema allows.

    >>> json_schema({"type": "object", "required": ["a"]}, '{"a": 1}'), json_schema({}, "{")
    (1.0, 0.0)
    """
    try:
        value = parsed(text)
    except ValueError:
        return 0.0
    unresolvable = importlib.import_module("referencing.exceptions").Unresolvable
    try:
        return float(_validator(json.dumps(schema)).is_valid(value))
    except unresolvable as error:
        raise NotJudged(
            f"it refers to {error.ref!r}, which it does not hold: nothing is fetched"
        ) from None


def parsed(text: str) -> Any:
    """The value that a JSON text holds.

    Raises:
        ValueError: the text is not JSON (NaN and Infinity are not), or is nested too deeply to be read.
    """

    def refused(name: str) -> None:
        raise ValueError(f"JSON has no {name}")

    try:
        return json.loads(text, parse_constant=refused)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


@functools.lru_cache(maxsize=8)
def _validator(schema: str) -> Any:
    jsonschema = importlib.import_module("jsonschema")
    value = json.loads(schema)
    kind = jsonschema.validators.validator_for(value, jsonschema.Draft202012Validator)
    try:
        kind.check_schema(value)
    except jsonschema.SchemaError as error:
        where = ".".join(map(str, error.absolute_path)) or "it"
        raise NotJudged(f"{where}: {error.message}") from None
    if value and not any(key in kind.VALIDATORS or key.startswith("$") for key in value):
        raise NotJudged(f"none of its keys is JSON Schema's, so it allows everything: {', '.join(value)}")  # fmt: skip
    return kind(value)


def maths(reference: str, text: str) -> float:
    """1.0 where math-verify reads the same value out of the text as out of the reference.

    A reference that stands without dollars is read as if it had them. What cannot be read of a text is 0.
    """
    library = importlib.import_module("math_verify")
    wanted = library.parse(reference) or library.parse(f"${reference}$")
    if not wanted:
        raise NotJudged(f"math-verify reads nothing out of the reference {reference[:60]!r}")
    said = library.parse(text)
    return float(bool(said) and library.verify(wanted, said))


ACTIONS: dict[str, Callable[..., float]] = {
    "python": python,
    "compiles": compiles,
    "regex": regex,
    "json_schema": json_schema,
    "math": maths,
}
# Packages that are imported once, before a process is made for each answer.
NEEDED = {"math": "math_verify", "json_schema": "jsonschema"}
KNOWN = ("numpy", "scipy", "sympy", "pandas", "rapidfuzz", "jsonschema", "math_verify")


def prepare(action: str, request: Mapping[str, Any]) -> None:
    """Imports what all answers of a request need: the action's package, and known ones that a source names."""
    names = [NEEDED[action]] if action in NEEDED else []
    source = str(request.get("source", ""))
    names += [name for name in KNOWN if re.search(rf"\b(import|from)\s+{name}\b", source)]
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            if name in NEEDED.values():
                raise NotJudged(f"the package {name} is not installed") from None
    if action == "math":
        _warm()


@functools.lru_cache(maxsize=1)
def _warm() -> None:
    """What math-verify loads when it is first used is loaded once, and not for each answer."""
    maths("$\\frac{1}{2} + x^2$", "so $0.5 + x^2$ or \\boxed{3}")
