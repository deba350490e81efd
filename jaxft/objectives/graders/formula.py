"""The formula of a `multi` grader: `0.7 * answer + 0.3 * min(format, 1)`."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxft.errors import UserError, nearest, shown

MOST = 10_000  # characters
OPERATORS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: math.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
FUNCTIONS: dict[str, Callable[..., float]] = {
    "min": lambda *values: min(values),
    "max": lambda *values: max(values),
    "abs": abs,
    "floor": math.floor,
    "ceil": math.ceil,
    "exp": math.exp,
    "sqrt": math.sqrt,
    "log": math.log,
}
SEVERAL = ("min", "max")  # take any number of values; the others take one


def parsed(formula: str, names: Iterable[str]) -> ast.expr:
    """The formula as a tree of numbers, names, + - * / ^ and a few functions.

    Raises:
        UserError: it is none, or names what is not among `names`.
    """
    if len(formula) > MOST:
        raise UserError(f"a formula of {len(formula):,} characters is refused")
    try:
        tree = ast.parse(" ".join(formula.replace("^", "**").split()), mode="eval").body
        _check(tree, tuple(names))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise UserError(f"{shown(formula)} is no formula") from None
    return tree


def _check(tree: ast.expr, names: tuple[str, ...]) -> None:
    inner: list[ast.expr] = []
    if isinstance(tree, ast.Name):
        if tree.id not in names:
            close = nearest(tree.id, names) or f": there are {', '.join(names)}"
            raise UserError(f"the formula names {shown(tree.id)}, which is no grader of it{close}")
    elif isinstance(tree, ast.BinOp) and type(tree.op) in OPERATORS:
        inner = [tree.left, tree.right]
    elif isinstance(tree, ast.UnaryOp) and type(tree.op) in OPERATORS:
        inner = [tree.operand]
    elif isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name):
        if tree.func.id not in FUNCTIONS or tree.keywords or not tree.args:
            raise UserError(
                f"the formula calls {shown(tree.func.id)}: known are {', '.join(FUNCTIONS)}, with arguments"
            )
        if len(tree.args) > 1 and tree.func.id not in SEVERAL:
            raise UserError(
                f"the formula gives {tree.func.id} {len(tree.args)} values: it takes one"
            )
        inner = tree.args
    elif not (isinstance(tree, ast.Constant) and type(tree.value) in (int, float)):
        raise UserError(
            f"the formula holds {shown(ast.unparse(tree))}: numbers, names, + - * / ^ and functions are expected"
        )
    for part in inner:
        _check(part, names)


def value_of(tree: ast.expr, values: Mapping[str, float]) -> float:
    """The formula's value; an ArithmeticError, ValueError or TypeError where it has none.

    >>> value_of(parsed("2 * a ^ 2 + min(a, b)", ["a", "b"]), {"a": 3.0, "b": 1.0})
    19.0
    """
    if isinstance(tree, ast.Constant):
        return float(tree.value)  # type: ignore[arg-type]
    if isinstance(tree, ast.Name):
        return values[tree.id]
    inside: Any = tree
    parts = {
        ast.BinOp: lambda: [inside.left, inside.right],
        ast.UnaryOp: lambda: [inside.operand],
        ast.Call: lambda: inside.args,
    }[type(tree)]()
    apply = FUNCTIONS[inside.func.id] if isinstance(tree, ast.Call) else OPERATORS[type(inside.op)]
    return float(apply(*(value_of(part, values) for part in parts)))
