"""The products of a program, counted in its jaxpr: loops times their length.

XLA's own `cost_analysis` counts a loop's body once, and a decoder is a loop over its layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr


def count_flops(jaxpr: Any) -> int:
    """Multiplications and additions of all matrix products: 2 times rows, columns and summands.

    A scan's body counts as often as it runs, a conditional as its dearest branch, a choice by platform as its default
    (the plain definition), a `while` loop, whose length the program decides, once. Products alone are counted: they
    are all that matters in a decoder.

    >>> import jax, jax.numpy as jnp
    >>> square = jnp.ones((8, 8))
    >>> count_flops(jax.make_jaxpr(lambda x: jax.lax.scan(lambda c, _: (c @ x, 0), x, length=3))(square))
    3072
    """
    inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return sum(_of(equation) for equation in inner.eqns)


def _of(equation: Any) -> int:
    name = equation.primitive.name
    if name == "dot_general":
        (left, _), _ = equation.params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        summands = math.prod(shape[axis] for axis in left)
        return 2 * summands * math.prod(equation.outvars[0].aval.shape)
    inner = [count_flops(part) for part in _inner(equation.params)]
    if name == "cond" and equation.params.get("branches_platforms"):
        return inner[-1]
    if name == "cond":
        return max(inner, default=0)
    return sum(inner) * (equation.params["length"] if name == "scan" else 1)


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """The programs inside an equation."""
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, ClosedJaxpr | Jaxpr):
                yield part
